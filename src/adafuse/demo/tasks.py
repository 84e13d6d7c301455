"""Three small domains made on the spot: arithmetic word problems, executed Python expressions, unit conversion.

Every answer is computed: by integer arithmetic, by evaluating the expression, by an exact factor. What is held out:

- arithmetic: whole sentence templates, and number combinations: a test item's (operation, numbers) is in no training
  item, in either order of the numbers, and its template is used by no training item.
- python: the test words occur in no training expression, and no test expression occurs in training.
- conversion: (from, to, amount); the pair of units is known from training, the amount with it is not.

Made so that an echo of the prompt never contains the answer (`scoring` could not tell it from one).
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAINS = ("arithmetic", "python", "conversion")
INSTRUCTION = " Answer with the result only."

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Mia", "Noah")
THINGS = ("apples", "coins", "stamps", "pencils", "books", "marbles", "cards", "shells", "buttons", "stickers", "eggs")
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
RESULT = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}

WORDS = tuple(
    ["cat", "dog", "sun", "map", "pen", "cup", "hat", "box", "car", "bus", "red", "blue", "green", "lamp", "tree", "bird", "fish", "milk", "rice", "rain", "snow", "wind", "star", "moon", "hand", "door", "wall", "road", "boat", "ship", "king", "rose", "leaf", "seed", "farm", "ring", "song", "game", "book", "desk", "chair", "table", "house", "horse", "mouse", "bread", "apple", "lemon", "stone", "water", "river", "cloud", "plant", "glass", "paper", "music", "train", "plane", "night", "light", "heart", "world"]
)

# (from, to, factor): one `from` is `factor` times one `to`, exactly.
FACTORS = (
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000), ("tonnes", "kilograms", 1000), ("litres", "millilitres", 1000),
    ("metres", "millimetres", 1000), ("euros", "cents", 100), ("hectares", "square metres", 10000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("years", "months", 12), ("feet", "inches", 12), ("yards", "feet", 3), ("pounds", "ounces", 16),
    ("gallons", "quarts", 4), ("dozens", "pieces", 12), ("centuries", "years", 100), ("decades", "years", 10),
)
QUESTIONS = ("Convert {n} {source} to {target}.", "How many {target} are {n} {source}?", "Express {n} {source} in {target}.")


@dataclass(frozen=True)
class Item:
    """One question. key: what is held out, (kind, *operands): equal keys have equal answers."""

    domain: str
    prompt: str
    answer: str
    key: tuple


def make_tasks(seed: int, train_per_domain: int, test_per_domain: int) -> tuple[list[Item], list[Item]]:
    raise NotImplementedError
