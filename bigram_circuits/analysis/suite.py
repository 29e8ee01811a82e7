"""The set of analyses that tells the story of a subnetwork, in one go: `analyze`.

All that is measured layer by layer (both lenses, recall, cosines, covariances) looks on at the same forward passes, one
over the held-out text for each condition. Ablations, of which there are many, are measured on a part of the text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer
from tqdm.auto import tqdm

from bigram_circuits.analysis import lens
from bigram_circuits.analysis.ablation import ablate, stochastic_ablation
from bigram_circuits.analysis.affine import RecallSums, fit_affine_lens
from bigram_circuits.analysis.attribution import attention_patterns, logit_attribution
from bigram_circuits.analysis.conditions import conditions, observe
from bigram_circuits.analysis.faithful_tokens import faithfulness_by_token
from bigram_circuits.analysis.geometry import (
    CosineSums,
    cosine_curves,
    cosine_to_unembedding,
    covariance_maps,
    covariance_similarity,
    covariance_sums,
    layer_rotations,
)
from bigram_circuits.analysis.location import by_head, by_layer, concentration, exciting_tokens, whole_neurons
from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.analysis.reading import passages
from bigram_circuits.analysis.sufficiency import sufficiency
from bigram_circuits.analysis.tasks import ability, repeated_random_tokens
from bigram_circuits.measures import html
from bigram_circuits.measures.results import Curves, Effects, Maps, Result
from bigram_circuits.models.activations import check_tokens
from bigram_circuits.names import PartName
from bigram_circuits.runs import LEFT_OUT
from bigram_circuits.storage.files import checked_json, whole_folder, write_text
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import check_target
from bigram_circuits.text.corpus import Corpus, spread, token_array

_FIT_TOKENS = 1 << 14  # that affine maps are fitted on
_TOKENS = 5 << 12  # that layers are measured on
_SWEEP_TOKENS = 3 << 10  # that each ablation is measured on
_WORD_TOKENS = 1 << 13  # that faithfulness by token is measured on
_PROMPT_TOKENS = 16  # of held-out text that are shown one by one
_NEURONS_SHOWN = 12
_HEADS_SHOWN = 6
_QUANTITIES_SHOWN = 3
_PERIOD = 24  # of repeated random tokens


@dataclass(frozen=True)
class Analyses:
    """The results of `analyze`."""

    results: Mapping[str, Result]
    """By name, for example `logit_lens`."""
    left_out: Mapping[str, str]
    """What this model cannot show, and why."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write every result as `<name>.json` into a folder of its own; what an earlier analysis left there goes.

        What was left out is written to `left_out.json`.
        """
        with whole_folder(folder) as fresh:
            for name, result in self.results.items():
                result.save(fresh / f"{name}.json")
            if self.left_out:
                write_text(fresh / LEFT_OUT, checked_json(self.left_out))

    def __str__(self) -> str:
        return _story(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the names of the results, what they are of, and what was left out."""
        rows = [
            [name, result.title, ", ".join(one.name for one in result.quantities[:_QUANTITIES_SHOWN])]
            for name, result in self.results.items()
        ]
        says = ["Each is a result: results[name].plot(), .to_dataframe(). print() tells what they show."]
        left_out = [f"Left out: {name}: {reason}" for name, reason in self.left_out.items()]
        table = html.table(["name", "what was measured", "first quantities"], rows, "Analyses")
        return html.summary(f"{len(rows)} analyses", says, table, html.small(left_out))


def analyze(
    model: Any,
    subnetwork: Subnetwork,
    target: Any,
    corpus: Corpus,
    *,
    seed: int = 0,
    tokens: int = _TOKENS,
    sweep_tokens: int = _SWEEP_TOKENS,
    fit_tokens: int = _FIT_TOKENS,
) -> Analyses:
    """Run a sensible set of analyses on a subnetwork.

    Args:
        model: From `load_model`.
        subnetwork: What was found.
        target: What it was asked to reproduce.
        corpus: The text: affine maps are fitted on its training part, all else is measured on its held-out part.
        seed: Of matched random subnetworks.
        tokens: Held-out tokens that layers are measured on, at most; here and below they are spread over the text.
        sweep_tokens: Held-out tokens that each ablation is measured on, at most.
        fit_tokens: Training tokens that the affine maps are fitted on, and held-out tokens that may excite neurons,
            at most.

    Returns:
        Layer by layer: `logit_lens`, `affine_lens`, `cosine`, `rotations`, `covariance`. Held-out text, token by token:
        `prompt_lens`, `prompt_cosine`, `attribution`, `attention` (of the heads that keep most), `passages`,
        `faithful_tokens`. Where it is: `by_layer`, `by_head`, `concentration`,
        `whole_neurons`, `exciting_tokens`. What is needed: `ablation_components`, `ablation_heads`,
        `stochastic_ablation`. What it is like: `overlap_magnitude`. What it lacks: `induction`, the sufficiency of
        single heads, added to it, for repeated random tokens, if the full model can continue these, and
        `induction_pairs`, that of the best of them with every other.

    Raises:
        ValueError: If a part of the text is empty, or model, subnetwork, target and text do not fit together. What the
            model does not show is no error, but left out with the reason.
    """
    check_target(target, model.cfg.d_vocab)
    subnetwork.check_fits(model)
    for part in (corpus.train, corpus.held_out):
        check_tokens(model, token_array(part))
    some = spread(corpus.held_out, sweep_tokens)
    prompt = np.asarray(corpus.held_out[0][:_PROMPT_TOKENS]).astype(np.int64)
    results: dict[str, Result] = {}
    left_out: dict[str, str] = {}
    steps: dict[str, Callable[[], Result | Mapping[str, Result]]] = {
        "layer by layer": lambda: layer_by_layer(
            model, corpus, subnetwork, target, tokens=tokens, fit_tokens=fit_tokens, seed=seed
        ),
        "covariance": lambda: (
            results["covariance"] if "covariance" in results
            else covariance_similarity(model, corpus.held_out, subnetwork)
        ),
        "prompt_lens": lambda: lens.logit_lens(model, prompt, subnetwork, seed=seed),
        "passages": lambda: passages(model, corpus.held_out, subnetwork, target=target, seed=seed),
        "prompt_cosine": lambda: cosine_to_unembedding(model, prompt, subnetwork, target=target, seed=seed),
        "attribution": lambda: logit_attribution(model, prompt, subnetwork, seed=seed),
        "attention": lambda: _attention(model, prompt, subnetwork, seed),
        "faithful_tokens": lambda: faithfulness_by_token(
            model, spread(corpus.held_out, _WORD_TOKENS), subnetwork, target=target, seed=seed
        ),
        "by_layer": lambda: by_layer(subnetwork),
        "by_head": lambda: by_head(subnetwork, seed=seed),
        "concentration": lambda: concentration(subnetwork, seed=seed),
        "whole_neurons": lambda: whole_neurons(subnetwork, threshold=0, most=_NEURONS_SHOWN, seed=seed),
        "exciting_tokens": lambda: _excited(model, spread(corpus.held_out, fit_tokens), subnetwork, seed),
        "ablation_components": lambda: ablate(model, ["attns", "mlps"], some, subnetwork, target=target, seeds=0),
        "ablation_heads": lambda: ablate(model, "heads", some, target=target, seeds=1),
        "stochastic_ablation": lambda: stochastic_ablation(model, subnetwork, target, some, draws=3, seed=seed),
        "overlap_magnitude": lambda: overlap(
            subnetwork, Subnetwork.magnitude(model, like=subnetwork), by="component"
        ),
        "induction": lambda: _induction(model, subnetwork),
    }  # fmt: skip
    for name, step in (bar := tqdm(steps.items(), desc="analysing", delay=2, leave=False)):
        bar.set_postfix_str(name.replace("_", " "), refresh=False)
        try:
            found = step()
        except ValueError as error:  # the arguments are right: this model does not show what the analysis needs
            left_out[name] = str(error)
            continue
        results |= {name: found} if isinstance(found, Result) else found
    return Analyses(results, left_out)


def layer_by_layer(
    model: Any,
    corpus: Corpus,
    subnetwork: Subnetwork | None = None,
    target: Any = None,
    *,
    tokens: int | None = None,
    fit_tokens: int = 1 << 17,
    seed: int = 0,
) -> dict[str, Curves | Maps]:
    """Logit lens, affine lens, cosines, rotations and covariance similarity over a corpus, from shared forward passes.

    Args:
        model: From `load_model`.
        corpus: Affine maps are fitted on the training part; everything is measured on the held-out part.
        subnetwork: Measure it, its complement and a matched random one beside the full model.
        target: Also r with this target's surprisals, and the cosine with its prediction.
        tokens: How many held-out tokens are measured on, at most; all if not given.
        fit_tokens: How many training tokens the affine maps are fitted on, at most.
        seed: Of the matched random subnetwork.

    Returns:
        `logit_lens`, `affine_lens`, `cosine`, `rotations`, and if there are at least 4 tokens `covariance`: as the
        functions of these names return them.
    """
    lens.check_readout(model)
    if target is not None:
        check_target(target, model.cfg.d_vocab)
    named = conditions(subnetwork, seed=seed)
    maps = fit_affine_lens(model, corpus, subnetwork, max_tokens=fit_tokens, seed=seed)
    plain = {name: lens.LensSums(model, target) for name in named}
    mapped = {name: lens.LensSums(model, target, maps[name]) for name in named}
    recalls = {name: RecallSums(model, maps[name]) for name in named}
    cosines = {name: CosineSums(model, target) for name in named}
    held_out = corpus.held_out if tokens is None else spread(corpus.held_out, tokens)
    covariances = covariance_sums(held_out, subnetwork)
    groups = (plain, mapped, recalls, cosines, covariances)
    observe(
        model, held_out, named, lambda name: [group[name] for group in groups if name in group], what="layer by layer"
    )
    notes = {"tokens": int(held_out.size), "random_seed": seed}
    fitted = notes | {"fitted_on": maps["full"].tokens, "alpha": maps["full"].alpha}
    found: dict[str, Curves | Maps] = {
        "logit_lens": lens.lens_curves("Logit lens", model, plain, notes),
        "affine_lens": lens.affine_curves(model, mapped, recalls, fitted),
        "cosine": cosine_curves(model, cosines, notes),
        "rotations": layer_rotations(model, maps=maps),
    }
    if held_out.size >= 4:
        found["covariance"] = covariance_maps(model, covariances)
    return found


def _excited(model: Any, tokens: Integer[np.ndarray, "sequence position"], subnetwork: Subnetwork, seed: int) -> Maps:
    """The tokens that excite the densest neurons."""
    densest = whole_neurons(subnetwork, threshold=0, most=_NEURONS_SHOWN)
    names = [PartName.parse(name) for name in densest.names]
    neurons = [(name.layer, name.indices[0]) for name in names if name is not None]
    return exciting_tokens(model, neurons, tokens, subnetwork, k=5, seed=seed)


def _attention(model: Any, prompt: Integer[np.ndarray, " position"], subnetwork: Subnetwork, seed: int) -> Maps:
    """The attention patterns of the heads of which most is kept, first to last layer."""
    counts = {head: count.fraction for head, count in subnetwork.by_head().items() if count.kept}
    if not counts:
        raise ValueError("no weight of any head is kept")
    heads = sorted(sorted(counts, key=lambda head: -counts[head])[:_HEADS_SHOWN])
    return attention_patterns(model, prompt, subnetwork, heads=heads, seed=seed)


def _induction(model: Any, subnetwork: Subnetwork) -> dict[str, Effects]:
    """Which head, added to the subnetwork, most lowers the loss on repeated random tokens; then which with that one."""
    task = repeated_random_tokens(model, prompts=16, period=_PERIOD)
    able = ability(model, task)
    if not able.able:
        raise ValueError(
            f"the full model cannot continue repeated random tokens: its loss is {able.loss:.2f} nats, "
            f"guessing would be {able.chance:.2f}"
        )
    alone = sufficiency(model, subnetwork, "heads", task, seeds=1)
    best = alone.top(1)[0][0]
    pairs = [f"{best} + {head}" for head in alone.names if head != best]
    return {"induction": alone, "induction_pairs": sufficiency(model, subnetwork, pairs, task, seeds=1)}


# --- in words ---

_LAYER_TABLES = (
    ("logit_lens", "surprisal_correlation", "logit lens: r with the target's surprisals"),
    ("affine_lens", "surprisal_correlation", "affine lens: r with the target's surprisals"),
    ("affine_lens", "output_correlation", "affine lens: r with the model's own output surprisals"),
    ("affine_lens", "recall_at_1", "current token: share that the map to the input finds first"),
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
    ("ablation_components", "largest rise in loss where an output is zeroed, nats"),
    ("ablation_heads", "heads with the largest rise in loss where zeroed, nats"),
    ("induction", "heads added to the subnetwork: largest fall in loss on repeated random tokens, nats"),
    ("induction_pairs", "the best of these with another"),
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
    """In words: the block that changes a quantity most, for the full model and the subnetwork; empty if undefined."""
    parts = []
    for condition in ("full", "subnetwork"):
        values = curves.get(quantity, condition)
        steps = np.abs(np.diff(values))
        if not np.isnan(steps).all():
            place = int(np.nanargmax(steps))
            change = f"{values[place]:.2f} to {values[place + 1]:.2f}"
            parts.append(f"block {curves.points[place + 1]} ({condition}: {change})")
    return f"{words} changes most in {', '.join(parts)}" if parts else ""
