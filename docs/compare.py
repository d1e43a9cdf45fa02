"""The result of `make compare` in compare.md.

python docs/compare.py runs/compare/results.json    keep its numbers in compare.json, and write the page's table
python docs/compare.py                              only the table, from compare.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastguard.compare.text import markdown

HERE = Path(__file__).parent
KEPT, PAGE = HERE / "compare.json", HERE / "compare.md"
BEGIN, END = "<!-- result: begin -->\n", "<!-- result: end -->"


def without_runs(results: dict[str, Any]) -> dict[str, Any]:
    """What the table needs: the numbers of each arm, without those of each run."""
    return {name: value for name, value in results.items() if name != "runs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="results.json of a comparison")
    results = parser.parse_args().results
    if results is not None:
        KEPT.write_text(json.dumps(without_runs(json.loads(results.read_text())), indent=1) + "\n")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}{markdown(json.loads(KEPT.read_text()))}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
