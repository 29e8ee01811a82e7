"""Models in other formats than Hugging Face's, converted to plain modules by TransformerLens' own converters.

- Checkpoints of former versions of TransformerLens: a `config.json` with its settings (`d_model`, `n_layers`, ..., and
  no `model_type`) and a `.pth` file with its names (`blocks.0.attn.W_Q`), in a folder or on the hub.
- Models that tracr has compiled from RASP programs (Lindner et al. 2023, arXiv 2301.05062).

Both become TransformerLens' `NativeModel`. Settings that it does not have are refused instead of ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigram_circuits.models.native import build, rebuilt, with_tensors
from bigram_circuits.models.plain import Plain
from bigram_circuits.models.quiet import quiet_transformers
from bigram_circuits.storage.records import parse_json, regular_size, shown

_SIZES = ("d_model", "n_layers", "d_head", "n_heads", "n_ctx", "d_vocab")
_SETTINGS = (
    *_SIZES, "d_vocab_out", "d_mlp", "n_key_value_heads", "act_fn", "attn_only", "gated_mlp", "final_rms", "eps",
    "attention_dir", "attn_scale", "attn_scores_soft_cap", "output_logits_soft_cap", "tokenizer_name", "init_mode",
)  # fmt: skip
"""Settings that TransformerLens' native models have too, under the same names."""
_UNSUPPORTED = {
    "shortformer_pos": False, "parallel_attn_mlp": False, "use_local_attn": False, "use_qk_norm": False,
    "scale_attn_by_inverse_layer_idx": False, "post_embedding_ln": False, "use_normalization_before_and_after": False,
    "num_experts": None, "use_attn_scale": True, "positional_embedding_type": "standard",
}  # fmt: skip
"""Settings that change the logits but that native models lack (their rotary embedding is another), and the value that
they must have."""
_OLD, _MINGPT = "neel-solu-old", "mingpt"
_LARGEST_SETTINGS = 1 << 20  # bytes
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def is_legacy_config(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a `config.json` are the settings of a model of TransformerLens' former format."""
    return "model_type" not in config and all(name in config for name in _SIZES)


def is_legacy_name(name: str) -> bool:
    """Whether a hub id is of one of the families in TransformerLens' former format (`NeelNanda/...`)."""
    from transformer_lens.model_bridge.sources.tl_legacy import TL_LEGACY_PREFIXES

    return name.startswith(TL_LEGACY_PREFIXES)


def is_tracr(given: Any) -> bool:
    """Whether an object has what tracr's `AssembledTransformerModel` has."""
    return all(hasattr(given, name) for name in ("params", "model_config", "residual_labels", "output_encoder"))


def from_legacy_folder(folder: Path, *, dtype: torch.dtype = torch.float32) -> Plain:
    """Read a model in TransformerLens' former format from a folder, with the tokenizer that lies there, if one does.

    Args:
        folder: Holds a `config.json` and one `.pth` file, or several of which one ends in `final.pth`.
        dtype: Precision of the weights.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a setting is not supported, or the weights do not fit the settings.
    """
    config = folder / "config.json"
    if regular_size(config) > _LARGEST_SETTINGS:
        raise ValueError(f"{str(config)!r} has {regular_size(config):,} bytes, more than settings need")
    files = sorted(folder.glob("*.pth"))
    files = files if len(files) == 1 else [file for file in files if file.name.endswith("final.pth")]
    if len(files) != 1:
        raise FileNotFoundError(
            f"the folder {str(folder)!r} needs one .pth file with weights, or one named ...final.pth"
        )
    plain = _converted(parse_json(config.read_bytes()), _weights(files[0]), str(folder), dtype)
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return Plain(plain, _tokenizer(str(folder)) if has_tokenizer else None)


def from_legacy_hub(name: str, *, checkpoint: int | None = None, dtype: torch.dtype = torch.float32) -> Plain:
    """Download a model in TransformerLens' former format, with the tokenizer that its settings name, if they do.

    Args:
        name: A hub id of one of the families, for example `NeelNanda/Attn_Only_2L512W_C4_Code`.
        checkpoint: Label of a training checkpoint; None: the final weights.
        dtype: Precision of the weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As `from_legacy_folder`.
    """
    from huggingface_hub import HfApi, hf_hub_download

    config = parse_json(Path(hf_hub_download(name, "config.json")).read_bytes())
    if "_old" in name:
        config = {"architecture": _OLD, **config}
    end = "final.pth" if checkpoint is None else f"_{checkpoint}.pth"
    files = [file for file in HfApi().list_repo_files(name) if file.endswith(end)]
    if not files:
        raise FileNotFoundError(f"the model {name!r} has no weights whose name ends in {end}")
    plain = _converted(config, _weights(Path(hf_hub_download(name, files[0]))), name, dtype)
    tokenizer = plain.cfg.tokenizer_name
    return Plain(plain, _tokenizer(tokenizer) if tokenizer else None)


def from_tracr(assembled: Any) -> Plain:
    """Convert a model that tracr has compiled; it has no tokenizer, and its outputs are no tokens.

    Token ids are those of its `input_encoder` (`encoding_map`), whose BOS has to be given too; a logit is 1 for the
    value of its output that is on, with the ids of its `output_encoder`.

    Args:
        assembled: tracr's `AssembledTransformerModel`, or an object with the same attributes.

    Raises:
        ValueError: If its output is numerical, it has layer norms, or its output is not among its residual labels.
    """
    from transformer_lens.utilities import tracr

    try:
        cfg = tracr.make_tracr_transformer_bridge_config(assembled)
        state = tracr.make_tracr_transformer_bridge_state_dict(assembled)
    except (NotImplementedError, KeyError) as error:
        raise ValueError(f"cannot convert this tracr model: {error}") from error
    plain = with_tensors(build(cfg), state).eval()
    plain.cfg.predicts_tokens = False
    return Plain(plain, None)


def _converted(config: Any, weights: dict[str, Tensor], name: str, dtype: torch.dtype) -> Any:
    """A native model of the settings in `config`, with weights by TransformerLens' former names."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources import tl_legacy
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    if not isinstance(config, dict) or not is_legacy_config(config):
        raise ValueError(f"the settings of {name!r} are not those of a TransformerLens model: {', '.join(_SIZES)}")
    for setting, wanted in _UNSUPPORTED.items():
        if config.get(setting, wanted) != wanted:
            raise ValueError(
                f"the model {name!r} has {setting} {shown(config[setting])}, which TransformerLens no longer supports"
            )
    _check_sizes(config, weights, name)
    normalization = config.get("normalization", config.get("normalization_type"))
    cfg = TransformerBridgeConfig(
        **{setting: config[setting] for setting in _SETTINGS if config.get(setting) is not None},
        normalization_type=normalization, positional_embedding_type="standard", architecture="TransformerLensNative",
    )  # fmt: skip
    try:
        if config.get("architecture") == _OLD:
            weights = tl_legacy._convert_neel_solu_old_weights(weights, cfg)  # pyright: ignore[reportPrivateUsage]
        elif config.get("architecture") == _MINGPT:
            weights = tl_legacy._convert_mingpt_weights(weights, cfg)  # pyright: ignore[reportPrivateUsage]
        return _loaded(cfg, convert_tl_checkpoint({key: value.to(dtype) for key, value in weights.items()}, cfg), dtype)
    except (KeyError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()[1:2] or str(error).splitlines()), type(error).__name__)
        raise ValueError(f"the weights of {name!r} do not fit its config.json: {reason.strip()}") from error


def _check_sizes(config: Mapping[str, Any], weights: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError if the settings ask for more than the weights hold, before anything is allocated."""
    for size in _SIZES:
        if type(config[size]) is not int or config[size] < 1:
            raise ValueError(f"{size} of {name!r} should be a number of at least 1, not {shown(config[size])}")
    most = sum(tensor.numel() for tensor in weights.values())
    d_model, layers = config["d_model"], config["n_layers"]
    attention = layers * d_model * config["n_heads"] * config["d_head"]
    mlp = 0 if config.get("attn_only") else layers * d_model * (config.get("d_mlp") or 0)
    wanted = max(d_model * config["d_vocab"], d_model * config["n_ctx"], attention, mlp)
    if wanted > most:
        raise ValueError(
            f"the weights of {name!r} hold {most:,} numbers, but its config.json asks for {wanted:,} or more"
        )


def _loaded(cfg: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A native model with weights by the names of a hooked one; a bias of the unembedding that is not there is 0."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_native(cfg, dtype=dtype)  # pyright: ignore[reportAttributeAccessIssue]
    bias = {"unembed.bias": torch.zeros(bridge.W_U.shape[1], dtype=dtype)}
    bridge.load_state_dict(bias | dict(state), strict=True)
    return rebuilt(bridge)


def _weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, which runs no code.

    Raises:
        ValueError: If it holds anything else.
    """
    regular_size(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise almost anything
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{str(file)!r} cannot be read as weights: {reason[:200]}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{str(file)!r} should hold tensors by name")
    return found


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
