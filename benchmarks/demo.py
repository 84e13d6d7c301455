"""Held-out accuracy of the demo, before and after training: collected from the folders it left, one a seed.

for seed in 0 1 2; do adafuse demo --seed $seed --out demo-$seed; done
python benchmarks/demo.py demo-0 demo-1 demo-2 --out benchmarks/results/cpu/demo.json
"""

import argparse
import json
from pathlib import Path

import record


def rows_of(folder):
    """Two rows a domain: the share of right answers before and after."""
    found = json.loads((folder / "demo.json").read_text())
    case = {
        "model": "smollm2-135m-instruct",
        "seed": found["seed"],
        "steps": found["steps"],
        "batch": found["batch_size"],
    }
    for domain, results in found["held_out"].items():
        for when, result in results.items():
            share = result["right"] / result["total"]
            yield {
                "name": f"demo/{when}",
                "case": {**case, "domain": domain, "items": result["total"]},
                **dict.fromkeys(("median", "p20", "p80"), share),
                "unit": "share of right answers",
                "vs": None,
                "ratio": None,
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that `adafuse demo` wrote")
    parser.add_argument("--out", required=True, help="JSON file to write")
    args = parser.parse_args()
    record.write(args.out, [row for folder in args.folders for row in rows_of(folder)])


if __name__ == "__main__":
    main()
