"""Wrap a plain model in a `TransformerBridge`, and check that the two compute the same."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

from bigram_circuits.models.faithful import Agreement
from bigram_circuits.models.model import Model
from bigram_circuits.models.native import is_native
from bigram_circuits.models.plain import Plain, known_plain, remember_plain, twin
from bigram_circuits.models.precision import round_rotations
from bigram_circuits.models.quiet import one_line, quiet_transformers
from bigram_circuits.models.state import usual_torch
from bigram_circuits.text.tokenizers import remember_template, template_of

_NATIVE = "TransformerLensNative"


@usual_torch()
def hook(plain: Any, *, tokenizer: Any, name: str, check: bool = True) -> Model:
    """Hook a model that is in memory, which is left as it is; nothing is read from a name.

    Args:
        plain: A Hugging Face causal language model or TransformerLens' `NativeModel`; its weights are shared.
        tokenizer: A Hugging Face tokenizer, of which a copy is used, or None.
        name: What the hooked model is called.
        check: Compare the logits of the two.

    Raises:
        ValueError: If TransformerLens does not support the architecture, or, with `check`, does not compute what the
            plain model does.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
    from transformer_lens.utilities.attn_implementation import force_eager_attention

    with quiet_transformers(), one_line(f"cannot hook a {type(plain).__name__}"):
        agreement = Agreement(check)
        wrapped = twin(plain).eval()
        if is_native(plain):
            described: dict[str, Any] = {"architecture": _NATIVE, "tl_config": copy.deepcopy(plain.cfg)}
        else:
            force_eager_attention(wrapped)
            config = copy.deepcopy(wrapped.config)
            config.architectures = [_architecture(wrapped)]  # None, if the model was never saved
            described = {"architecture": determine_architecture_from_hf_config(config), "hf_config": config}
        agreement.run_plain(wrapped)
        hooked_tokenizer = None if tokenizer is None else with_bos(tokenizer)
        bridge: Any = build_bridge_from_module(wrapped, tokenizer=hooked_tokenizer, model_name=name, **described)
        if bridge.tokenizer is not None:
            remember_template(bridge.tokenizer, template_of(tokenizer))
        round_rotations(bridge)
        agreement.confirm(bridge.eval())
    bridge.cfg.checked = check
    remember_plain(bridge, Plain(plain, tokenizer))
    return bridge


def hooked(plain: Any, *, like: Model, check: bool = True) -> Model:
    """Hook another plain model with the name and tokenizer of the hooked model `like`.

    Raises:
        ValueError: If the hooked model does not compute what the plain one does; not looked at without `check`, or if
            `like` was loaded without.
    """
    known = known_plain(like)
    return hook(
        plain, tokenizer=like.tokenizer if known is None else known.tokenizer, name=str(like.cfg.model_name),
        check=check and getattr(like.cfg, "checked", True),
    )  # fmt: skip


def _architecture(plain: Any) -> str:
    """The name of a model's class in transformers, which it may extend."""
    names = (kind.__name__ for kind in type(plain).__mro__ if kind.__module__.startswith("transformers."))
    return next(names, type(plain).__name__)


def with_bos(tokenizer: Any) -> Any:
    """A copy of a tokenizer that puts its BOS before a text, made from files as TransformerLens makes it."""
    from transformer_lens.utilities.hf_utils import autotokenizer_with_special_token_compat

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            copied = autotokenizer_with_special_token_compat(folder, add_bos_token=True, trust_remote_code=False)
        except ValueError:  # a tokenizer that has no BOS
            copied = autotokenizer_with_special_token_compat(folder, trust_remote_code=False)
    copied.name_or_path = tokenizer.name_or_path
    copied.padding_side = tokenizer.padding_side
    return copied
