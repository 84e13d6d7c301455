"""Three small domains made on the spot: arithmetic word problems, executed Python expressions, unit conversion.

Every answer is computed: by integer arithmetic, by evaluating the expression, by an exact factor. What is held out:

- arithmetic: whole sentence templates, and number combinations: a test item's (operation, numbers) is in no training
  item, in either order of the numbers, and its template is used by no training item.
- python: the words of test expressions occur in no training expression, their numbers not together in one of the same kind.
- conversion: (unit, unit, amount), in both directions; training converts the same units, but not that amount of them.

Made so that neither an echo of the prompt nor a calculation without its result contains the answer: scoring could not tell
that from knowing it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, cycle, islice, permutations, product

DOMAINS = ("arithmetic", "python", "conversion")
# A model of this size cannot set up a calculation and carry it out in one token.
CALCULATE = " Write the calculation and its result."
INSTRUCTIONS = {"arithmetic": CALCULATE, "python": " Answer with the result only.", "conversion": CALCULATE}

NAMES = tuple("Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah".split())  # noqa: SIM905
THINGS = tuple("apples coins stamps pencils books marbles cards shells buttons stickers eggs".split())  # noqa: SIM905
TEMPLATES = {
    "add": (
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "{name} had {a} {things}. A friend gave {name} {b} {things}. How many are there in all?",
        "There are {a} {things} in a box and {b} {things} on the table. How many {things} are there together?",
        "On Monday {name} found {a} {things}, on Tuesday {b}. How many {things} did {name} find?",
        "{name} sold {a} {things} in the morning and {b} in the afternoon. How many {things} were sold that day?",
        "A bag holds {a} {things}. {name} puts in another {b}. How many {things} does the bag hold now?",
    ),
    "sub": (
        "{name} has {a} {things} and loses {b}. How many {things} are left?",
        "There were {a} {things} in a box. {name} took {b} of them. How many {things} stayed in the box?",
        "{name} had {a} {things} and gave {b} of them away. How many {things} does {name} still have?",
        "A shop has {a} {things} and sells {b}. How many {things} remain?",
        "Of {a} {things}, {b} are broken. How many {things} are not broken?",
        "{name} needs {a} {things} and already has {b}. How many more {things} does {name} need?",
    ),
    "mul": (
        "A box holds {a} {things}. How many {things} are in {b} boxes?",
        "{name} buys {b} bags with {a} {things} each. How many {things} is that?",
        "There are {b} shelves and {a} {things} on every shelf. How many {things} are there?",
        "{name} collects {a} {things} a day for {b} days. How many {things} does {name} collect?",
        "Each of {b} children has {a} {things}. How many {things} do they have together?",
        "One pack has {a} {things}. How many {things} do {b} packs have?",
    ),
}
SIGN = {"add": "+", "sub": "-", "mul": "*"}
RESULT = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
HELD_OUT_TEMPLATES = 2  # the last ones of each operation
SIGN = {"add": "+", "sub": "-", "mul": "*"}
RESULT = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}

WORDS = tuple(
    """
    cat dog sun map pen cup hat box car bus red blue green lamp tree bird fish milk rice rain snow wind star
    moon hand door wall road boat ship king rose leaf seed farm ring song game book desk chair table house horse
    mouse bread apple lemon stone water river cloud plant glass paper music train plane night light heart world
    """.split()  # noqa: SIM905 (as a literal it fills 60 lines)
)

EXPRESSIONS = {  # kind -> the text of an expression over its operands
    "concat": "{!r} + {!r}".format,
    "join": "{!r}.join([{!r}, {!r}])".format,
    "repeat": "{!r} * {}".format,
    "upper": "{!r}.upper()".format,
    "title": lambda *words: f"{' '.join(words)!r}.title()",
    "len": "len({!r})".format,
    "sorted": "sorted([{}, {}, {}])".format,
    "reversed": "[{}, {}, {}][::-1]".format,
    "range": "list(range({}, {}))".format,
    "sum": "sum([{}, {}, {}])".format,
    "modulo": "{} % {}".format,
    "formula": "{} * {} + {}".format,
}

# (from, to, factor): one `from` is `factor` times one `to`, exactly.
FACTORS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("tonnes", "kilograms", 1000),
    ("litres", "millilitres", 1000),
    ("metres", "millimetres", 1000),
    ("euros", "cents", 100),
    ("hectares", "square metres", 10000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("pounds", "ounces", 16),
    ("gallons", "quarts", 4),
    ("dozens", "pieces", 12),
    ("centuries", "years", 100),
    ("decades", "years", 10),
)
POWERS_OF_TEN = (10, 100, 1000, 10000)
QUESTIONS = (
    "Convert {n} {source} to {target}.",
    "How many {target} are {n} {source}?",
    "Express {n} {source} in {target}.",
)


@dataclass(frozen=True)
class Item:
    """One question. answer: what is right. solution: what training teaches to say, which ends in the answer.

    key: what is held out, (kind, *operands): equal keys have equal answers.
    """

    domain: str
    prompt: str
    answer: str
    solution: str
    key: tuple


def make_tasks(seed: int, train_per_domain: int, test_per_domain: int) -> tuple[list[Item], list[Item]]:
    """(training items, test items), domain after domain; the same for the same arguments.

    No two items of a domain have the same key. ValueError for more items than a domain has keys.
    """
    train, test = [], []
    for domain, make in zip(DOMAINS, (_arithmetic, _python, _conversion), strict=True):
        # A generator a domain, seeded by text: domains do not shift each other, and seeds are not neighbours.
        parts = make(random.Random(f"{seed} {domain}"), train_per_domain, test_per_domain)
        for items, part in zip((train, test), parts, strict=True):
            items += [Item(domain, prompt + INSTRUCTIONS[domain], *rest) for prompt, *rest in part]
    return train, test


def _deal(pools, turns, count):
    """`count` (kind, operands) taken out of the pools {kind: [operands]}, the kinds taking turns."""
    dealt = []
    for kind in islice(cycle(turns), count):
        if not pools[kind]:
            raise ValueError(f"there are not enough different items ({kind}) for {count} in a domain; ask for fewer")
        dealt.append((kind, pools[kind].pop()))
    return dealt


def _shuffled(rng, pools):
    for operands in pools.values():
        rng.shuffle(operands)
    return pools


# --- the domains: (training, test) as lists of (prompt, answer, solution, key); tests are dealt first, from full pools ---


def _arithmetic(rng, train_count, test_count):
    pools = {
        "add": list(combinations_with_replacement(range(2, 21), 2)),
        "sub": [(a, b) for a in range(5, 21) for b in range(2, a - 1) if a != 2 * b],  # else b is the answer
        "mul": [(a, b) for a in range(2, 10) for b in range(a, 16)],
    }
    turns = ("add", "mul", "add", "mul", "sub")
    _shuffled(rng, pools)
    test = [_word_problem(rng, *dealt, slice(-HELD_OUT_TEMPLATES, None)) for dealt in _deal(pools, turns, test_count)]
    train = [_word_problem(rng, *dealt, slice(-HELD_OUT_TEMPLATES)) for dealt in _deal(pools, turns, train_count)]
    return train, test


def _word_problem(rng, kind, operands, templates):
    a, b = operands
    if kind != "sub" and rng.random() < 0.5:
        a, b = b, a
    template = rng.choice(TEMPLATES[kind][templates])
    prompt = template.format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)
    answer = str(RESULT[kind](a, b))
    return prompt, answer, f"{a} {SIGN[kind]} {b} = {answer}", (kind, *operands)


def _python(rng, train_count, test_count):
    words = list(WORDS)
    rng.shuffle(words)
    cut = len(words) // 4
    numbers = _shuffled(
        rng,
        {
            "sorted": list(combinations(range(1, 10), 3)),
            "reversed": list(permutations(range(1, 10), 3)),
            "range": [(start, start + length) for start in range(1, 31) for length in (3, 4, 5)],
            "sum": list(combinations(range(1, 10), 3)),
            "modulo": [(a, b) for a in range(10, 41) for b in range(3, 10)],
            "formula": [(a, b, c) for a, b in combinations(range(2, 10), 2) for c in range(1, 10)],
        },
    )

    def part(words, count):
        pools = _shuffled(rng, _word_pools(words)) | numbers
        return [_expression(rng, kind, operands) for kind, operands in _deal(pools, tuple(pools), count)]

    test = part(words[:cut], test_count)
    return part(words[cut:], train_count), test


def _word_pools(words):
    return {
        "concat": list(permutations(words, 2)),
        "join": [(sign, *pair) for sign in "-+/_" for pair in permutations(words, 2)],
        "repeat": list(product(words, (2, 3, 4))),
        "upper": [(word,) for word in words],
        "title": list(permutations(words, 2)),
        "len": [(word,) for word in words],
    }


def _expression(rng, kind, operands):
    """The source text of an expression over the operands, and what it evaluates to."""
    if kind == "sorted":  # in any order but the sorted one, which the answer would be an echo of
        written = rng.choice(list(permutations(operands))[1:])
    elif kind in ("sum", "formula") and rng.random() < 0.5:
        written = (operands[1], operands[0], *operands[2:])
    else:
        written = operands
    expression = EXPRESSIONS[kind](*written)
    value = str(eval(expression, {}))  # written by this module, from its own words and numbers
    return f"What does this Python expression return? {expression}", value, value, (kind, *operands)


def _conversion(rng, train_count, test_count):
    pools = {"metric": [], "other": []}
    for units in FACTORS:
        metric = units[2] in POWERS_OF_TEN
        amounts = range(2, 100 if metric else 16)
        # An amount like the factor would make the factor, which a wrong calculation shows too, the answer.
        pools["metric" if metric else "other"] += [(*units, n) for n in amounts if n != units[2]]
    _shuffled(rng, pools)
    test = [_question(rng, *dealt) for dealt in _deal(pools, tuple(pools), test_count)]
    return [_question(rng, *dealt) for dealt in _deal(pools, tuple(pools), train_count)], test


def _question(rng, kind, operands):
    large, small, factor, amount = operands
    if rng.random() < 0.5:
        source, target, given, sign, result = large, small, amount, "*", amount * factor
    else:
        source, target, given, sign, result = small, large, amount * factor, "/", amount
    prompt = rng.choice(QUESTIONS).format(n=given, source=source, target=target)
    return prompt, str(result), f"{given} {sign} {factor} = {result}", (kind, source, target, given)
