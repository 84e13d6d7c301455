"""Multiple-choice items of all domains as token ids, tokenised once and kept in a file. Knows nothing of batches or models.

The file holds all that a study needs of the domains, and like them it stays out of git: some come from dictionaries under the GPL.

Training and evaluation share the format of `adafuse eval`: the ids of the prompt (`adafuse.data.prompt_ids`), then those of one choice,
tokenised apart; no end-of-text token, in either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from adafuse.data import prompt_ids, read_jsonl
from adafuse.evaluation import read_choices

SPLITS = ("train", "validation", "test")
CHOICES = 4


@dataclass(frozen=True, eq=False)
class Split:
    """n items of one split, all domains one after the other.

    prompts [*] int32 and prompt_ends [n]: the ids of all prompts in a row, and where each ends; choices [*] and choice_ends [4 n]
    likewise. answers [n]: the right choice, 0 to 3. domains [n]: index of the domain. clusters [n]: items with the same number may
    depend on each other, see `_clusters`.
    """

    prompts: np.ndarray
    prompt_ends: np.ndarray
    choices: np.ndarray
    choice_ends: np.ndarray
    answers: np.ndarray
    domains: np.ndarray
    clusters: np.ndarray

    def __len__(self):
        return len(self.answers)

    def prompt(self, item: int) -> np.ndarray:
        return _piece(self.prompts, self.prompt_ends, item)

    def choice(self, item: int, choice: int) -> np.ndarray:
        return _piece(self.choices, self.choice_ends, CHOICES * item + choice)

    def pairs(self, right_only: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """(prompt ids, choice ids): of the right choice of each item, or of all four, item by item."""
        if right_only:
            return [(self.prompt(i), self.choice(i, answer)) for i, answer in enumerate(self.answers)]
        return [(self.prompt(i), self.choice(i, c)) for i in range(len(self)) for c in range(CHOICES)]

    def order_hash(self) -> str:
        """Names the items and their order: two results with the same hash can be compared item by item."""
        digest = hashlib.sha256()
        for field in fields(self):
            digest.update(np.ascontiguousarray(getattr(self, field.name)).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Groups:
    """What a report needs of a split, without any of its text: names of the domains, `order_hash` of the items, and for each item [n] the
    index of its domain and the number of its cluster."""

    names: tuple[str, ...]
    order: str
    domains: np.ndarray
    clusters: np.ndarray

    @classmethod
    def of(cls, items: Items, split: Split) -> Groups:
        return cls(items.names, split.order_hash(), split.domains, split.clusters)

    @classmethod
    def from_json(cls, read: dict) -> Groups:
        return cls(tuple(read["names"]), read["order"], np.array(read["domains"]), np.array(read["clusters"]))

    def to_json(self) -> dict:
        numbers = {"domains": self.domains.tolist(), "clusters": self.clusters.tolist()}
        return {"names": list(self.names), "order": self.order, **numbers}

    def __len__(self):
        return len(self.domains)


@dataclass(frozen=True, eq=False)
class Items:
    """All splits of all domains. names: the domains, sorted. vocabulary: hash of the tokenizer's."""

    names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    vocabulary: str

    @property
    def source(self) -> str:
        """Names the items that trials have: studies with the same train on the same and choose by the same. Test has a hash of its own."""
        hashes = [getattr(self, split).order_hash() for split in ("train", "validation")]
        return hashlib.sha256(" ".join([*self.names, *hashes]).encode()).hexdigest()[:16]

    def check_tokenizer(self, tokenizer):
        """ValueError if the ids are not of this tokenizer."""
        if _vocabulary(tokenizer) != self.vocabulary:
            raise ValueError("the items were tokenised for another base; make them anew with `items --base`")


def make_items(data, tokenizer, path) -> Items:
    """The items of the folders data/<domain>/{train,validation,test}.jsonl, also written to the file `path`.

    Raises ValueError for a folder without domains, a domain without one of its files, an item without four choices or without a key.
    """
    names = _domains(data)
    parts = {split: [_read_file(Path(data) / name / f"{split}.jsonl") for name in names] for split in SPLITS}
    splits = {split: _encode(part, tokenizer) for split, part in parts.items()}
    items = Items(names, **splits, vocabulary=_vocabulary(tokenizer))
    _write(path, items)
    return items


def _domains(data):
    names = tuple(sorted(path.parent.name for path in Path(data).glob("*/train.jsonl")))
    if not names:
        raise ValueError(
            f"{data} has no domain: expected folders with train.jsonl, as benchmarks/domains/build.py writes"
        )
    for name in names:
        for split in SPLITS:
            if not (Path(data) / name / f"{split}.jsonl").is_file():
                raise ValueError(f"{data}/{name} has no {split}.jsonl")
    return names


def _vocabulary(tokenizer):
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:16]


def _read_file(path):
    """(items, keys) of one file."""
    items, records = read_choices(path), read_jsonl(path)
    for (line, record), item in zip(records, items, strict=True):
        if len(item.choices) != CHOICES or not isinstance(record.get("key"), str):
            raise ValueError(f'{path}, line {line}: needed are {CHOICES} choices and a "key"')
    return items, [record["key"] for _, record in records]


def _encode(parts, tokenizer) -> Split:
    """One split from (items, keys) of each domain."""
    items = [item for found, _ in parts for item in found]
    texts = [choice for item in items for choice in item.choices]
    choices = tokenizer(texts, add_special_tokens=False).input_ids
    if not all(choices):
        raise ValueError(f"the tokenizer makes no token of a choice: {texts[choices.index([])]!r}")
    prompts, prompt_ends = _joined([prompt_ids(tokenizer, item.prompt) for item in items])
    domains = [domain for domain, (found, _) in enumerate(parts) for _ in found]
    keys = [key for _, found in parts for key in found]
    return Split(
        prompts,
        prompt_ends,
        *_joined(choices),
        answers=np.array([item.answer for item in items], dtype=np.int32),
        domains=np.array(domains, dtype=np.int32),
        clusters=_clusters(domains, keys, [item.choices for item in items]),
    )


def _clusters(domains, keys, choices):
    """[n] int32: the items that ask about the same four choices in the same order are one cluster; the others go by their key."""
    shared = Counter(zip(domains, choices, strict=True))
    names = [
        (domain, four if shared[domain, four] >= CHOICES else key)
        for domain, key, four in zip(domains, keys, choices, strict=True)
    ]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], dtype=np.int32)


def _joined(lists):
    return np.concatenate(lists).astype(np.int32), np.cumsum([len(ids) for ids in lists]).astype(np.int32)


def _piece(ids, ends, i):
    return ids[ends[i - 1] if i else 0 : ends[i]]


def _write(path, items):
    tensors = {
        f"{split}.{field.name}": getattr(getattr(items, split), field.name)
        for split in SPLITS
        for field in fields(Split)
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, draft, metadata={"names": json.dumps(items.names), "vocabulary": items.vocabulary})
    draft.replace(path)


def read_items(path) -> Items:
    """The items that `make_items` wrote. ValueError if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing; make it with `python benchmarks/accuracy/study.py items`")
    with safe_open(path, framework="numpy") as file:
        splits = {
            split: Split(**{field.name: file.get_tensor(f"{split}.{field.name}") for field in fields(Split)})
            for split in SPLITS
        }
        return Items(tuple(json.loads(file.metadata()["names"])), **splits, vocabulary=file.metadata()["vocabulary"])
