"""All layer-by-layer measurements from shared forward passes: one pass over a text for each condition."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Integer

from bigram_circuits.analysis import lens
from bigram_circuits.analysis.affine import RecallSums, fit_maps
from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import Conditions, check_arguments, checked_text, conditions, observe
from bigram_circuits.analysis.geometry import (
    CosineSums,
    cosine_curves,
    covariance_maps,
    covariance_similarity,
    covariance_sums,
    rotation_curves,
)
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.masking.apply import MaskLike
from bigram_circuits.measures.conditions import own_of
from bigram_circuits.measures.results import Curves, Maps
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.text.corpus import Corpus, spread


@usual_order
@uses_model
def layer_by_layer(
    model: Model,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    corpus: Corpus | None = None,
    *,
    tokens: int | None = None,
    fit_tokens: int = 1 << 17,
    seed: int = 0,
) -> dict[str, Curves | Maps]:
    """Logit lens, affine lens, cosines, rotations and covariance similarity over a corpus, from shared forward passes.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        target: If given, also r with this target's surprisals, and the cosine with its prediction.
        corpus: Affine maps are fitted on the training part; everything is measured on the held-out part.
        tokens: Maximum number of held-out tokens to measure on; by default all.
        fit_tokens: Maximum number of training tokens to fit the affine maps on.
        seed: Seed of the matched random subnetwork.

    Returns:
        `logit_lens`, `affine_lens`, `cosine`, `rotations`, and with at least 4 tokens `covariance`: the results of
        `logit_lens`, `affine_lens`, `cosine_to_unembedding`, `layer_rotations` and `covariance_similarity`.

    Example:
        >>> results = analysis.layer_by_layer(model, found, target, corpus, tokens=512, fit_tokens=512)
        >>> results["logit_lens"].plot("kl")
    """
    subnetwork, target = check_arguments(model, subnetwork, target=target, seed=seed)
    if not isinstance(corpus, Corpus):
        raise ValueError(f"layers are measured on a Corpus, from load_corpus, not on a {type(corpus).__name__}")
    fit_on, held_out = spread(checked_text(model, corpus.train), fit_tokens), checked_text(model, corpus)
    held_out = held_out if tokens is None else spread(held_out, tokens)
    return _layer_by_layer(model, fit_on, held_out, conditions(subnetwork, seed=seed), target, seed)


def _layer_by_layer(
    model: Model,
    fit_on: Integer[np.ndarray, "a position"],
    held_out: Integer[np.ndarray, "b position"],
    named: Conditions,
    target: Any,
    seed: int,
) -> dict[str, Curves | Maps]:
    """`layer_by_layer` on checked arguments."""
    lens.check_readout(model)
    maps = fit_maps(model, fit_on, named, 1.0)
    plain = {name: lens.LensSums(model, target) for name in named}
    mapped = {name: lens.LensSums(model, target, maps[name]) for name in named}
    recalls = {name: RecallSums(model, maps[name]) for name in named}
    cosines = {name: CosineSums(model, target) for name in named}
    covariances = covariance_sums(held_out, named.get(own_of(named) or ""))
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
        "rotations": rotation_curves(model, maps),
    }
    if held_out.size >= 4:
        found["covariance"] = covariance_maps(model, covariances)
    return found


# --- steps of `analyze` ---


@in_suite("layer by layer")
def _(subject: Subject) -> dict[str, Curves | Maps]:
    fit_on, held_out = spread(subject.corpus.train, subject.fit_tokens), subject.sample(subject.tokens)
    return _layer_by_layer(subject.model, fit_on, held_out, subject.conditions, subject.target, subject.seed)


@in_suite("covariance")
def _(subject: Subject) -> Maps:
    """A model that does not support all of the above may still support this."""
    return covariance_similarity(subject.model, subject.subnetwork, subject.corpus.held_out)
