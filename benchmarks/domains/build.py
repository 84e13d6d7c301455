"""Builds the files of all domains: train, validation and test of each, as `adafuse eval` reads them.

    python benchmarks/domains/build.py --out benchmarks/domains/data --seed 0 [--control] [--domains math code]

The same seed and the same versions of the sources (manifest.json has them) give the same bytes. With --control, a reader
that sees only the choices is trained and tested on each domain; more than 35 % is an error.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the folder of this package, not the package

from domains import coding, geography, lexical, maths, packages, science, translation
from domains.items import SPLITS, broken_rules, write_items
from domains.sources import SourceError, debian_version, pypi_version

DOMAINS = {module.DOMAIN: module for module in (lexical, geography, maths, coding, translation, science, packages)}


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--train", type=int, default=4000, help="training items a domain, a multiple of 4")
    parser.add_argument(
        "--held-out", type=int, default=2000, help="items each for validation and test, a multiple of 4"
    )
    parser.add_argument("--control", action="store_true", help="score a reader that sees the choices only")
    return parser.parse_args(arguments)


def build(name, seed, counts, out: Path) -> dict[str, list[dict]]:
    """One domain's items, checked and written to out/name/*.jsonl."""
    splits = DOMAINS[name].build(seed, counts)
    broken = broken_rules(splits)
    assert not broken, f"{name}: {len(broken)} rules broken, the first: {broken[0]}"
    for split in SPLITS:
        (out / name).mkdir(parents=True, exist_ok=True)
        write_items(out / name / f"{split}.jsonl", splits[split])
    sizes = {split: len(splits[split]) for split in SPLITS}
    fewer = "" if sizes == counts else "   fewer than asked for: the source has no more"
    print(f"{name:12}" + "".join(f"{sizes[split]:8} {split}" for split in SPLITS) + fewer, flush=True)
    return splits


def versions(name) -> dict[str, str]:
    """Versions of what a domain is built from."""
    module = DOMAINS[name]
    found = {package: debian_version(package) for package in getattr(module, "DEBIAN", ())}
    found |= {package: pypi_version(package) for package in getattr(module, "PYPI", ())}
    return found | (module.versions() if hasattr(module, "versions") else {})


def control(built, seed, out: Path) -> bool:
    """Prints and writes the accuracy of the choices-only reader; whether it is under the limit everywhere."""
    import record

    from domains.control import CHANCE, LIMIT, choices_only, overlap

    print(
        f"\n{'accuracy':12}{'random':>14}{'choices only':>14}{'most overlap':>14}    (choices only: limit {LIMIT:.0%})"
    )
    rows = []
    for name, splits in built.items():
        case = {"seed": seed, "items": len(splits["test"]), "python": platform.python_version(), **versions(name)}
        found = {"random": CHANCE, "choices only": choices_only(splits), "most overlap": overlap(splits["test"])}
        above = "    ABOVE THE LIMIT" if found["choices only"] >= LIMIT else ""
        print(f"{name:12}" + "".join(f"{value:14.1%}" for value in found.values()) + above, flush=True)
        rows.append({"name": f"domains/{name}", "case": case, **{key: round(value, 6) for key, value in found.items()}})
    write_json(out / "control.json", {"env": record.environment(), "rows": rows})
    return all(row["choices only"] < LIMIT for row in rows)


def write_json(path, document):
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main(arguments=None) -> int:
    options = parse(arguments)
    counts = {"train": options.train, "validation": options.held_out, "test": options.held_out}
    if any(count < 4 or count % 4 for count in counts.values()):
        raise SystemExit(f"counts must be multiples of 4, got {counts}")
    built, manifest = {}, {"seed": options.seed, "python": platform.python_version(), "domains": {}}
    for name in options.domains:
        try:
            built[name] = build(name, options.seed, counts, options.out)
        except SourceError as error:
            raise SystemExit(f"{name}: {error}") from error
        sizes = {split: len(items) for split, items in built[name].items()}
        manifest["domains"][name] = {"items": sizes, "sources": versions(name)}
    write_json(options.out / "manifest.json", manifest)
    return 0 if not options.control or control(built, options.seed, options.out) else 1


if __name__ == "__main__":
    sys.exit(main())
