"""The table of faults in docs/faults.md, from the rows that `make test-faults` has written.

python -m tests.support.fault_table faults.csv            # is the table what the tests have seen?
python -m tests.support.fault_table faults.csv --write    # make it so
"""

import argparse
import csv
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = """\
| fault | survived | weights | forward passes repeated | seconds | what it says |
|---|---|---|---|---|---|
"""
COMPARED = 3
"""Columns, from the first, that are the same on every machine."""


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows of faults, in the order of their names."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return sorted(row for row in rows)


def format_table(rows: list[list[str]]) -> str:
    """Format rows as Markdown."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def replace_table(page: str, table: str) -> str:
    """Return the page with another table."""
    start = page.index("| fault |")
    end = page.find("\n\n", start)
    return page[:start] + table + (page[end + 1 :] if end >= 0 else "")


def main() -> int:
    """Compare or write the table."""
    parser = argparse.ArgumentParser(description="Compare the table of faults with the rows, or write it.")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows, page = read_rows(arguments.rows), PAGE.read_text()
    if arguments.write:
        PAGE.write_text(replace_table(page, format_table(rows)))
        return 0
    shown = [
        [cell.strip() for cell in line.strip("| \n").split(" | ")][:COMPARED]
        for line in page[page.index("| fault |") :].splitlines()[2:]
        if line.startswith("|")
    ]
    seen = [row[:COMPARED] for row in rows]
    for row in seen:
        if row not in shown:
            print(f"docs/faults.md lacks, or shows otherwise: {' | '.join(row)}", file=sys.stderr)
    for row in shown:
        if row not in seen:
            print(f"docs/faults.md has what no test has seen: {' | '.join(row)}", file=sys.stderr)
    return int(sorted(shown) != seen)


if __name__ == "__main__":
    sys.exit(main())
