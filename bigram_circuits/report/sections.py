"""The registry of a page's sections: one decorated function each.

To add a section, decorate a function in one of the modules that the page imports:

    @section("circuits", "Circuits between heads")
    def circuits(run: Run, results: Results) -> Content: ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from bigram_circuits.report.blocks import Content, Section

LEFT_OUT = "Left out, because this cannot be made from what the files hold"
_LONGEST = 300  # characters, of a reason


def left_out(error: Exception) -> str:
    """A sentence that something was left out because of an error in making it."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
    return f"{LEFT_OUT} ({reason})."


@dataclass(frozen=True)
class SectionKind:
    """A section that a page may have."""

    key: str
    """Its anchor in the page."""
    heading: str
    """Its heading."""
    tell: Callable[..., Content]
    """The function that writes it."""

    group: str = ""
    """The heading that it stands under."""
    is_open: bool = True
    """Whether it is shown at once or only on request."""

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
            content = Content([left_out(error)])
        heading = content.heading or self.heading
        return Section(self.key, heading, content.says, content.blocks, self.group, self.is_open)


class Sections:
    """The sections of one kind of page, in their order."""

    def __init__(
        self, groups: Mapping[str, tuple[str, ...]] | None = None, opened: Collection[str] | None = None
    ) -> None:
        """Name the headings and, in order, the keys of the sections under each.

        Args:
            groups: An ellipsis among the keys of one group (`"..."`) stands for all sections that none names, in the
                order of registration. None: there are no groups.
            opened: Keys of the sections that are shown at once; None: all.
        """
        self._groups = {"": ("...",)} if groups is None else groups
        self._opened = opened
        self._by_key: dict[str, SectionKind] = {}

    def add(self, key: str, heading: str) -> Callable[[Callable[..., Content]], SectionKind]:
        """Register the decorated function as a section."""

        def register(tell: Callable[..., Content]) -> SectionKind:
            if key in self._by_key:
                raise ValueError(f"section {key!r} is already registered: {self._by_key[key].heading!r}")
            group = next((name for name in self._groups if key in self._groups[name]), self._rest)
            is_open = self._opened is None or key in self._opened
            self._by_key[key] = SectionKind(key, heading, tell, group, is_open)
            return self._by_key[key]

        return register

    @property
    def _rest(self) -> str:
        """The group of the sections that none names."""
        return next(name for name, keys in self._groups.items() if "..." in keys)

    def __iter__(self) -> Iterator[SectionKind]:
        named = {key for keys in self._groups.values() for key in keys}
        rest = [key for key in self._by_key if key not in named]
        keys = [key for group in self._groups.values() for one in group for key in (rest if one == "..." else [one])]
        return iter([self._by_key[key] for key in keys if key in self._by_key])


SECTIONS = Sections(
    {
        "The circuit": ("circuit", "predicts", "units", "where"),
        "How faithful it is": (
            "controls",
            "task",
            "seeds",
            "refuted",
            "worst_case",
            "rivals",
            "same_function",
            "overlap",
            "needed",
            "lacks",
        ),
        "What happens inside": ("layers", "passage", "read", "tokens", "heads", "attribution", "..."),
        "How it was made": ("training", "other", "again"),
    },
    opened=("circuit", "controls", "task", "seeds", "refuted"),
)
"""The sections of a run's page; `report.page` imports the modules that register them."""
section = SECTIONS.add
