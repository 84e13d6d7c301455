"""lexical: definitions, synonyms and hypernyms of WordNet 3.0. Key: the first word of the synset.

Only the first sense of a word is asked for. Hypernyms: the choices are neighbours in the taxonomy, at the same depth and in
the same lexicographer file, and none is an ancestor of the word in any of its senses.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

from .items import Fact, from_facts
from .sources import debian

DOMAIN = "lexical"
DEBIAN = ("wordnet-base",)
POS = ("noun", "verb", "adj", "adv")
Synset = namedtuple("Synset", "pos file words hypernyms definition")


def build(seed, counts):
    return from_facts(DOMAIN, read(debian(DEBIAN[0]) / "usr" / "share" / "wordnet"), seed, counts)


def read(folder: Path) -> list[Fact]:
    """Facts of a folder with WordNet's data.* and index.* files."""
    synsets, senses, known = {}, {}, set()
    for pos in POS:
        synsets |= dict(map(parse_synset, _lines(folder / f"data.{pos}")))
        for line in _lines(folder / f"index.{pos}"):
            word, offsets, tagged = parse_index(line)
            senses.setdefault(word, []).extend((pos, offset) for offset in offsets)
            if tagged:
                known.add((word, pos, offsets[0]))
    return make_facts(synsets, senses, known)


def _lines(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("  ")]  # the licence is indented


def parse_synset(line):
    """((pos, offset), Synset) of a line of data.*: offset file type count (word id)* count (pointer)* ... | gloss"""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    pos = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}[fields[2]]
    count = int(fields[3], 16)
    words = [plain(word) for word in fields[4 : 4 + 2 * count : 2]]
    pointers = fields[5 + 2 * count :]
    hypernyms = [(pos, target) for sign, target in zip(pointers[::4], pointers[1::4], strict=False) if sign == "@"]
    return (pos, fields[0]), Synset(pos, fields[1], words, hypernyms, definition(gloss))


def plain(word):
    """A word as it is written: spaces for underscores, no marker of an adjective's position."""
    return word.split("(")[0].replace("_", " ")


def definition(gloss):
    """The part of a gloss before the first example, without notes in brackets at the beginning."""
    text = gloss.strip().split('; "')[0].strip().rstrip(";:, ")
    return text.partition(") ")[2] if text.startswith("(") else text


def parse_index(line):
    """(word, offsets of its senses, number of senses that were seen in tagged text) of a line of index.*."""
    fields = line.split()
    count = int(fields[2])
    return plain(fields[0]), fields[-count:], int(fields[-count - 1])


def make_facts(synsets, senses, known):
    """Facts of all words that were seen in tagged text: rare ones would not be known to anybody."""
    facts = []
    for (pos, offset), synset in synsets.items():
        key = synset.words[0].casefold()
        familiar = [word for word in synset.words if (word.casefold(), pos, offset) in known and usable(word)]
        for word in familiar:
            facts += _synonym(key, word, synset, synsets, senses)
        if familiar and familiar[0] == synset.words[0]:
            facts += _definition(key, synset)
            facts += _hypernym(key, (pos, offset), synsets, senses)
    return facts


def usable(word):
    return word.replace(" ", "").isalpha() and word.islower() and len(word) > 2 and word.count(" ") < 2


def _definition(key, synset):
    stem = key[:5]
    if stem in synset.definition.casefold() or not 3 <= len(synset.definition.split()) <= 25:
        return []
    prompt = f"Which {_name(synset.pos)} means: {synset.definition}?"
    return [
        Fact("definition", key, prompt, synset.words[0], frozenset(synset.words), group=(synset.pos, synset.file)),
    ]


def _name(pos):
    return {"adj": "adjective", "adv": "adverb"}.get(pos, pos)


def _synonym(key, word, synset, synsets, senses):
    others = [other for other in synset.words if other != word and usable(other) and other[:4] != word[:4]]
    if not others:
        return []
    right = {text for sense in senses[word.casefold()] for text in synsets[sense].words}
    prompt = f'Which {_name(synset.pos)} has the same meaning as "{word}"?'
    return [Fact("synonym", key, prompt, others[0], frozenset(right), group=(synset.pos, synset.file))]


def _hypernym(key, sense, synsets, senses):
    synset = synsets[sense]
    if synset.pos != "noun" or not synset.hypernyms:
        return []
    parent = synsets[synset.hypernyms[0]]
    path = ancestors(sense, synsets)
    right = {text for own in senses[key] for above in [own, *ancestors(own, synsets)] for text in synsets[above].words}
    prompt = f'What is "{synset.words[0]}" a kind of?'
    near = tuple(offset for _, offset in reversed(path))  # from the root downwards: neighbours share a beginning
    group = (parent.file, len(path))
    return (
        [Fact("hypernym", key, prompt, parent.words[0], frozenset(right), group, near)]
        if usable(parent.words[0])
        else []
    )


def ancestors(sense, synsets):
    """All hypernyms of a sense, those by the first pointers, then those by others."""
    found, ahead = [], list(synsets[sense].hypernyms)
    while ahead:
        above = ahead.pop(0)
        if above not in found:
            found.append(above)
            ahead = [*synsets[above].hypernyms, *ahead]
    return found
