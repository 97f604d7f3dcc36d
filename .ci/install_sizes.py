"""Write the sizes of the extras into the README's table: the files of their packages.

    .venv/bin/python .ci/install_sizes.py           write them
    .venv/bin/python .ci/install_sizes.py --check   exit code 1 if one is off by more than 5 %

Sizes are those of the packages that are installed in this environment, which must be that of
`make test`, with the versions of constraints.txt. Bytecode, which pip and Python add, and this
package are not counted. A row with a package that is not installed is "not measured".
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "coprs-deploy"
ROW = re.compile(r'^(\| `"\.\[([\w,-]+)\]"` \|) ([^|]+) \|', re.MULTILINE)
NOT_MEASURED = "not measured"
TOLERANCE = 0.05


def required_packages(name: str, extras: Collection[str]) -> set[str]:
    """Return the packages that a package needs here with some extras, itself not included.

    Raises:
        importlib.metadata.PackageNotFoundError: one is not installed.
    """
    found: set[tuple[str, tuple[str, ...]]] = set()
    waiting = [(name, tuple(extras))]
    while waiting:
        package, chosen = waiting.pop()
        for line in importlib.metadata.distribution(package).requires or ():
            needed = Requirement(line)
            marker = needed.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in chosen or ("",)):
                continue
            entry = (canonicalize_name(needed.name), tuple(sorted(needed.extras)))
            if entry not in found:
                found.add(entry)
                waiting.append(entry)
    return {package for package, _ in found} - {canonicalize_name(name)}


@cache
def package_bytes(name: str) -> int:
    """Return the size of a package's files without bytecode."""
    files = importlib.metadata.distribution(name).files or ()
    paths = (Path(str(file.locate())) for file in files if file.suffix != ".pyc")
    return sum(path.stat().st_size for path in paths if path.is_file())


def extras_bytes(extras: str) -> int | None:
    """Return the size of what comma-separated extras bring; None if a package is missing."""
    try:
        return sum(map(package_bytes, required_packages(PACKAGE, extras.split(","))))
    except importlib.metadata.PackageNotFoundError:
        return None


def format_size(num_bytes: int | None) -> str:
    """Format a size with two digits, as in ``340 MB`` and ``1.2 GB``."""
    if num_bytes is None:
        return NOT_MEASURED
    if num_bytes < 995e6:
        return f"{10 * round(num_bytes / 1e7)} MB"
    return f"{num_bytes / 1e9:.1f} GB"


def with_sizes(text: str, measure: Callable[[str], int | None]) -> str:
    """Put sizes into the rows of a table whose first cell names extras."""
    return ROW.sub(lambda row: f"{row[1]} {format_size(measure(row[2]))} |", text)


def stale_rows(text: str, measure: Callable[[str], int | None]) -> list[str]:
    """Describe the rows whose size is off by more than the tolerance."""
    stale = []
    for _, extras, written in ROW.findall(text):
        found = measure(extras)
        expected = _read_size(written)
        if (found is None) != (expected is None) or (
            found and expected and abs(found - expected) > TOLERANCE * found + 5e6
        ):
            stale.append(f"[{extras}]: {written.strip()} is written, {format_size(found)} measured")
    return stale


def _read_size(text: str) -> float | None:
    if text.strip() == NOT_MEASURED:
        return None
    number, unit = text.split()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def main(arguments: Sequence[str]) -> int:
    """Write the sizes, or list those that are out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(arguments)
    readme = Path(__file__).resolve().parents[1] / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not given.check:
        readme.write_text(with_sizes(text, extras_bytes), encoding="utf-8")
        return 0
    stale = stale_rows(text, extras_bytes)
    for line in stale:
        print(line)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
