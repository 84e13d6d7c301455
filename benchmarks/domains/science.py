"""science: formulas and names of compounds, molar masses, elements, units. Values from mendeleev and pint.

Keys: the formula, the element, the pair of units. Salts come in blocks of two cations and two anions: the choices are the four
formulas (or names) of a block, and a block is put into a split as a whole. Formulas follow from the charges: not every one
of them is a compound that can be bought.
"""

from __future__ import annotations

import re
from itertools import permutations
from math import gcd, log10

from .items import Fact, from_facts
from .sources import pypi

DOMAIN = "science"
PYPI = ("mendeleev", "pint")

# name formula charge
CATIONS = """
lithium Li 1;sodium Na 1;potassium K 1;rubidium Rb 1;cesium Cs 1;silver Ag 1;ammonium NH4 1;copper(I) Cu 1;thallium(I) Tl 1
beryllium Be 2;magnesium Mg 2;calcium Ca 2;strontium Sr 2;barium Ba 2;zinc Zn 2;cadmium Cd 2;iron(II) Fe 2;cobalt(II) Co 2
nickel(II) Ni 2;copper(II) Cu 2;manganese(II) Mn 2;chromium(II) Cr 2;tin(II) Sn 2;lead(II) Pb 2;mercury(II) Hg 2;palladium(II) Pd 2
aluminium Al 3;gallium Ga 3;indium In 3;scandium Sc 3;yttrium Y 3;lanthanum La 3;iron(III) Fe 3;cobalt(III) Co 3;chromium(III) Cr 3
gold(III) Au 3;bismuth(III) Bi 3;titanium(III) Ti 3;cerium(III) Ce 3;neodymium Nd 3;gadolinium Gd 3;ytterbium(III) Yb 3
titanium(IV) Ti 4;zirconium Zr 4;hafnium Hf 4;tin(IV) Sn 4;lead(IV) Pb 4;cerium(IV) Ce 4;thorium Th 4;uranium(IV) U 4
"""
ANIONS = """
fluoride F 1;chloride Cl 1;bromide Br 1;iodide I 1;hydroxide OH 1;nitrate NO3 1;nitrite NO2 1;cyanide CN 1;thiocyanate SCN 1
cyanate OCN 1;hypochlorite ClO 1;chlorite ClO2 1;chlorate ClO3 1;perchlorate ClO4 1;bromate BrO3 1;iodate IO3 1;permanganate MnO4 1
bicarbonate HCO3 1;bisulfate HSO4 1;bisulfite HSO3 1;dihydrogen phosphate H2PO4 1;acetate CH3COO 1;formate HCOO 1;azide N3 1
oxide O 2;sulfide S 2;selenide Se 2;telluride Te 2;sulfate SO4 2;sulfite SO3 2;thiosulfate S2O3 2;carbonate CO3 2;chromate CrO4 2
dichromate Cr2O7 2;oxalate C2O4 2;hydrogen phosphate HPO4 2;molybdate MoO4 2;tungstate WO4 2;selenate SeO4 2;silicate SiO3 2
nitride N 3;phosphide P 3;arsenide As 3;phosphate PO4 3;phosphite PO3 3;arsenate AsO4 3;borate BO3 3;vanadate VO4 3
"""
STEMS = tuple(
    """
    meth eth prop but pent hex hept oct non dec undec dodec tridec tetradec pentadec hexadec
    """.split()  # noqa: SIM905
)
# ending -> the formula of a chain of n carbon atoms
CHAINS = {
    "ane": lambda n: _sum(n, 2 * n + 2),
    "anol": lambda n: _sum(n, 2 * n + 2, "O"),
    "anal": lambda n: _sum(n, 2 * n, "O"),
    "anoic acid": lambda n: _sum(n, 2 * n, "O2"),
    "anamine": lambda n: _sum(n, 2 * n + 3, "N"),
    "anenitrile": lambda n: _sum(n, 2 * n - 1, "N"),
    "anethiol": lambda n: _sum(n, 2 * n + 2, "S"),
    "anamide": lambda n: _sum(n, 2 * n + 1, "NO"),
    "anoyl chloride": lambda n: _sum(n, 2 * n - 1, "ClO"),
}
UNITS = {
    "length": "millimeter centimeter meter kilometer inch foot yard mile nautical_mile fathom furlong micrometer",
    "mass": "milligram gram kilogram metric_ton ounce pound stone carat grain troy_ounce long_ton microgram",
    "time": "millisecond second minute hour day week fortnight year microsecond century month millennium",
    "area": "square_meter square_centimeter square_kilometer hectare acre square_foot square_inch square_mile square_yard are",
    "volume": "milliliter liter cubic_meter cubic_inch cubic_foot teaspoon tablespoon cup pint quart gallon fluid_ounce barrel",
    "pressure": "pascal kilopascal bar millibar atmosphere torr psi hectopascal megapascal inch_Hg",
    "energy": "joule kilojoule calorie kilocalorie watt_hour kilowatt_hour british_thermal_unit electron_volt erg megajoule",
    "power": "watt kilowatt horsepower megawatt metric_horsepower milliwatt",
    "angle": "radian degree arcminute arcsecond turn milliradian microradian",
    "data": "bit byte kilobyte megabyte gigabyte kibibyte mebibyte kilobit megabit gibibyte",
    "speed": "meter_per_second kilometer_per_hour mile_per_hour knot foot_per_second",
    "force": "newton kilonewton dyne pound_force kilogram_force kip poundal",
}
SIZES = {"square_": "**2", "cubic_": "**3"}
AMOUNTS = (3, 7, 12, 45)


def build(seed, counts):
    rows = pypi("mendeleev.fetch").fetch_table("elements").to_dict("records")
    registry = pypi("pint").UnitRegistry()
    masses = {row["symbol"]: row["atomic_weight"] for row in rows}
    facts = salt_facts(masses) + chain_facts(masses) + element_facts(rows) + unit_facts(registry)
    return from_facts(DOMAIN, facts, seed, counts)


def _ions(text):
    for entry in re.split(r"[;\n]", text.strip()):
        *name, formula, charge = entry.split()
        yield " ".join(name), formula, int(charge)


def _sum(carbon, hydrogen, rest=""):
    return f"C{carbon if carbon > 1 else ''}H{hydrogen}{rest}"


def salt(cation, anion):
    """(name, formula) of a neutral salt of two ions (name, formula, charge)."""
    common = gcd(cation[2], anion[2])
    parts = _times(cation[1], anion[2] // common) + _times(anion[1], cation[2] // common)
    return f"{cation[0]} {anion[0]}", parts


def _times(formula, count):
    if count == 1:
        return formula
    atoms = re.findall(r"[A-Z][a-z]?\d*", formula)
    return f"{formula}{count}" if len(atoms) == 1 and not formula[-1].isdigit() else f"({formula}){count}"


def atoms(formula: str) -> dict[str, int]:
    """Element -> number of atoms in a formula with at most one level of brackets."""
    found = {}
    for group, times, element, count in re.findall(r"\(([^)]*)\)(\d*)|([A-Z][a-z]?)(\d*)", formula):
        inner = atoms(group) if group else {element: int(count or 1)}
        for symbol, number in inner.items():
            found[symbol] = found.get(symbol, 0) + number * (int(times or 1) if group else 1)
    return found


def mass(formula, masses):
    return sum(masses[symbol] * number for symbol, number in atoms(formula).items())


def salt_facts(masses):
    cations, anions = _pairs(_ions(CATIONS)), _pairs(_ions(ANIONS))
    facts = []
    for row, (one, two) in enumerate(cations):
        for column, (three, four) in enumerate(anions):
            block = f"block {row} {column}"
            for cation, anion in ((one, three), (one, four), (two, three), (two, four)):
                facts += compound_facts(*salt(cation, anion), masses, (block,), block)
    return facts


def _pairs(ions):
    """Ions in pairs: first those with a common stem, such as iron(II) with iron(III), then what is left, by name."""
    stems = {}
    for ion in sorted(ions):
        stems.setdefault(re.sub(r"(\(.*|[ai]te|ide)$", "", ion[0]), []).append(ion)
    pairs = [pair for same in stems.values() for pair in zip(same[::2], same[1::2], strict=False)]
    rest = [same[-1] for same in stems.values() if len(same) % 2]
    return pairs + list(zip(rest[::2], rest[1::2], strict=True))


def chain_facts(masses):
    facts = []
    for ending, formula in CHAINS.items():
        for carbon, stem in enumerate(STEMS, start=1):
            facts += compound_facts(stem + ending, formula(carbon), masses, ("chain",))
    return facts


def compound_facts(name, formula, masses, group, unit=""):
    total = mass(formula, masses)
    near, key = (total,), f"formula {formula}"
    count = sum(atoms(formula).values())
    return [
        Fact("formula", key, f"What is the chemical formula of {name}?", formula, group=group, near=near, unit=unit),
        Fact("compound", key, f"What is the name of the compound {formula}?", name, group=group, near=near, unit=unit),
        Fact("molar mass", key, f"What is the molar mass of {name}?", f"{total:.1f} g/mol", near=near, unit=unit),
        Fact("atoms", key, f"How many atoms are in one formula unit of {name}?", str(count), near=(count,), unit=unit),
    ]


def element_facts(rows):
    facts = []
    for row in rows:
        name, number = row["name"], row["atomic_number"]
        questions = (
            ("symbol", f"What is the chemical symbol of {name.lower()}?", row["symbol"]),
            ("element", f"Which element has the symbol {row['symbol']}?", name),
            ("atomic number", f"What is the atomic number of {name.lower()}?", str(number)),
            ("element by number", f"Which element has the atomic number {number}?", name),
            ("period", f"In which period of the periodic table is {name.lower()}?", str(row["period"])),
            ("block", f"In which block of the periodic table is {name.lower()}?", f"{row['block']}-block"),
            ("group", f"In which group of the periodic table is {name.lower()}?", _whole(row["group_id"])),
            ("weight", f"What is the atomic weight of {name.lower()}?", f"{row['atomic_weight']:.1f}"),
        )
        facts += [Fact(kind, f"element {name}", *rest, near=(number,)) for kind, *rest in questions if rest[-1]]
    return facts


def _whole(value):
    return "" if value is None or value != value else str(int(value))


def unit_facts(registry):
    """Conversions of pairs of units of a dimension; choices are values of about the same size."""
    facts = []
    for dimension, names in UNITS.items():
        for source, target in permutations(names.split(), 2):
            key = "units " + " ".join(sorted((source, target)))
            for amount in AMOUNTS:
                value = registry.Quantity(amount, quantity(source)).to(quantity(target)).magnitude
                if 1e-4 < value < 1e9:
                    prompt = f"How much is {amount} {source.replace('_', ' ')} in {target.replace('_', ' ')}?"
                    facts.append(Fact("unit", key, prompt, written(value), group=(dimension,), near=(log10(value),)))
    return facts + quantity_facts()


def quantity(unit):
    """A unit's name as pint reads it."""
    for size, power in SIZES.items():
        if unit.startswith(size):
            return unit.removeprefix(size) + power
    return unit.replace("_per_", "/")


def written(value):
    """Four significant digits, without an exponent or trailing zeros."""
    digits = max(0, 3 - int(log10(value) // 1))
    text = f"{float(f'{value:.4g}'):.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def quantity_facts():
    names = [(unit.replace("_", " "), dimension) for dimension, units in UNITS.items() for unit in units.split()]
    return [Fact("quantity", f"unit {unit}", f"What is measured in {unit}?", dimension) for unit, dimension in names]
