"""Whether a loaded model is the one in its files: every weight is there, and hooks change nothing.

Transformers initialises weights that a file does not hold at random, with a warning. TransformerLens computes attention
and norms with code of its own, which leaves out some options of some architectures. Both give other numbers without an
error, so both are checked whenever a model is loaded or hooked.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor

from bigram_circuits.models.native import is_native
from bigram_circuits.storage.records import shown

_PROBE = 16  # tokens of the forward pass that is compared
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}
"""Largest root mean square difference of logits, as a share of their standard deviation over the vocabulary."""
_NO_WEIGHTS = re.compile(r"(^|\.)(attn\.bias|attention\.bias|masked_bias|inv_freq|position_ids)$")
"""Names of buffers in older checkpoints that models compute themselves today."""
_SHOWN = 2  # names in a warning


class ModelWarning(UserWarning):
    """A model's files hold something that the model does not use."""


# --- are all weights there? ---


def checked_weights(kind: Any, source: str, **options: Any) -> Any:
    """Load a Hugging Face model with `kind.from_pretrained`, and check that every weight came from its files.

    Raises:
        ValueError: If a weight is missing or has another shape than the configuration says, or the files hold an
            adapter that was not merged.
    """
    with _load_report() as report:
        try:
            model, found = kind.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except RuntimeError as error:
            if "above report" not in str(error):
                raise
            raise ValueError(_reason(report)) from error
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    unexpected = [name for name in unexpected if not _NO_WEIGHTS.search(name)]
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_" in name for name in unexpected):
        raise ValueError(
            "its files hold an adapter that is not merged: merge it into its base model (merge_and_unload), save that "
            "with save_pretrained, and load the result"
        )
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(f"the weight {shown(name)} is {_by(there)} in its files, but {_by(wanted)} by its config.json")
    if missing:
        raise ValueError(_says_missing(missing, unexpected))
    if unexpected:
        more = f" and {len(unexpected) - _SHOWN} more" if len(unexpected) > _SHOWN else ""
        names = ", ".join(shown(name) for name in unexpected[:_SHOWN])
        warnings.warn(
            f"the files of {source!r} hold weights that a {type(model).__name__} of this config.json does not use: "
            f"{names}{more}",
            ModelWarning,
            stacklevel=2,
        )
    return model


def _says_missing(missing: list[str], unexpected: list[str]) -> str:
    count = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
    says = f"its files do not hold the weight {missing[0]}{count}"
    pairs = ((name, other) for name in missing for other in unexpected)
    for name, other in pairs:
        if other.endswith("." + name):
            prefix = other.removesuffix(name)
            return f"{says}, but {other}: remove the prefix {prefix!r} from the names of all tensors, and save again"
    if unexpected:
        return f"{says}, but hold {unexpected[0]}, which the model does not use"
    return f"{says}: part of the files is missing, or the config.json belongs to another model"


@contextlib.contextmanager
def _load_report() -> Iterator[list[str]]:
    """Within the block, collect what transformers reports about a checkpoint, instead of showing it."""
    lines: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.addFilter(collect)
    logger.setLevel(logging.WARNING)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeFilter(collect)


def _reason(report: list[str]) -> str:
    """What transformers reports as the reason that it stopped: the weight, and the error without its traceback."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(report))
    lines = [" ".join(re.sub(r"[|+-]{2,}|\|", " ", line).split()) for line in plain.splitlines()]
    entries = [line.removesuffix(" CONVERSION") for line in lines if line.endswith(" CONVERSION")]
    errors = [line for line in lines if re.match(r"\w+(Error|Exception): ", line)]
    return f"{': '.join([*entries[:1], *errors[:1]])}" if entries or errors else " ".join(filter(None, lines))


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


# --- does the hooked model compute what the plain one does? ---


class Agreement:
    """The logits of a plain model on a few tokens, for comparing those of the hooked one.

    The plain model runs first and only its logits are kept.
    """

    def __init__(self, check: bool) -> None:
        self._check = check
        self._logits: Tensor | None = None

    def run_plain(self, model: Any) -> None:
        """Run a plain model on the probe's tokens, and keep its logits."""
        if self._check:
            with torch.no_grad():
                found = model(_probe(model).to(next(model.parameters()).device))
                self._logits = (found if isinstance(found, Tensor) else found.logits).float().cpu()

    def confirm(self, model: Any) -> None:
        """Raise ValueError unless the hooked model's logits are the plain model's, within the precision's rounding."""
        if self._logits is None or not torch.isfinite(self._logits).all():
            return  # a model that is not finite in this precision is reported where it is used
        with torch.no_grad():
            hooked = model(_probe(model.original_model).to(model.cfg.device)).float().cpu()
        difference = float((hooked - self._logits).square().mean().sqrt())
        spread = float(self._logits.std(-1).mean())
        tolerance = _TOLERANCE.get(model.cfg.dtype, _TOLERANCE[torch.bfloat16])
        if not difference <= tolerance * spread + 1e-6 * float(self._logits.abs().max()):
            raise ValueError(
                f"TransformerLens does not compute what Hugging Face does for this model: on {_PROBE} tokens the "
                f"logits differ by {difference:.2g} (root mean square), {difference / spread:.2g} of their standard "
                f"deviation, where at most {tolerance:g} is rounding in {str(model.cfg.dtype).removeprefix('torch.')}; "
                f"an option of its config.json is not supported (check=False, --unchecked, goes on)"
            )


def _probe(model: Any) -> Integer[Tensor, "one pos"]:
    """Token ids for the forward pass: spread over the vocabulary, the same for the plain and the hooked model."""
    if is_native(model):
        context, d_vocab = model.cfg.n_ctx, model.cfg.d_vocab
    else:
        config = model.config.get_text_config()
        context, d_vocab = getattr(config, "max_position_embeddings", None), config.vocab_size
    length = min(_PROBE, context or _PROBE)
    return (7919 * torch.arange(length) + 13).remainder(d_vocab)[None]
