"""math: word problems. Key: the template, a sentence that no other split has.

A family is four calculations with the same numbers; the choices are what they give, so the three wrong ones are what a wrong
calculation gives. In some items of large numbers, two of them and both again with a wrong tens digit. Every calculation has
nine templates: three for train, one for validation, five for test, so that no score hangs on a single sentence.
"""

from __future__ import annotations

from .items import SPLITS, ask_one, echoes, generator, make_item
from .stories import FAMILIES

DOMAIN = "math"
PARTS = {"train": slice(3), "validation": slice(3, 4), "test": slice(4, 9)}
NAMES = tuple(
    """
    Anna Ben Carla David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor
    """.split()  # noqa: SIM905
)
THINGS = tuple(
    """
    apples coins stamps pencils books marbles cards shells buttons stickers eggs tickets photos bottles plates
    """.split()  # noqa: SIM905
)
LARGE = 100  # from here on a number is as likely as the one 10 or 20 above
MOST_TRIES = 100  # for each item


def build(seed, counts):
    return {split: _items(generator(seed, DOMAIN, split), PARTS[split], counts[split]) for split in SPLITS}


def _items(rng, part, count):
    items, prompts = [], set()
    for _ in range(MOST_TRIES * count):
        if len(items) == count:
            return items
        item = _item(rng, part, list(FAMILIES)[len(items) % len(FAMILIES)])
        if item and item["prompt"] not in prompts:
            items.append(item)
            prompts.add(item["prompt"])
    raise ValueError(f"there are no {count} different word problems in a split; ask for fewer")


def _item(rng, part, family):
    draw, calculations = FAMILIES[family]
    numbers = draw(rng)
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS), **numbers}
    questions = []
    for calculate, templates in calculations.values():
        template = rng.choice(templates[part])
        questions.append((template, template.format(**words), calculate(**numbers)))
    if any(value <= 0 or value != int(value) for _, _, value in questions):
        return None
    if rng.random() < 0.5 and min(value for _, _, value in questions) > LARGE:
        return _with_slips(rng, rng.sample(questions, 2))
    return ask_one(rng, DOMAIN, [(key, prompt, str(int(value))) for key, prompt, value in questions])


def _with_slips(rng, two):
    """One of two questions asked, whose choices are both results and both of them off by the same tens, up or down."""
    slip = rng.choice((-20, -10, 10, 20))
    (key, prompt, right), _ = two
    values = [int(value) + off for _, _, value in two for off in (0, slip)]
    if len(set(values)) < 4 or any(echoes(prompt, str(value)) for value in values):
        return None
    rng.shuffle(values)
    return make_item(DOMAIN, key, prompt, map(str, values), values.index(int(right)))
