"""What all domains share: splits by key, choices in fours that give nothing away, and the lines of a file.

The four choices of an item are the answers of four questions of one kind, each wrong for the other three questions. Either
all four questions are asked, with the same choices in the same order (`from_facts`), or one of them, each as likely as the
others (`ask_one`). So whatever can be said about the choices without the question is true of right and wrong ones alike.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from itertools import combinations

SPLITS = ("train", "validation", "test")
ENDING = " Answer:"
REACH = 400  # how many facts are tried for a place in a four


@dataclass(frozen=True)
class Fact:
    """A question with its answer. Only facts of the same kind and group are mixed into one set of choices.

    key: what the answer depends on, never in two splits. unit: what is put into a split as a whole; the key, if left empty.
    right: all answers that would be right, `answer` among them or not. near: choices come from facts with close values of it;
    the length of the answer, if left empty.
    """

    kind: str
    key: str
    prompt: str
    answer: str
    right: frozenset = frozenset()
    group: tuple = ()
    near: tuple = ()
    unit: str = ""

    def fits(self, other: Fact) -> bool:
        """Whether each answer is wrong for the other question, and neither is given away by it."""
        return self.key != other.key and not (self._allows(other) or other._allows(self))

    def _allows(self, other):
        right = {text.casefold() for text in self.right} | {self.answer.casefold()}
        return other.answer.casefold() in right or echoes(self.prompt + ENDING, other.answer)


def echoes(prompt: str, answer: str) -> bool:
    """Whether the prompt contains the answer: anywhere, or as a word of its own if it has one or two characters."""
    prompt, answer = prompt.casefold(), answer.casefold()
    if len(answer) > 2:
        return answer in prompt
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", prompt) is not None


def hints(prompt: str, name: str, letters: int = 4) -> bool:
    """Whether the prompt contains a part of a name such as "python3-lens" or "compare_to", or so many letters of one."""
    parts = [part.casefold() for part in re.findall(r"[A-Z]?[a-z]{3,}|[A-Z]{3,}", name)]
    pieces = {part[start : start + letters] for part in parts for start in range(max(1, len(part) - letters + 1))}
    return any(piece in prompt.casefold() for piece in pieces)


def split_of(unit: str, seed: int) -> str:
    """The split of a unit: train for one half of all, validation and test for a quarter each."""
    return ("train", "train", "validation", "test")[hashlib.sha256(f"{seed} {unit}".encode()).digest()[0] % 4]


def generator(*words) -> random.Random:
    """A generator of its own, seeded by text, so that domains and splits do not shift each other."""
    return random.Random(" ".join(map(str, words)))


def make_item(domain: str, key: str, prompt: str, choices, answer: int) -> dict:
    """One line of a file, as `adafuse eval` reads it."""
    return {
        "prompt": prompt + ENDING,
        "choices": [f" {choice}" for choice in choices],
        "answer": answer,
        "domain": domain,
        "key": key,
    }


def ask_one(rng, domain: str, questions) -> dict | None:
    """An item that asks one of four (key, prompt, answer). None if two answers are the same, or the prompt contains one."""
    key, prompt, right = rng.choice(questions)
    choices = [answer for _, _, answer in questions]
    if len(set(choices)) < 4 or not all(choices) or any(echoes(prompt, choice) for choice in choices):
        return None
    rng.shuffle(choices)
    return make_item(domain, key, prompt, choices, choices.index(right))


def from_facts(domain: str, facts, seed: int, counts: dict[str, int]) -> dict[str, list[dict]]:
    """Items of each split, four of each four of facts, the kinds taking turns until there are counts[split] of them."""
    facts = unambiguous(facts)
    splits = {}
    for split in SPLITS:
        rng = generator(seed, domain, split)
        mine = [fact for fact in facts if split_of(fact.unit or fact.key, seed) == split]
        fours = take_turns(make_fours(rng, mine), counts[split] // 4)
        splits[split] = [item for four in fours for item in ask_all(rng, domain, four)]
        rng.shuffle(splits[split])
    return splits


def unambiguous(facts) -> list[Fact]:
    """The facts in a fixed order, without those whose prompt is asked twice, contains the answer, or has none."""
    facts = sorted(set(facts), key=lambda fact: (fact.kind, fact.key, fact.prompt, fact.answer))
    asked = {}
    for fact in facts:
        asked[fact.prompt] = asked.get(fact.prompt, 0) + 1
    return [
        fact
        for fact in facts
        if asked[fact.prompt] == 1 and fact.answer.strip() and not echoes(fact.prompt + ENDING, fact.answer)
    ]


def make_fours(rng, facts) -> dict[str, list[tuple[Fact, ...]]]:
    """kind -> fours of facts that fit each other, each fact in one four at most; shuffled."""
    groups = {}
    for fact in facts:
        groups.setdefault((fact.kind, *fact.group), []).append(fact)
    fours = {}
    for (kind, *_), members in groups.items():
        fours.setdefault(kind, []).extend(_match(rng, members))
    for kind in fours:
        rng.shuffle(fours[kind])
    return fours


def _match(rng, facts):
    """Fours of close facts: each first one that is left takes the next three that fit; without them it is dropped."""
    rng.shuffle(facts)
    left = sorted(facts, key=lambda fact: fact.near or (len(fact.answer) // 3,))
    fours = []
    while len(left) >= 4:
        four = [left.pop(0)]
        for fact in left[:REACH]:
            if len(four) < 4 and all(fact.fits(other) for other in four):
                four.append(fact)
        if len(four) == 4:
            chosen = set(map(id, four))
            left = [fact for fact in left if id(fact) not in chosen]
            fours.append(tuple(four))
    return fours


def take_turns(pools: dict[str, list], count: int) -> list:
    """`count` entries of the pools, one of each in turn, for as long as there are any."""
    pools = {kind: list(pool) for kind, pool in sorted(pools.items())}
    taken = []
    while len(taken) < count and any(pools.values()):
        taken += [pool.pop() for pool in pools.values() if pool]
    return taken[:count]


def ask_all(rng, domain: str, four) -> list[dict]:
    """Four items with the same choices in the same order, so that each place is the right one once."""
    four = rng.sample(four, 4)
    choices = [fact.answer for fact in four]
    return [make_item(domain, fact.key, fact.prompt, choices, place) for place, fact in enumerate(four)]


def broken_rules(splits: dict[str, list[dict]]) -> list[str]:
    """What is wrong with a domain's items, in words; empty if all rules hold."""
    found = []
    for split, items in splits.items():
        for item in items:
            if len({choice.strip().casefold() for choice in item["choices"]} - {""}) != 4:
                found.append(f"{split}: not four different choices: {item}")
            if not 0 <= item["answer"] < 4:
                found.append(f"{split}: no such answer: {item}")
            if any(echoes(item["prompt"], choice.strip()) for choice in item["choices"]):
                found.append(f"{split}: the prompt contains a choice: {item}")
        if len({item["prompt"] for item in items}) != len(items):
            found.append(f"{split}: a prompt is asked twice")
    for (one, ones), (two, twos) in combinations(splits.items(), 2):
        for field in ("key", "prompt"):
            shared = {item[field] for item in ones} & {item[field] for item in twos}
            if shared:
                found.append(f"{one} and {two} share a {field}: {sorted(shared)[:3]}")
    return found


def write_items(path, items) -> None:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
