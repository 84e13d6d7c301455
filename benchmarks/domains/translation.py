"""translation: English words into Spanish, French and German, from FreeDict's dictionaries. Key: the English word.

Words of the small Spanish and French dictionaries only (the German one has technical terms by the hundred thousand), each
translated by one word. A choice is wrong if the dictionary gives it for no sense of the word.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from .items import Fact, from_facts
from .sources import debian

DOMAIN = "translation"
LANGUAGES = {"spa": "Spanish", "fra": "French", "deu": "German"}
DEBIAN = tuple(f"dict-freedict-eng-{code}" for code in LANGUAGES)
MOST_MEANINGS = 5
HEADWORD = re.compile(r"([a-z][a-z-]{2,}) /[^/]*/(?: <[^>]*>)?$")


def build(seed, counts):
    folders = {code: debian(f"dict-freedict-eng-{code}") / "usr" / "share" / "dictd" for code in LANGUAGES}
    dictionaries = {code: read(folder / f"freedict-eng-{code}.dict.dz") for code, folder in folders.items()}
    return from_facts(DOMAIN, make_facts(dictionaries), seed, counts)


def read(path: Path) -> dict[str, list[str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return parse(file)


def parse(lines) -> dict[str, list[str]]:
    """English word -> its translations, in the dictionary's order.

    An entry is a line "word /pronunciation/" and lines of translations after it, up to the first blank or indented one or
    the next entry.
    """
    words, current = {}, None
    for line in lines:
        line = line.rstrip("\n")
        if re.match(r"\S.* /[^/]*/", line):
            word = HEADWORD.match(line)
            current = words.setdefault(word[1], []) if word else None
        elif not line.strip() or line[0] == " ":
            current = None
        elif current is not None:
            current += translations(line)
    return words


def translations(line: str) -> list[str]:
    """The translations in a line such as '2. Lauf <masc>, Rennen <neut> [sport]'."""
    line = re.sub(r"<[^>]*>|\[[^]]*\]|\([^)]*\)|\{[^}]*\}|/[^/]*/", "", re.sub(r"^\d+\. ", "", line))
    return [text.strip() for text in re.split("[,;]", line) if text.strip()]


def make_facts(dictionaries) -> list[Fact]:
    common = set().union(*(words for code, words in dictionaries.items() if code != "deu"))
    facts = []
    for code, words in dictionaries.items():
        known = {text.casefold() for texts in words.values() for text in texts}
        for word in sorted(common & words.keys()):
            answer = best(words[word], known if code == "spa" else set())
            if answer and not echoes_loosely(word, answer):
                prompt = f'What is the {LANGUAGES[code]} word for "{word}"?'
                group = (answer[0].isupper(), ending(answer))
                facts.append(Fact(LANGUAGES[code], word, prompt, answer, frozenset(words[word]), group))
    return facts


def best(answers, known) -> str:
    """The translation given most often, and of these the first; none if there are so many that the word has many meanings."""
    words = [text for text in answers if len(text) > 2 and text.isalpha() and not run_together(text, known)]
    return max(words, key=words.count) if words and len(set(answers)) <= MOST_MEANINGS else ""


def run_together(text, known):
    """Whether a text looks like several words without the spaces between them, as in the Spanish dictionary: carnedevaca."""
    if len(text) > 13 or re.sub("^(en|al|por|con|de|sin|dos)(?=.{5})", "-", text).partition("-")[2] in known:
        return True
    for cut in range(4, len(text) - 3):
        rest = re.sub("^(de|del|a|al|en|con|el|la|las|los)(?=....)", "", text[cut:])
        if text[:cut] in known and any(rest[:-1] + last in known for last in (*"aeo", rest[-1])):
            return True
    return False


def ending(word):
    """The kind of word, roughly, as its last letters tell: infinitives with infinitives, adverbs with adverbs."""
    return next(
        (end for end in ("mente", "ment", "ar", "er", "ir", "en", "re", "lich", "ig") if word.endswith(end)), ""
    )


def echoes_loosely(word, answer):
    """Whether a translation can be read off the word: the same first four letters."""
    return word[:4].casefold() == answer[:4].casefold()
