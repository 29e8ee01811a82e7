"""The registry of a page's sections: one decorated function each.

To add a section, decorate a function in one of the modules that the page imports:

    @section("circuits", "Circuits between heads")
    def circuits(run: Run, results: Results) -> Content: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bigram_circuits.report.blocks import Content, Section

LEFT_OUT = "Left out, because this section cannot be made from what the files hold"
_LONGEST = 300  # characters, of a reason


@dataclass(frozen=True)
class SectionKind:
    """A section that a page may have."""

    key: str
    """Its anchor in the page."""
    heading: str
    """Its heading."""
    tell: Callable[..., Content]
    """The function that writes it."""

    def __call__(self, *subject: object) -> Section:
        """The section about a run with its results, or about a comparison.

        Results come from files, and valid ones may still be odd: without a layer, without a number, with infinities. A
        section that cannot be written from them says so, and the rest of the page stands.
        """
        try:
            content = self.tell(*subject)
            for block in content.blocks:
                block.check()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
            return Section(self.key, self.heading, [f"{LEFT_OUT} ({reason})."])
        return Section(self.key, content.heading or self.heading, content.says, content.blocks)


class Sections:
    """The sections of one kind of page, in their order."""

    def __init__(self, first: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> None:
        """Take the keys of the first and the last sections; others come between, in the order of registration."""
        self._first, self._last = first, last
        self._by_key: dict[str, SectionKind] = {}

    def add(self, key: str, heading: str) -> Callable[[Callable[..., Content]], SectionKind]:
        """Register the decorated function as a section."""

        def register(tell: Callable[..., Content]) -> SectionKind:
            if key in self._by_key:
                raise ValueError(f"section {key!r} is already registered: {self._by_key[key].heading!r}")
            self._by_key[key] = SectionKind(key, heading, tell)
            return self._by_key[key]

        return register

    def __iter__(self) -> Iterator[SectionKind]:
        between = [key for key in self._by_key if key not in (*self._first, *self._last)]
        return iter([self._by_key[key] for key in (*self._first, *between, *self._last) if key in self._by_key])


SECTIONS = Sections(
    first=(
        "circuit", "controls", "task", "refuted", "training",
        "predicts", "units", "where", "needed", "layers", "passage", "read", "tokens", "heads", "attribution",
        "overlap", "lacks",
    ),
    last=("other", "again"),
)  # fmt: skip
"""The sections of a run's page; `report.page` imports the modules that register them."""
section = SECTIONS.add
