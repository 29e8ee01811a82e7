"""Tables that benchmarks write into pages of the documentation, between two markers."""

from collections.abc import Sequence
from pathlib import Path


def markers(name: str) -> tuple[str, str]:
    """Before and after what a command writes, for example `benchmarks/rivals.py`."""
    return f"<!-- written by {name} -->", f"<!-- end of {name} -->"


def written(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with other lines between the markers of a command."""
    before, after = markers(name)
    start, end = page.index(before) + len(before), page.index(after)
    return page[:start] + "\n\n" + "\n".join(lines) + "\n\n" + page[end:]


def write(page: Path, name: str, lines: Sequence[str]) -> None:
    """Write lines between the markers of a command into a page."""
    page.write_text(written(page.read_text(), name, lines))
