"""lexical: definitions, synonyms and hypernyms of WordNet 3.0. Key: the word.

Only the first sense of a word is asked for, and words that share a synset are in the same split. Hypernyms: the choices are
neighbours in the taxonomy, at the same depth and in the same lexicographer file, and none is an ancestor of the word in any of
its senses.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

from .items import Fact, from_facts, hints
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
    asked = {}
    for sense, synset in synsets.items():
        words = [word for word in synset.words if (word.casefold(), *sense) in known and usable(word)]
        if words:
            asked[sense] = words
    units, facts = connected(asked), []
    common = {word for word, *_ in known}
    for sense, words in asked.items():
        for word in words:
            facts += _synonym(word, sense, synsets, senses, units[sense], common)
        if words[0] == synsets[sense].words[0]:
            facts += _definition(words[0], sense, synsets, units[sense])
            facts += _hypernym(words[0], sense, synsets, senses, units[sense])
    return facts


def usable(word):
    return word.replace(" ", "").isalpha() and word.islower() and len(word) > 2 and word.count(" ") < 2


def connected(asked) -> dict:
    """sense -> a name of all senses that it is linked to by words they share, and those by theirs: what goes into one split."""
    holders = {}
    for sense, words in asked.items():
        for word in words:
            holders.setdefault(word, []).append(sense)
    units = {}
    for start in sorted(asked):
        ahead = [start]
        while ahead:
            sense = ahead.pop()
            if sense not in units:
                units[sense] = " ".join(start)
                ahead += [other for word in asked[sense] for other in holders[word]]
    return units


def _name(pos):
    return {"adj": "adjective", "adv": "adverb"}.get(pos, pos)


def _definition(word, sense, synsets, unit):
    synset = synsets[sense]
    if hints(synset.definition, word) or not 3 <= len(synset.definition.split()) <= 25:
        return []
    prompt = f"Which {_name(synset.pos)} means: {synset.definition}?"
    group = (synset.pos, synset.file)
    return [Fact("definition", word, prompt, word, frozenset(synset.words), group, unit=unit)]


def _synonym(word, sense, synsets, senses, unit, common):
    synset = synsets[sense]
    others = [other for other in synset.words if other in common and usable(other) and not hints(word, other)]
    if not others:
        return []
    right = {text for own in senses[word] for text in synsets[own].words}
    prompt = f'Which {_name(synset.pos)} has the same meaning as "{word}"?'
    group = (synset.pos, synset.file)
    return [Fact("synonym", word, prompt, others[0], frozenset(right), group, unit=unit)]


def _hypernym(word, sense, synsets, senses, unit):
    path = ancestors(sense, synsets)
    if sense[0] != "noun" or not path or not usable(synsets[path[0]].words[0]):
        return []
    parent = synsets[path[0]]
    right = {text for own in senses[word] for above in [own, *ancestors(own, synsets)] for text in synsets[above].words}
    near = tuple(offset for _, offset in reversed(path))  # from the root downwards: neighbours share a beginning
    prompt = f'What is "{word}" a kind of?'
    return [Fact("hypernym", word, prompt, parent.words[0], frozenset(right), (parent.file, len(path)), near, unit)]


def ancestors(sense, synsets):
    """All hypernyms of a sense, those by the first pointers, then those by others."""
    found, ahead = [], list(synsets[sense].hypernyms)
    while ahead:
        above = ahead.pop(0)
        if above not in found:
            found.append(above)
            ahead = [*synsets[above].hypernyms, *ahead]
    return found
