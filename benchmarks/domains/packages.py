"""packages: the section, and the name, of a Debian package with a given short description. Key: the source package.

Descriptions that occur twice, or contain the answer, are left out; names are asked of plain words only.
"""

from __future__ import annotations

import hashlib
import re

from .items import Fact, from_facts, hints
from .sources import available

DOMAIN = "packages"
# Sections of packages that are described by the package they belong to.
WITHOUT_SUBJECT = (
    "debug",
    "oldlibs",
    "metapackages",
    "tasks",
    "localization",
    "introspection",
    "embedded",
    "education",
)


def build(seed, counts):
    return from_facts(DOMAIN, make_facts(parse(available())), seed, counts)


def versions() -> dict[str, str]:
    """Debian's list has no version of its own, and changes with every point release."""
    return {"apt-cache dumpavail, sha256": hashlib.sha256(available().encode()).hexdigest()}


def parse(text: str) -> list[dict]:
    """The fields of each package of Debian's list, paragraph by paragraph; lines that continue a field are left out."""
    paragraphs = re.split(r"\n(?=Package: )|\n\n+", text)
    return [
        dict(re.findall(r"^(Package|Source|Section|Description): (.+)$", part, re.MULTILINE)) for part in paragraphs
    ]


def make_facts(packages) -> list[Fact]:
    packages = {p["Package"]: p for p in packages if {"Package", "Section", "Description"} <= p.keys()}
    uses = {}
    for package in packages.values():
        uses.setdefault(_subject(package).casefold(), set()).add(package["Package"])
    facts = []
    for name, package in packages.items():
        section = package["Section"].split("/")[-1]
        if section in WITHOUT_SUBJECT or len(uses[_subject(package).casefold()]) > 1:
            continue
        facts += _facts(name, section, package)
    return facts


def _subject(package):
    """What the short description is about: without a part in brackets, or after a dash, at its end."""
    return re.sub(r"\s*(\(.*\)|\s--?\s.*)$", "", package["Description"])


def _facts(name, section, package):
    text = package["Description"].rstrip(".")
    if len(text.split()) < 3 or package["Section"] != section:
        return []
    source = package.get("Source", name).split(" ")[0]
    facts = [Fact("section", source, f"In which section of Debian is this package: {text}?", section, near=(0,))]
    telling = len(text.split()) > 3 and section not in ("libs", "libdevel", "doc")
    if telling and re.fullmatch(r"[a-z][a-z0-9-]{2,15}", name):
        prompt = f"Which Debian package is this: {text}?"
        if not hints(prompt, name):
            facts.append(Fact("name", source, prompt, name, group=(section,), near=_form(name)))
    return facts


def _form(name):
    """What packages of a kind have in common, and the length: lib...-perl, node-..., python3-..."""
    parts = name.split("-")
    return (parts[0][:3], parts[-1] if len(parts) > 1 else "", len(name) // 3)
