"""The names from which the model, text and target of a run can be made again, so that the command line can go on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigram_circuits.models.model import Model
from bigram_circuits.names import name_in_memory
from bigram_circuits.recipe import DTYPES, HELD_OUT, TARGETS, Inputs, spelled
from bigram_circuits.targets.base import Target
from bigram_circuits.targets.ngram import IndexTarget
from bigram_circuits.text.corpus import Corpus

_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def name_of_target(kind: str | None) -> str | None:
    """The name on the command line of a target's class; None if it has none."""
    if kind == "IndexTarget":  # the same target, looked up elsewhere
        kind = "NGramTable"
    return next((spelled(name) for name in TARGETS if TARGETS[name].kind == kind), None)


def names_of(model: Model, target: Target, corpus: Corpus) -> Inputs | None:
    """The names of what a run is made of; None if one of them has none, as it was made from objects.

    They are checked when the run is opened again: weights, text and target must be the same.
    """
    text, name = corpus.named, name_of_target(target.kind)
    if text is None or name is None or text.seed != 0 or not 0 < text.held_out < 1:
        return None
    of_model = _name_of_model(model)
    if of_model is None or (target.kind == "ModelTarget" and getattr(target, "model", None) is not model):
        return None
    order = getattr(target, "order", Inputs.order)
    return replace(
        of_model, corpus=text.source, context_length=text.context_length, max_tokens=text.max_tokens,
        held_out=None if text.held_out == HELD_OUT else text.held_out, text_column=text.text_column, bos=text.bos,
        target=name, order=order, index=target.path if isinstance(target, IndexTarget) else None,
    )  # fmt: skip


def _name_of_model(model: Model) -> Inputs | None:
    """The name that `load_model` loaded a model by, or that of a model in memory; None if its precision has none."""
    cfg: Any = model.cfg
    name, dtype = str(cfg.model_name), str(cfg.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        return None
    if not hasattr(cfg, "revision") or not (Path(name).is_dir() or _ON_HUB.fullmatch(name)):
        return Inputs(model=name_in_memory(name), dtype=dtype)
    return Inputs(model=name, revision=cfg.revision, dtype=dtype)
