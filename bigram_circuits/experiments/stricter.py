"""The stricter tests of a mask, together: its worst case, its rivals, and whether other masks compute the same.

`falsify` makes all of them for a finding; each command of them adds its own to the folder of a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bigram_circuits.experiments.rivals import Rivals, load_rivals
from bigram_circuits.experiments.same_function import SameFunction, load_same_function
from bigram_circuits.experiments.worst_case import worst_case_words
from bigram_circuits.measures.results import Curves, load_result_and_origin
from bigram_circuits.runs import LEFT_OUT, Run
from bigram_circuits.storage.files import checked_json, read_checked_json, write_text
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import check_no_link, shown

FOLDER = Path("falsify") / "stricter"
"""Where they are in the folder of a run."""
_WORST_CASE, _RIVALS, _SAME = "worst_case.json", "rivals", "same_function"
_REMEDY = "remove it and measure again"


@dataclass(frozen=True)
class StricterTests:
    """What the stricter tests of a mask found, as far as they were made."""

    worst_case: Curves | None = None
    """Of `worst_case_ablation`."""
    rivals: Rivals | None = None
    """Of `rivals`."""
    same: Mapping[str, SameFunction] = field(default_factory=dict)
    """Of `same_function`, with other masks by name: `seed-1`, `rival-1`, or the name of a run's folder."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tests that were left out, by name (`worst_case`), with the reason."""

    @property
    def says(self) -> tuple[str, ...]:
        """What each test showed, in a sentence or two."""
        return tuple(self._says())

    def _says(self) -> Iterator[str]:
        if self.worst_case is not None:
            yield worst_case_words(self.worst_case)
        if self.rivals is not None:
            yield self.rivals.verdict
        for name, one in self.same.items():
            yield f"Compared with {name}: {one.says[0].lower()}{one.says[1:]}"
        for name, reason in self.left_out.items():
            yield f"Left out: {name.replace('_', ' ')}: {reason}."

    def __bool__(self) -> bool:
        return any((self.worst_case, self.rivals, self.same, self.left_out))

    def __str__(self) -> str:
        return "\n".join(self.says)

    def save(self, folder: str | os.PathLike[str], of: Origin | None = None) -> None:
        """Write what was found to a folder, beside what other calls wrote there.

        Raises:
            OSError: If it cannot be written.
            ValueError: If the folder is a symbolic link.
        """
        folder = Path(folder)
        check_no_link(folder)
        if self.worst_case is not None:
            self.worst_case.save(folder / _WORST_CASE, of)
        if self.rivals is not None:
            self.rivals.save(folder / _RIVALS)
        for name, one in self.same.items():
            one.save(folder / _SAME / name)
        if self.left_out:
            write_text(folder / LEFT_OUT, checked_json({**self.left_out}))


def load_stricter(folder: str | os.PathLike[str], run: Run | None = None) -> StricterTests:
    """Read what `StricterTests.save` wrote; empty if there is nothing.

    Args:
        folder: The folder (`falsify/stricter` in that of a run).
        run: The run that it must be of; None: any.

    Raises:
        ValueError: If a file is damaged, a symbolic link, or of another run or mask.
    """
    folder = Path(folder)
    worst_case, left_out = None, {}
    if (path := folder / _WORST_CASE).is_file():
        worst_case, of = load_result_and_origin(path, follow=False)
        if not isinstance(worst_case, Curves):
            raise ValueError(f"{str(path)!r} holds results of another kind, not those of `worst_case_ablation`")
        _check(run, path, of)
    found = load_rivals(folder / _RIVALS)
    if found is not None:
        _check(run, folder / _RIVALS, found.of)
    same: dict[str, SameFunction] = {}
    for path in sorted((folder / _SAME).glob("*/behaviour.json")):
        one = load_same_function(path.parent)
        _check(run, path, one.of)
        same[path.parent.name] = one
    if (path := folder / LEFT_OUT).is_file():
        left_out = read_checked_json(path, _REMEDY)
        wrong = next((reason for reason in left_out.values() if not isinstance(reason, str)), None)
        if wrong is not None:
            raise ValueError(f"{str(path)!r} is damaged: a reason should be text, not {shown(wrong)}; {_REMEDY}")
    return StricterTests(worst_case, found, same, left_out)


def _check(run: Run | None, path: Path, of: Origin | None) -> None:
    if run is not None:
        run.check_origin(path, of, _REMEDY)
