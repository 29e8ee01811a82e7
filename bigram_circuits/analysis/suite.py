"""`analyze` runs all registered analyses on a subnetwork, and summarises them in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.analysis.atlas import TOKENS as TOKENS_EXPLAINED
from bigram_circuits.analysis.atlas import atlas_of, atlas_of_task
from bigram_circuits.analysis.conditions import check_arguments, checked_text
from bigram_circuits.analysis.registry import FIT_TOKENS, SWEEP_TOKENS, TOKENS, Subject, analyses
from bigram_circuits.explanations.explanation import Atlas
from bigram_circuits.masking.apply import MaskLike, as_mask
from bigram_circuits.measures import html
from bigram_circuits.measures.conditions import OWN
from bigram_circuits.measures.results import Curves, Effects, Result
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.progress import progress
from bigram_circuits.runs import ATLAS, LEFT_OUT, run_id
from bigram_circuits.storage.files import checked_json, whole_folder, write_text
from bigram_circuits.storage.origin import Origin
from bigram_circuits.targets.base import target_of
from bigram_circuits.tasks.target import TaskTarget
from bigram_circuits.text.corpus import Corpus

_QUANTITIES_SHOWN = 3
_TOKENS_PER_EXPLAINED = 100  # of the text that layers are measured on, for every token of the atlas


@dataclass(frozen=True)
class Analyses:
    """The results of `analyze`.

    Example:
        >>> done = bc.analyze(model, found, target, corpus)
        >>> done.results["logit_lens"].plot()
        >>> done.left_out  # what could not be measured, and why
    """

    results: Mapping[str, Result]
    """The results by name, for example `logit_lens`."""
    left_out: Mapping[str, str]
    """The analyses that this model does not support, with reasons."""
    of: Origin | None = None
    """The subnetwork and the text that were analysed."""
    atlas: Atlas | None = None
    """Explanations of what follows the most frequent tokens, or of a task's answers; None if that was left out."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write every result to `<name>.json` in a folder, replacing its contents.

        The analyses left out are written to `left_out.json`. In the folder of a run (`runs/mine/analysis`), the files
        name that run.
        """
        folder = Path(folder)
        of = replace(self.of or Origin(), run=run_id(folder.parent))
        with whole_folder(folder) as fresh:
            for name, result in self.results.items():
                result.save(fresh / f"{name}.json", of)
            if self.atlas is not None:
                self.atlas.save(fresh / ATLAS, of)
            if self.left_out:
                write_text(fresh / LEFT_OUT, checked_json({**self.left_out, "of": of.to_json()}))

    def __str__(self) -> str:
        return _story(self)

    def _repr_html_(self) -> str:
        """HTML for notebooks: the names and quantities of the results, and what was left out."""
        rows = [
            [name, result.title, ", ".join(one.name for one in result.quantities[:_QUANTITIES_SHOWN])]
            for name, result in self.results.items()
        ]
        says = ["Use results[name].plot() or .to_dataframe() for one of them, and print() for a summary."]
        left_out = [f"Left out: {name}: {reason}" for name, reason in self.left_out.items()]
        table = html.table(["name", "what was measured", "first quantities"], rows, "Analyses")
        return html.summary(f"{len(rows)} analyses", says, table, html.small(left_out))


@uses_model
def analyze(
    model: Model,
    subnetwork: MaskLike,
    target: Any,
    corpus: Corpus,
    *,
    seed: int = 0,
    tokens: int = TOKENS,
    sweep_tokens: int | None = None,
    fit_tokens: int = FIT_TOKENS,
    atlas_tokens: int | None = None,
) -> Analyses:
    """Run the standard set of analyses on a subnetwork, or on a circuit what of it can be said of nodes.

    Args:
        model: From `load_model`.
        subnetwork: The subnetwork or circuit to analyse.
        target: The target it was learned for.
        corpus: The text: affine maps are fitted on its training part, everything else is measured on its held-out part.
        seed: Seed of the matched random subnetworks.
        tokens: Maximum number of held-out tokens to measure layers on; all samples are evenly spread over the text.
        sweep_tokens: Maximum number of held-out tokens to measure each ablation on; by default 3,072, or `tokens` if
            that is fewer.
        fit_tokens: Maximum number of training tokens to fit affine maps on, and of held-out tokens for
            `max_activating_tokens`.
        atlas_tokens: Number of tokens to explain in the `atlas`; by default 200, fewer if `tokens` is below 20,000.

    Returns:
        Layer by layer: `logit_lens`, `affine_lens`, `cosine`, `rotations`, `covariance`. Held-out text, token by token:
        `prompt_lens`, `prompt_cosine`, `attribution`, `attention` (of the heads with the most kept weights),
        `passages`, `faithful_tokens`. Location: `by_layer`, `by_head`, `concentration`, `whole_neurons`,
        `max_activating_tokens`. What neurons and heads do: `unit_effects`, `neuron_map`, `neurons_used`,
        `predicted_effects`, and the `atlas`. Necessity: `ablation_components`, `ablation_heads`, `stochastic_ablation`.
        Comparison with the largest weights: `overlap_magnitude`. Sufficiency: `induction`, for single heads added to
        the subnetwork on repeated random tokens, if the full model can continue these, and `induction_pairs`, for the
        best of them with every other. For a `TaskTarget` also `task` (`measure_task`); ablations then change the loss
        at the answers, the atlas is of prompts, and what looks at text uses the prompts of the most common length,
        without padding.

    Raises:
        ValueError: If a part of the text is empty, or model, subnetwork, target and text do not fit together. Analyses
            that the model does not support (`NotShownError`) are left out with the reason; other errors are raised.

    Example:
        >>> done = bc.analyze(model, found, target, corpus)
        >>> done.save("runs/short/analysis")
    """
    subnetwork = as_mask(subnetwork)
    check_arguments(model, subnetwork, seed=seed)
    target = target_of(target, model)
    for part in (corpus.train, corpus.held_out):
        checked_text(model, part)
    of = Origin(subnetwork=subnetwork.checksum, text=corpus.fingerprint, source=corpus.source)
    task = None
    if isinstance(target, TaskTarget):
        task, corpus = target.task_of(corpus.held_out), target.unpadded(corpus)
    sweep_tokens = min(SWEEP_TOKENS, tokens) if sweep_tokens is None else sweep_tokens
    found = _run(of, Subject(model, subnetwork, target, corpus, seed, tokens, sweep_tokens, fit_tokens, task))
    try:
        if task is not None:
            made = atlas_of_task(model, subnetwork, task)
        else:
            most = atlas_tokens or min(TOKENS_EXPLAINED, max(1, tokens // _TOKENS_PER_EXPLAINED))
            made = atlas_of(model, subnetwork, corpus.held_out, most)
    except NotShownError as error:
        return replace(found, left_out={**found.left_out, "atlas": str(error)})
    effects = found.results.get("unit_effects")
    lost = effects.get("lost") if isinstance(effects, Effects) else {}
    units = {label: replace(one, lost=lost.get(label)) for label, one in made.units.items()}
    return replace(found, atlas=replace(made, units=units))


def _run(of: Origin, subject: Subject) -> Analyses:
    """Run every registered analysis on a subject."""
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    every = analyses()
    with progress(len(every), desc="analysing", unit="step") as bar:
        for name, step in every.items():
            bar.set_postfix_str(name.replace("_", " "), refresh=False)
            try:
                if name not in results:  # an earlier step may have measured it
                    found = step(subject)
                    results |= {name: found} if isinstance(found, Result) else found
            except NotShownError as error:
                left_out[name] = str(error)
            bar.update()
    return Analyses(results, left_out, of)


# --- in words ---

_LAYER_TABLES = (
    ("logit_lens", "surprisal_correlation", "logit lens: r with the target's surprisals"),
    ("affine_lens", "surprisal_correlation", "affine lens: r with the target's surprisals"),
    ("affine_lens", "output_correlation", "affine lens: r with the model's own output surprisals"),
    ("affine_lens", "recall_at_1", "current token: recall at 1 of the map to the input"),
    ("cosine", "current_embedding", "cosine with the current token's embedding"),
    ("cosine", "target_unembedding", "cosine with the unembedding of the target's most likely next token"),
    ("cosine", "target_unembedding_baseline", "  the same with other positions' tokens (baseline)"),
    ("rotations", "output_angle", "rotation of the map to the output: median eigenvalue angle, degrees"),
)
_STEPS = (
    ("logit_lens", "surprisal_correlation", "r with the target (logit lens)"),
    ("cosine", "current_embedding", "cosine with the current token's embedding"),
    ("cosine", "target_unembedding", "cosine with the target's next token"),
)
_EFFECTS = (
    ("ablation_components", "attentions and MLPs with the largest rise in loss when zeroed, nats"),
    ("ablation_heads", "heads with the largest rise in loss when zeroed, nats"),
    ("induction", "heads with the largest fall in loss on repeated random tokens when added to it, nats"),
    ("induction_pairs", "the best of these heads with a second one"),
)


def _story(analyses: Analyses) -> str:
    curves_of = {name: result for name, result in analyses.results.items() if isinstance(result, Curves)}
    steps = [_largest_step(curves_of[name], *rest) for name, *rest in _STEPS if name in curves_of]
    lines = ["\n".join(["what the blocks do", *filter(None, steps)])] if any(steps) else []
    for name, quantity, words in _LAYER_TABLES:
        if name in curves_of and not np.isnan(curves_of[name].get(quantity)).all():
            lines.append(f"{words}\n{curves_of[name].table(quantity)}")
    lists = []
    for name, words in _EFFECTS:
        effects = analyses.results.get(name)
        if isinstance(effects, Effects):
            top = ", ".join(f"{thing} {value:.3f}" for thing, value in effects.top(3))
            lists.append(f"{words}: {top}")
    lines.append("\n".join(lists))
    lines += [f"left out: {name}: {reason}" for name, reason in analyses.left_out.items()]
    return "\n\n".join(lines)


def _largest_step(curves: Curves, quantity: str, words: str) -> str:
    """A sentence on the block that changes a quantity most, in full model and subnetwork; empty if undefined."""
    parts = []
    for condition in (name for name in ("full", *OWN) if name in curves.conditions):
        values = curves.get(quantity, condition)
        steps = np.abs(np.diff(values))
        if not np.isnan(steps).all():
            place = int(np.nanargmax(steps))
            change = f"{values[place]:.2f} to {values[place + 1]:.2f}"
            parts.append(f"block {curves.points[place + 1]} ({condition}: {change})")
    return f"{words} changes most in {', '.join(parts)}" if parts else ""
