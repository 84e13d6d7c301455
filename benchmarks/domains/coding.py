"""code: what a Python expression gives, and which function of the standard library has a given first line of documentation.

Keys: the kind of expression with its operands; the bare name of the function. The wrong values of an expression are what
expressions close to it give, over the same operands: another bound, order, operator or base. Any of them could be asked.
The functions are those of the Python that builds the files.
"""

from __future__ import annotations

import importlib
import inspect
import re
import string
import sys
import warnings

from .items import SPLITS, Fact, ask_one, from_facts, generator, hints, split_of

DOMAIN = "code"
# Modules that do something when imported, are not for use, or are on some machines only.
LEFT_OUT = {
    "antigravity",
    "this",
    "idlelib",
    "turtledemo",
    "turtle",
    "tkinter",
    "test",
    "lib2to3",
    "ensurepip",
    "genericpath",
    "venv",
    "curses",
}
LEFT_OUT |= {
    "winreg",
    "winsound",
    "msvcrt",
    "nt",
    "ntpath",
    "posix",
    "posixpath",
    "pwd",
    "grp",
    "spwd",
    "crypt",
    "nis",
    "readline",
}
MOST_TRIES = 100  # for each item
WHOLE = 100  # letters: longer than any part of a name


def build(seed, counts):
    documented = from_facts(DOMAIN, library_facts(), seed, {split: count // 2 for split, count in counts.items()})
    splits = {}
    for split in SPLITS:
        items = documented[split] + expressions(seed, split, counts[split] - len(documented[split]))
        splits[split] = generator(seed, DOMAIN, split, "order").sample(items, len(items))
    return splits


# --- expressions ---


def expressions(seed, split, count):
    """`count` items that ask for a value, the kinds taking turns; operands are those whose key falls into the split."""
    rng = generator(seed, DOMAIN, split, "expressions")
    items, prompts = [], set()
    for _ in range(MOST_TRIES * count):
        if len(items) == count:
            return items
        kind = list(KINDS)[len(items) % len(KINDS)]
        operands, texts = KINDS[kind](rng)
        key = f"{kind} {operands}"
        if split_of(key, seed) != split:
            continue
        questions = [(key, f"What does this Python expression give? {text}", repr(eval(text, {}))) for text in texts]
        item = ask_one(rng, DOMAIN, questions)
        if item and item["prompt"] not in prompts:
            items.append(item)
            prompts.add(item["prompt"])
    raise ValueError(f"there are no {count} different expressions in a split; ask for fewer")


def _word(rng):
    return "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(rng.randrange(2, 5)))


def _numbers(rng):
    return rng.sample(range(1, 30), rng.randrange(4, 7))


def _division(rng):
    a, b = rng.randrange(20, 400), rng.randrange(3, 30)
    return (a, b), [f"{a} // {b}", f"{a} % {b}", f"-(-{a} // {b})", f"{a} // {b} + {a} % {b}"]


def _bits(rng):
    a, b = rng.randrange(5, 128), rng.randrange(5, 128)
    return tuple(sorted((a, b))), [f"{a} & {b}", f"{a} | {b}", f"{a} ^ {b}", f"{a} + {b}"]


def _bases(rng):
    digits = rng.choice("12") + "".join(rng.choice("012") for _ in range(rng.randrange(2, 6)))
    return digits, [f"int('{digits}', {base})" for base in (3, 4, 5, 6)]


def _sum_of_range(rng):
    a, b = 2 * rng.randrange(1, 40), 2 * rng.randrange(45, 80)  # even, so that no other key has the same range
    return (a, b), [f"sum(range({low}, {high}))" for low in (a, a + 1) for high in (b, b + 1)]


def _range(rng):
    a, step, length = 2 * rng.randrange(1, 40), rng.randrange(2, 6), rng.randrange(3, 6)
    ends = [low + step * length + more for low in (a, a + 1) for more in (0, step)]
    return (a, step), [
        f"list(range({low}, {end}, {step}))" for low, end in zip((a, a, a + 1, a + 1), ends, strict=True)
    ]


def _slice(rng):
    xs = _numbers(rng)
    return sorted(xs), [
        f"{xs}[{part}]" for part in rng.sample(("1:3", "1:4", "2:4", "::2", "1::2", "::-1", "-2:", ":-1"), 4)
    ]


def _sort(rng):
    xs = _numbers(rng)
    return sorted(xs), [
        f"sorted({xs})",
        f"sorted({xs}, reverse=True)",
        f"{xs}[::-1]",
        f"sorted({xs}, key=lambda x: x % 10)",
    ]


def _sum_of_slice(rng):
    xs = _numbers(rng)
    return sorted(xs), [
        f"sum({xs}[{part}])" for part in rng.sample((":2", "1:3", "1:", ":-1", "::2", "-2:", "1::2"), 4)
    ]


def _each(rng):
    xs, k = _numbers(rng), rng.randrange(2, 6)
    return (sorted(xs), k), [f"[x {sign} {k} for x in {xs}]" for sign in rng.sample(("*", "+", "-", "//", "%"), 4)]


def _filtered(rng):
    xs = rng.sample(range(1, 60), 8)
    k = sorted(xs)[4]
    return sorted(xs), [f"[x for x in {xs} if x {test}]" for test in (f"> {k}", f">= {k}", f"< {k}", f"<= {k}")]


def _sets(rng):
    both = rng.sample(range(1, 30), 8)
    a, b = set(both[:6]), set(both[3:])
    return sorted(both), [f"sorted({a} {sign} {b})" for sign in ("&", "|", "-", "^")]


def _joined(rng):
    word = _word(rng)
    sign = rng.choice("-+_.")
    return word, [
        f"'{sign}'.join({text})" for text in (f"'{word}'", f"'{word}'[::-1]", f"sorted('{word}')", f"'{word}'[1:]")
    ]


def _across(rng):
    one, two = _word(rng), _word(rng)
    start = len(one) - rng.randrange(1, 3)
    bounds = [(start, start + 3), (start, start + 4), (start - 1, start + 2), (start - 1, start + 3)]
    return (one, two), [f"('{one}' + '{two}')[{low}:{high}]" for low, high in bounds]


def _replaced(rng):
    word = _word(rng)
    old, others = rng.choice(word), rng.sample(string.ascii_lowercase, 2)
    texts = [f"'{word}'.replace('{old}', '{new}')" for new in others]
    return word, texts + [f"'{word}'.replace('{old}', '{new}', 1)[::-1]" for new in others]


def _measured(rng):
    words, letter = [_word(rng) for _ in range(4)], rng.choice("aeiou")
    texts = ("len(w)", f"w.count('{letter}')", f"w.find('{letter}')", "len(set(w))")
    return sorted(words), [f"[{text} for w in {words}]" for text in texts]


def _enumerated(rng):
    word = _word(rng)[:4]
    texts = (
        f"enumerate('{word}')",
        f"enumerate('{word}', 1)",
        f"enumerate('{word}'[::-1])",
        f"enumerate('{word}'[::-1], 1)",
    )
    return word, [f"list({text})" for text in texts]


KINDS = {
    "division": _division,
    "bits": _bits,
    "bases": _bases,
    "sum of range": _sum_of_range,
    "range": _range,
    "slice": _slice,
    "sort": _sort,
    "sum of slice": _sum_of_slice,
    "each": _each,
    "filtered": _filtered,
    "sets": _sets,
    "joined": _joined,
    "across": _across,
    "replaced": _replaced,
    "measured": _measured,
    "enumerated": _enumerated,
}


# --- documentation ---


def library_facts() -> list[Fact]:
    """Facts of the standard library's public functions, classes and methods; what is documented alike is left out."""
    found = {}
    for module in sorted(sys.stdlib_module_names - LEFT_OUT):
        if not module.startswith("_"):
            for name, line in documented(module):
                found.setdefault(line, set()).add(name)
    facts = [_fact(*names, line) for line, names in found.items() if len(names) == 1]
    return [fact for fact in facts if not hints(fact.prompt, fact.answer.rsplit(".", 1)[-1], letters=WHOLE)]


def documented(module):
    """(name, first line of its documentation) of a module's functions and classes, and of the classes' methods."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            members = vars(importlib.import_module(module))
    except ImportError:  # not on this machine
        return
    for name, member in sorted(members.items()):
        if name.startswith("_") or not callable(member) or getattr(member, "__module__", None) != module:
            continue
        if getattr(member, "__name__", name) != name:  # another name for it
            continue
        if line := first_line(member):
            yield (name if module == "builtins" else f"{module}.{name}"), line
        if inspect.isclass(member):
            for method, function in sorted(vars(member).items()):
                if not method.startswith("_") and callable(function) and (line := first_line(function)):
                    yield f"{name}.{method}", line


def first_line(member) -> str:
    """The first sentence of a docstring, without the signature that C functions put before it; empty if it says too little."""
    text = member.__doc__ if isinstance(member.__doc__, str) else ""
    paragraph = text.strip().split("\n\n")[0]
    if re.match(r"[\w.]+\(.*\)( ->.*)?\s*$", paragraph, re.DOTALL):
        paragraph = text.strip().partition("\n\n")[2].split("\n\n")[0]
    line = re.sub(r"^[\w.]+\([^)]*\)\s*(->[^\n]*?)?(--|:|\n)\s*", "", paragraph)
    line = re.split(r"\.(?:\s|$)", " ".join(line.split()))[0]
    return line if 4 <= len(line.split()) <= 30 and "(" not in line else ""


def _fact(name, line):
    bare = name.rsplit(".", 1)[-1]
    kind = "class" if bare[0].isupper() else "method" if name[0].isupper() else "function"
    right = frozenset({name})
    return Fact(
        "library", f"api {bare}", f"What in Python's standard library is this? {line}.", name, right, group=(kind,)
    )
