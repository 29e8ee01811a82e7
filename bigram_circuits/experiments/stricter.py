"""The stricter tests of a mask, together: its worst case, its rivals, and whether other masks compute the same.

`falsify` makes all of them for a finding; each command of them adds its own to the folder of a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bigram_circuits.experiments.rivals import FIRST, Rivals, load_rivals
from bigram_circuits.experiments.rivals import rivals as find_rivals
from bigram_circuits.experiments.same_function import SameFunction, load_same_function, same_function
from bigram_circuits.experiments.verdicts import Judged, judge_functions, judge_rivals, judge_worst_case
from bigram_circuits.experiments.worst_case import (
    AGAINST,
    BUDGETS,
    SaysNothingError,
    worst_case_ablation,
    worst_case_words,
)
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.measures.results import Curves, load_result_and_origin
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs import LEFT_OUT, Run, run_id
from bigram_circuits.storage.files import checked_json, read_checked_json, write_text
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import check_no_link, shown
from bigram_circuits.targets.base import Target, target_of
from bigram_circuits.text.corpus import Corpus, spread

FOLDER = Path("falsify") / "stricter"
"""Where they are in the folder of a run."""
RIVALS_FOLDER = FOLDER / "rivals"
"""Where its rivals are, with the runs that learn them."""
MOST_TOKENS = 1 << 13
"""Held-out tokens on which two masks are compared (`same_function`), unless more are asked for."""
_WORST_CASE, _RIVALS, _SAME = "worst_case.json", RIVALS_FOLDER.name, "same_function"
_REMEDY = "remove it and measure again"


@dataclass(frozen=True)
class StricterTests:
    """What the stricter tests of a mask found, as far as they were made.

    Example:
        >>> tests = bc.stricter_tests(model, target, corpus, config, found=found, rivals=0, budgets=(0, 2))
        >>> tests.judged  # which of them weaken what is claimed
        >>> tests.save("runs/short/falsify/stricter")
    """

    worst_case: Curves | None = None
    """Of `worst_case_ablation`."""
    rivals: Rivals | None = None
    """Of `rivals`."""
    same: Mapping[str, SameFunction] = field(default_factory=dict)
    """Of `same_function`, with other masks by name: `seed-1`, `rival-1`, or the name of a run's folder."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tests that were left out, by name (`worst_case`), with the reason."""

    @property
    def judged(self) -> list[Judged]:
        """What the tests do to the finding: nothing, or they weaken it."""
        found = [
            None if self.worst_case is None else judge_worst_case(self.worst_case),
            None if self.rivals is None else judge_rivals(self.rivals),
            judge_functions(self.same),
        ]
        return [one for one in found if one is not None]

    @property
    def says(self) -> tuple[str, ...]:
        """What each test showed, in a sentence or two."""
        return tuple(self._says())

    def _says(self) -> Iterator[str]:
        if self.worst_case is not None and judge_worst_case(self.worst_case) is None:
            yield worst_case_words(self.worst_case)
        yield from (one.says for one in self.judged)
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
            (one if of is None else replace(one, of=of)).save(folder / _SAME / name)
        if self.left_out:
            write_text(folder / LEFT_OUT, checked_json({**self.left_out}))


def load_stricter(folder: str | os.PathLike[str], run: Run | None = None) -> StricterTests:
    """Read what `StricterTests.save` wrote; empty if there is nothing.

    Args:
        folder: The folder (`falsify/stricter` in that of a run).
        run: The run that it must be of; None: any.

    Raises:
        ValueError: If a file is damaged, a symbolic link, or of another run or mask.

    Example:
        >>> bool(bc.load_stricter("runs/untested/falsify/stricter"))  # nobody has tested this run
        False
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
    there = {"worst_case": worst_case, "rivals": found} | same
    left_out = {name: reason for name, reason in left_out.items() if there.get(name) is None}
    return StricterTests(worst_case, found, same, left_out)


def _check(run: Run | None, path: Path, of: Origin | None) -> None:
    if run is not None:
        run.check_origin(path, of, _REMEDY)


@uses_model
def stricter_tests(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    found: MaskLike,
    others: Mapping[str, Mask] | None = None,
    rivals: int = 2,
    budgets: Sequence[int] = BUDGETS,
    starts: int = 3,
    most_tokens: int = MOST_TOKENS,
    run_dir: str | os.PathLike[str] | None = None,
) -> StricterTests:
    """Make all stricter tests of a finding: its worst case, its rivals, and whether other masks compute the same.

    Each rival takes as long as finding the mask, and the worst case, with the default budgets, about as long once more.

    Args:
        model: From `load_model`.
        target: The target that the mask was learned for.
        corpus: Its training part is learned on and ascended on, its held-out part measured on.
        config: The recipe that found the mask, `SparsifyConfig()` by default.
        found: The mask.
        others: Other masks that the mask is compared with, by name: `seed-1` for one of another seed. Beside them, it
            is compared with each rival that does the same, `rival-1`.
        rivals: Number of rivals to look for; 0: none.
        budgets: As for `worst_case_ablation`, with 0 and another.
        starts: As for `worst_case_ablation`.
        most_tokens: Held-out tokens, at most, on which masks are compared.
        run_dir: A folder for the results, each of which is written when it is there, and for the runs of the rivals.
            The worst case and runs that are already there are reused.

    Returns:
        What was found. Tests that say nothing of this mask (`worst_case_ablation` refuses, the recipe polishes) are
        left out, with the reason.

    Raises:
        ValueError: As `worst_case_ablation`, `rivals` and `same_function`.
        OSError: If `run_dir` cannot be written, or another process is writing to it.

    Example:
        >>> tests = bc.stricter_tests(model, target, corpus, config, found=found, rivals=1, budgets=(0, 2))
        >>> print(tests)
    """
    if rivals < 0:
        raise ValueError(f"rivals must be a number of masks, 0 or more, not {rivals}")
    if not {0} < set(budgets):
        raise ValueError(f"budgets must contain 0, the mask itself, and another number of steps, not {tuple(budgets)}")
    config, mask, target = config or SparsifyConfig(), as_mask(found), target_of(target, model)
    folder = None if run_dir is None else Path(run_dir)
    if folder is not None:
        check_no_link(folder)
    run = None if folder is None else run_id(folder.absolute().parent.parent)  # see FOLDER
    of = Origin(run, mask.checksum, corpus.fingerprint, corpus.source)
    left_out: dict[str, str] = {}
    result = StricterTests()

    def add(**parts: Any) -> StricterTests:
        new = StricterTests(**parts)
        if folder is not None:
            new.save(folder, of)
        return replace(result, **parts)

    worst_case = None if folder is None else _worst_case_before(folder, of, target, budgets, starts)
    if worst_case is None:
        try:
            worst_case = worst_case_ablation(model, mask, target, corpus, budgets, starts)
        except SaysNothingError as error:
            left_out["worst_case"] = str(error)
    result = add(worst_case=worst_case)
    compared = dict(others or {})
    if rivals and config.polish:
        left_out["rivals"] = "the recipe polishes, which would share weights again"
    elif rivals:
        at = None if folder is None else folder / _RIVALS
        rival = find_rivals(
            model, target, corpus, 1 + rivals, config=config, first=mask, run_dir=at, check_memory="off"
        )  # the finding's own run needed as much memory
        result = add(rivals=rival)
        names = [name for name in rival.measured.names if name != FIRST]
        compared |= {
            f"rival-{at}": one
            for at, (name, one) in enumerate(zip(names, rival.masks[1:], strict=True), 1)
            if name in rival.rivals
        }
    text = spread(corpus.held_out, most_tokens)
    same: dict[str, SameFunction] = {}
    for name, other in compared.items():
        if not other.kept:
            left_out[name] = f"it keeps no {other.units}"
            continue
        same[name] = same_function(model, mask, other, target, text)
        result = add(same=same)
    return add(left_out=left_out)


def _worst_case_before(folder: Path, of: Origin, target: Target, budgets: Sequence[int], starts: int) -> Curves | None:
    """The worst case that an earlier call wrote, if it is what this one would measure; else None."""
    if not (path := folder / _WORST_CASE).is_file():
        return None
    before, its = load_result_and_origin(path, follow=False)
    asked = (tuple(sorted(set(budgets))), starts, target.kind, of)
    if not isinstance(before, Curves) or AGAINST in before.notes or before.notes.get("forced"):
        return None
    return before if (before.points, before.notes["starts"], before.notes["target"], its) == asked else None
