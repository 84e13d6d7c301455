"""The benchmark's seven domains: parsers on lines of the real formats, rules on small builds, the control on leaks of known size."""

import gzip
import hashlib
import json
import random
import string
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from domains import build, coding, control, geography, items, lexical, maths, packages, science, sources, translation

from adafuse.evaluation import read_choices

COUNTS = {"train": 400, "validation": 200, "test": 200}
SMALL = {"train": 16, "validation": 8, "test": 8}
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def made_up(count, seed=0):
    """Different words of six letters, such that the first two syllables of each are its own."""
    rng = random.Random(seed)
    pairs = [one + two for one in SYLLABLES for two in SYLLABLES]
    return [pair + rng.choice(SYLLABLES) for pair in rng.sample(pairs, count)]


def check(splits, counts):
    """The rules, written down a second time."""
    assert {split: len(items) for split, items in splits.items()} == counts
    everything = [item for items in splits.values() for item in items]
    assert len({item["prompt"] for item in everything}) == len(everything)
    for item in everything:
        assert set(item) == {"prompt", "choices", "answer", "domain", "key"}
        assert len(set(item["choices"])) == 4
        assert all(choice.startswith(" ") and choice.strip() for choice in item["choices"])
    keys = {split: {item["key"] for item in items} for split, items in splits.items()}
    assert not keys["train"] & keys["validation"] | keys["train"] & keys["test"] | keys["validation"] & keys["test"]
    assert items.broken_rules(splits) == []


def check_balance(items):
    """Every text of a set of choices is the right one once for each set it is in: knowing the choices tells nothing."""
    sets = Counter(tuple(item["choices"]) for item in items)
    asked = Counter((tuple(item["choices"]), item["answer"]) for item in items)
    assert all(asked[choices, place] * 4 == count for choices, count in sets.items() for place in range(4))


# --- generated domains, whole ---


@pytest.fixture(scope="module", params=[maths, coding], ids=["math", "code"])
def generated(request):
    return request.param.build(3, COUNTS)


def test_generated_domains_follow_the_rules(generated):
    check(generated, COUNTS)


def test_every_place_is_right_equally_often(generated):
    places = Counter(item["answer"] for items in generated.values() for item in items)
    assert all(160 <= places[place] <= 240 for place in range(4))  # 200 expected, standard deviation 12


def test_choices_alone_tell_nothing(generated):
    assert control.choices_only(generated) < control.LIMIT


def test_right_and_wrong_numbers_are_of_one_size():
    items = maths.build(0, COUNTS)["train"]
    ranks = Counter(sorted(item["choices"], key=int).index(item["choices"][item["answer"]]) for item in items)
    assert all(70 <= ranks[rank] <= 130 for rank in range(4))  # 100 expected, standard deviation 9


FULL = {"train": 4000, "validation": 2000, "test": 2000}


def test_full_counts_are_reached():
    for module in (maths, coding):
        assert {split: len(items) for split, items in module.build(0, FULL).items()} == FULL


def test_math_is_trained_and_chosen_on_the_same_items_as_ever(tmp_path):
    """The study's runs were made on these two files; only the test split has been given more templates since."""
    built = maths.build(0, FULL)
    for split, digest in (
        ("train", "101aab39bfc47d70ed30608a0848f4811dfff630b32de9f8157fc78bc4a165ed"),
        ("validation", "8050fbaa47fe1e6418cee5e29c2a1f7792b9febbe8dba564164f9572aa75e627"),
    ):
        items.write_items(tmp_path / "some.jsonl", built[split])
        assert hashlib.sha256((tmp_path / "some.jsonl").read_bytes()).hexdigest() == digest


def test_templates_are_many_different_and_whole():
    calculations = [pair for _, calculations in maths.FAMILIES.values() for pair in calculations.values()]
    templates = [template for _, texts in calculations for template in texts]
    assert len(set(templates)) == len(templates)
    assert all(len(texts) == 9 for _, texts in calculations)
    used = {split: len({item["key"] for item in items}) for split, items in maths.build(0, FULL).items()}
    assert used == {"train": 72, "validation": 24, "test": 120}


def test_templates_have_all_numbers_and_no_other_words():
    for draw, calculations in maths.FAMILIES.values():
        numbers = set(draw(random.Random(0)))
        for _, templates in calculations.values():
            for template in templates:
                names = {name for _, name, _, _ in string.Formatter().parse(template) if name}
                assert numbers <= names <= numbers | {"name", "things"}


def test_templates_ask_for_their_calculation():
    """Independent of the lambdas: the sign of each calculation, evaluated, is the value among the choices."""
    rng = random.Random(0)
    for family in ("two numbers", "three numbers", "shares"):
        draw, calculations = maths.FAMILIES[family]
        for _ in range(20):
            numbers = draw(rng)
            for sign, (calculate, templates) in calculations.items():
                assert calculate(**numbers) == eval(sign, {}, numbers)
                assert all("{" + name + "}" in text for text in templates for name in numbers if name in sign)


def test_values_are_those_of_the_expression(generated):
    asked = "What does this Python expression give? "
    for item in generated["test"]:
        if item["prompt"].startswith(asked):
            expression = item["prompt"].removeprefix(asked).removesuffix(" Answer:")
            assert item["choices"][item["answer"]] == f" {eval(expression)!r}"


def test_functions_of_the_library_are_described_as_they_are():
    facts = {fact.answer: fact.prompt for fact in coding.library_facts()}
    assert len(facts) > 500
    assert facts["textwrap.dedent"] == (
        "What in Python's standard library is this? Remove any common leading whitespace from every line in `text`."
    )
    assert coding.first_line(dict.get).startswith("Return the value for key if key is in the dictionary")


# --- the others, on stand-ins of their sources ---

DOG = (
    "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02083346 n 0000 ~ 01322604 n 0000 | a member of the "
    'genus Canis (probably descended from the common wolf); "the dog barked all night"  '
)


def test_a_synset_of_wordnet():
    sense, synset = lexical.parse_synset(DOG)
    assert sense == ("noun", "02084071")
    assert synset.words == ["dog", "domestic dog", "Canis familiaris"]
    assert synset.hypernyms == [("noun", "02083346")]
    assert synset.definition == "a member of the genus Canis (probably descended from the common wolf)"


def test_a_line_of_wordnets_index():
    assert lexical.parse_index("dog n 3 5 @ ~ #m #p %p 3 1 02084071 10114209 10023039  ") == (
        "dog",
        ["02084071", "10114209", "10023039"],
        1,
    )


@pytest.fixture
def wordnet(tmp_path):
    """20 kinds of things with 6 things each, of two words each, in WordNet's files."""
    kinds, words = made_up(400)[:20], made_up(400)[20:260]
    data = [
        "  1 This software and database is being provided to you, the LICENSEE, by",
        _line(1, ["entity"], [], "all"),
    ]
    index = ["entity n 1 0 1 1 00000001  "]
    for number, kind in enumerate(kinds, start=2):
        data.append(_line(number, [kind], [1], f"one of all the {number} kinds"))
        index.append(f"{kind} n 1 1 @ 1 1 {number:08}  ")
    for number in range(120):
        own, offset = words[2 * number : 2 * number + 2], 100 + number
        data.append(_line(offset, own, [2 + number % 20], f"the thing with the number {number}"))
        index += [f"{word} n 1 1 @ 1 1 {offset:08}  " for word in own]
    for pos in lexical.POS:
        (tmp_path / f"data.{pos}").write_text("\n".join(data) + "\n" if pos == "noun" else "")
        (tmp_path / f"index.{pos}").write_text("\n".join(index) + "\n" if pos == "noun" else "")
    return tmp_path


def _line(offset, words, parents, gloss):
    pointers = "".join(f" @ {parent:08} n 0000" for parent in parents)
    return f"{offset:08} 03 n {len(words):02x} {' 0 '.join(words)} 0 {len(parents):03}{pointers} | {gloss}  "


def test_lexical(wordnet):
    facts = lexical.read(wordnet)
    assert Counter(fact.kind for fact in facts) == {"definition": 140, "synonym": 240, "hypernym": 140}
    splits = items.from_facts("lexical", facts, 0, SMALL)
    check(splits, SMALL)
    for part in splits.values():
        check_balance(part)


def test_synonyms_are_in_one_split(wordnet):
    split = {}
    for fact in lexical.read(wordnet):
        if fact.kind == "synonym":
            split[fact.key] = items.split_of(fact.unit, 0)
            assert split.setdefault(fact.answer, split[fact.key]) == split[fact.key]
    assert set(split.values()) == set(items.SPLITS)


def test_no_choice_is_an_ancestor(wordnet):
    """A grandparent is right too, so it is no wrong choice for its grandchild."""
    fact = next(fact for fact in lexical.read(wordnet) if fact.kind == "hypernym" and "entity" not in fact.answer)
    assert "entity" in fact.right


# In the dictionaries' format; the words are made up.
DICTIONARY = """\
English-German dictionary
zorb /zˈɔːb/
Zorbel <neut>, Kugelding <neut> [constr.]
   Synonym: {zorbing}
      "roll a zorb"  - ein Zorbel rollen
gleep /ɡlˈiːp/ <n>
1. Gliep <masc>
2. Gliepe (männlich) <masc>
mork gleep /mˈɔːk ɡlˈiːp/
Morkel
"""


def test_a_dictionary(tmp_path):
    with gzip.open(tmp_path / "some.dict.dz", "wt", encoding="utf-8") as file:
        file.write(DICTIONARY)
    assert translation.read(tmp_path / "some.dict.dz") == {
        "zorb": ["Zorbel", "Kugelding"],
        "gleep": ["Gliep", "Gliepe"],
    }


def test_words_run_together_are_no_translations():
    known = {"carne", "vaca", "res"}
    assert translation.best(["carnedevaca", "res"], known) == "res"
    assert translation.best(["uno", "dos", "tres", "seis", "siete", "ocho"], known) == ""


def test_translation():
    english, foreign = made_up(300, seed=1), made_up(900, seed=2)
    dictionaries = {
        code: {word: [text] for word, text in zip(english, foreign[start : start + 300], strict=True)}
        for code, start in (("spa", 0), ("fra", 300), ("deu", 600))
    }
    splits = items.from_facts("translation", translation.make_facts(dictionaries), 0, SMALL)
    check(splits, SMALL)
    check_balance(splits["test"])


PACKAGES = """\
Package: less
Version: 590-2
Installed-Size: 309
Description: pager program similar to more
Section: text
Priority: important

Package: libless-perl
Source: perl-less (1.2)
Description: stylesheets compiled for browsers
 with a line that goes on
Section: perl
"""


def test_the_list_of_packages():
    assert packages.parse(PACKAGES) == [
        {"Package": "less", "Section": "text", "Description": "pager program similar to more"},
        {
            "Package": "libless-perl",
            "Source": "perl-less (1.2)",
            "Section": "perl",
            "Description": "stylesheets compiled for browsers",
        },
    ]
    facts = {(fact.kind, fact.key): fact.answer for fact in packages.make_facts(packages.parse(PACKAGES))}
    assert facts["section", "perl-less"] == "perl"
    assert facts["section", "less"] == "text"


def test_packages():
    names, about = made_up(300, seed=3), made_up(300, seed=4)
    sections = ("games", "text", "mail", "video", "fonts", "shells")
    listed = [
        {"Package": name, "Section": sections[number % 6], "Description": f"it does {what} for people"}
        for number, (name, what) in enumerate(zip(names, about, strict=True))
    ]
    splits = items.from_facts("packages", packages.make_facts(listed), 0, SMALL)
    check(splits, SMALL)
    check_balance(splits["validation"])


def world():
    """12 countries with a city each 20 times, of which one name is in two countries; 8 states."""
    names = made_up(600, seed=5)
    countries, cities = {}, {}
    for number in range(12):
        code = f"C{number}"
        countries[code] = {
            "name": names[number].title(),
            "continentcode": "EU",
            "population": 1000,
            "capital": names[20 + number].title(),
            "tld": f".{code.lower()}",
            "currencyname": "" if number == 0 else f"{names[40 + number].title()}",
            "phone": f"{300 + number}",
        }
        for city in range(20):
            cities[f"{number} {city}"] = {
                "geonameid": 100 * number + city,
                "name": names[60 + 20 * number + city].title(),
                "countrycode": code,
                "population": 50_000,
                "admin1code": "01",
                "alternatenames": ["Zwillingen"] if city == 0 and number < 2 else [],
            }
    cities["0 0"]["name"] = "Zwillingen"
    states = {f"S{number}": {"name": names[400 + number].title()} for number in range(8)}
    counties = [{"name": f"{names[420 + number].title()} County", "state": f"S{number % 8}"} for number in range(100)]
    return (
        countries,
        cities,
        states,
        [*counties, {"name": "Twin County", "state": "S0"}, {"name": "Twin County", "state": "S1"}],
    )


def test_geography():
    facts = geography.make_facts(*world())
    assert Counter(fact.kind for fact in facts)["city"] == 239  # not the name that two countries have
    assert not any("Zwillingen" in fact.prompt or "Twin" in fact.prompt for fact in facts)
    assert Counter(fact.kind for fact in facts)["currency"] == 11  # one is empty
    splits = items.from_facts("geography", facts, 0, SMALL)
    check(splits, SMALL)
    check_balance(splits["train"])


@pytest.mark.parametrize(
    ("cation", "anion", "formula"),
    [
        (("sodium", "Na", 1), ("chloride", "Cl", 1), "NaCl"),
        (("calcium", "Ca", 2), ("nitrate", "NO3", 1), "Ca(NO3)2"),
        (("aluminium", "Al", 3), ("sulfate", "SO4", 2), "Al2(SO4)3"),
        (("ammonium", "NH4", 1), ("sulfide", "S", 2), "(NH4)2S"),
        (("magnesium", "Mg", 2), ("oxide", "O", 2), "MgO"),
        (("lithium", "Li", 1), ("azide", "N3", 1), "LiN3"),
        (("barium", "Ba", 2), ("azide", "N3", 1), "Ba(N3)2"),
    ],
)
def test_salts(cation, anion, formula):
    assert science.salt(cation, anion) == (f"{cation[0]} {anion[0]}", formula)


def test_atoms_and_chains():
    assert science.atoms("Al2(SO4)3") == {"Al": 2, "S": 3, "O": 12}
    assert science.atoms("CH3COOH") == {"C": 2, "H": 4, "O": 2}
    chains = {ending: formula(3) for ending, formula in science.CHAINS.items()}
    assert chains["ane"] == "C3H8"
    assert chains["anol"] == "C3H8O"
    assert chains["anoic acid"] == "C3H6O2"
    assert chains["anamine"] == "C3H9N"


def test_values_are_written_with_four_digits():
    written = [science.written(value) for value in (1609.344, 0.0254, 12.0, 123456.0, 1e8, 0.1 + 0.2)]
    assert written == ["1609", "0.0254", "12", "123500", "100000000", "0.3"]


def test_science():
    symbols = {
        symbol
        for ion in (*science._ions(science.CATIONS), *science._ions(science.ANIONS))
        for symbol in science.atoms(ion[1])
    }
    masses = {
        symbol: 7.3 * number for number, symbol in enumerate(sorted(symbols | {"C", "H", "N", "O", "S", "Cl"}), start=1)
    }
    facts = science.salt_facts(masses) + science.chain_facts(masses) + science.quantity_facts()
    assert len({fact.key for fact in facts if fact.kind == "formula"}) > 2000
    splits = items.from_facts("science", facts, 0, COUNTS)
    check(splits, COUNTS)
    check_balance(splits["test"])


def test_units():
    pint = pytest.importorskip("pint")
    facts = {fact.prompt: fact.answer for fact in science.unit_facts(pint.UnitRegistry())}
    assert facts["How much is 3 gallon in fluid ounce?"] == "384"
    assert facts["How much is 7 square meter in square centimeter?"] == "70000"
    assert facts["How much is 45 kilometer per hour in meter per second?"] == "12.5"


# --- what all share ---


def some_facts(count=400):
    return [
        items.Fact("kind", f"key {n}", f"Which is the one called {n}?", answer)
        for n, answer in enumerate(made_up(count))
    ]


def test_facts_become_balanced_items():
    splits = items.from_facts("some", some_facts(), 0, SMALL)
    check(splits, SMALL)
    check_balance(splits["train"])


def test_the_seed_decides():
    first, again, other = (items.from_facts("some", facts, seed, SMALL) for facts, seed in _three_ways())
    assert first == again
    assert first != other


def _three_ways():
    facts = some_facts()
    return (facts, 0), (facts[::-1], 0), (facts, 1)


def test_what_is_right_too_is_no_wrong_choice():
    facts = [
        items.Fact("kind", f"key {n}", f"Which is number {n}?", answer, frozenset(made_up(24)[n // 6 * 6 :][:6]))
        for n, answer in enumerate(made_up(24))
    ]
    for four in items.make_fours(random.Random(0), facts)["kind"]:
        assert len({fact.right for fact in four}) == 4


@pytest.mark.parametrize(
    ("prompt", "answer", "found"),
    [
        ("Is Rome in Romania?", "Roma", True),
        ("What are 12 and 30?", "3", False),
        ("What are 12 and 3?", "3", True),
        ("What is sodium?", "Na", False),
    ],
)
def test_echoes(prompt, answer, found):
    assert items.echoes(prompt, answer) is found


def test_broken_rules_are_named():
    good = items.from_facts("some", some_facts(), 0, SMALL)
    item = good["test"][0]
    for broken, word in (
        ({"choices": [*item["choices"][:3], item["choices"][0]]}, "four different choices"),
        ({"answer": 4}, "no such answer"),
        ({"prompt": good["train"][0]["prompt"]}, "share a prompt"),
        ({"key": good["train"][0]["key"]}, "share a key"),
        ({"prompt": f"Is it{item['choices'][0]}?"}, "contains a choice"),
    ):
        found = items.broken_rules({**good, "test": [item | broken, *good["test"][1:]]})
        assert any(word in text for text in found), word


def leaky(rng, count, share):
    """Items whose right choice ends in x, in a share of them; else nothing tells."""
    words = made_up(400)
    found = []
    for number in range(count):
        choices, place = rng.sample(words, 4), rng.randrange(4)
        if rng.random() < share:
            choices[place] += "x"
        found.append({"prompt": f"{number}?", "choices": choices, "answer": place})
    return found


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_control_finds_a_leak(share):
    rng = random.Random(0)
    splits = {split: leaky(rng, count, share) for split, count in COUNTS.items()}
    accuracy = control.choices_only(splits)
    assert accuracy > 0.9 if share else accuracy < control.LIMIT


def test_the_control_finds_numbers_in_the_middle():
    rng = random.Random(0)
    splits = {}
    for split, count in COUNTS.items():
        splits[split] = []
        for _ in range(count):
            right = rng.randrange(100, 900)
            choices = [
                str(right + off) for off in (0, -rng.randrange(1, 9), rng.randrange(1, 9), rng.randrange(10, 20))
            ]
            splits[split].append({"choices": choices, "answer": 0})
    assert control.choices_only(splits) > 0.5  # by its rank among the four


def test_overlap_finds_an_echo():
    item = {"prompt": "the colour of grass", "choices": [" grassy", " wooden", " stony", " watery"], "answer": 0}
    assert control.overlap([item]) == 1
    assert control.overlap([item | {"prompt": "?"}]) == 0.25


# --- the command ---


def test_the_command_writes_what_eval_reads(tmp_path, capsys):
    arguments = ["--domains", "math", "code", "--train", "40", "--held-out", "20", "--seed", "5"]
    for folder in ("one", "two"):
        assert build.main([*arguments, "--out", str(tmp_path / folder)]) == 0
    for domain in ("math", "code"):
        for split in items.SPLITS:
            path = tmp_path / "one" / domain / f"{split}.jsonl"
            assert len(read_choices(path)) == (40 if split == "train" else 20)
            assert path.read_bytes() == (tmp_path / "two" / domain / f"{split}.jsonl").read_bytes()
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["domains"]["math"]["items"] == {"train": 40, "validation": 20, "test": 20}
    assert "40 train" in capsys.readouterr().out


def test_the_control_is_written(tmp_path):
    assert (
        build.main(["--domains", "math", "--train", "400", "--held-out", "200", "--control", "--out", str(tmp_path)])
        == 0
    )
    found = json.loads((tmp_path / "control.json").read_text())
    (row,) = found["rows"]
    assert row["name"] == "domains/math"
    assert row["choices only"] < control.LIMIT
    assert row["random"] == 0.25


def test_counts_are_multiples_of_four(tmp_path):
    with pytest.raises(SystemExit, match="multiples of 4"):
        build.main(["--domains", "math", "--train", "41", "--out", str(tmp_path)])


def test_a_source_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get there
    with pytest.raises(sources.SourceError, match=r"Debian package wordnet-base: refresh .*apt-get update"):
        sources.debian("wordnet-base", tmp_path / "cache")
    with pytest.raises(sources.SourceError, match="apt-get update first"):
        sources.available()
    with pytest.raises(sources.SourceError, match=r"no_such_module is not installed: pip install"):
        sources.pypi("no_such_module")
