"""Dictionaries of features: sparse autoencoders and transcoders, as SAELens writes them, without SAELens.

An encoder reads an activation x and gives latents f, the features; a decoder gives the activation that they stand for,
f W_dec + b_dec. With h = (x - b_dec) W_enc + b_enc (b_dec only where the dictionary subtracts it) the latents are

| architecture | f | source |
|---|---|---|
| `standard`, `transcoder` | relu(h) | Bricken et al. 2023; Dunefsky et al. 2024, arXiv 2406.11944 |
| `jumprelu`, `jumprelu_transcoder`, `batchtopk` | relu(h) where h > threshold, else 0 | arXiv 2407.14435; 2412.06410 |
| `topk` | relu(h) of the k largest, else 0 | Gao et al. 2024, arXiv 2406.04093 |
| `gated` | relu(a exp(r_mag) + b_enc) where a + b_gate > 0, else 0, with a = (x - b_dec) W_enc | arXiv 2404.16014 |

A BatchTopK dictionary chooses among a whole batch only while it is trained; then it has a threshold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigram_circuits.storage.records import opened, parse_json, regular_size, shown
from bigram_circuits.storage.terminal import printable

_NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")
_EPSILON = 1e-5  # added to the standard deviation by `layer_norm`
_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ALWAYS = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder, or a transcoder, which writes elsewhere than it reads.

    Example:
        >>> import torch
        >>> width = model.cfg.d_model
        >>> weights = torch.randn(width, 64), torch.zeros(64), torch.randn(64, width), torch.zeros(width)
        >>> bc.Dictionary("standard", *weights).encode(torch.randn(1, 5, width)).shape  # [batch, pos, latent]
    """

    architecture: str
    """`standard`, `gated`, `jumprelu`, `topk`, `batchtopk`, `transcoder` or `jumprelu_transcoder`."""
    W_enc: Tensor
    """The encoder, [d_in, d_sae]."""
    b_enc: Tensor
    """Its bias, [d_sae]; of a gated one, that of the magnitudes (`b_mag`)."""
    W_dec: Tensor
    """The decoder, [d_sae, d_out]: a direction for each latent."""
    b_dec: Tensor
    """Its bias, [d_out]."""
    threshold: Tensor | None = None
    """What a latent must exceed, [d_sae], if the architecture has thresholds."""
    b_gate: Tensor | None = None
    """The bias of the gates of a gated one, [d_sae]."""
    r_mag: Tensor | None = None
    """Logarithms of the scales of the magnitudes of a gated one, [d_sae]."""
    k: int | None = None
    """How many latents of a `topk` one are not 0."""
    hook_name: str | None = None
    """The hook point that it reads, if known."""
    hook_name_out: str | None = None
    """The hook point that a transcoder writes to, if known."""
    subtract_b_dec: bool = False
    """Whether `b_dec` is subtracted from what is read (`apply_b_dec_to_input`)."""
    normalize_activations: str = "none"
    """How an activation is scaled before it is read, and scaled back: `none`, `constant_norm_rescale` or
    `layer_norm`."""
    rescale_by_decoder_norm: bool = False
    """Whether latents are multiplied by the norms of their decoder directions (`rescale_acts_by_decoder_norm`)."""

    def __post_init__(self) -> None:
        if self.architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"the architecture of a dictionary must be one of {known}, not {shown(self.architecture)}")
        if self.normalize_activations not in _NORMALISATIONS:
            raise ValueError(
                f"normalize_activations must be one of {', '.join(_NORMALISATIONS)}, not "
                f"{shown(self.normalize_activations)}"
            )
        for name in self._architecture.parts:
            if getattr(self, name) is None:
                raise ValueError(f"a dictionary of the architecture {self.architecture} needs {name}")
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2:
            raise ValueError(
                f"W_enc should be [d_in, d_sae] and W_dec [d_sae, d_out], not {list(self.W_enc.shape)} and "
                f"{list(self.W_dec.shape)}"
            )
        for name, tensor in self._tensors().items():
            wanted = {"W_enc": self.W_enc.shape, "W_dec": (self.d_sae, self.d_out), "b_dec": (self.d_out,)}
            if tuple(tensor.shape) != tuple(shape := wanted.get(name, (self.d_sae,))):
                raise ValueError(f"{name} has shape {list(tensor.shape)}, but should have {list(shape)}")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has {int((~tensor.isfinite()).sum()):,} values that are no finite numbers")
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k must be 1 to {self.d_sae}, the number of latents, not {self.k}")
        if (self.subtract_b_dec or self.normalize_activations != "none") and self.d_in != self.d_out:
            raise ValueError(
                f"b_dec cannot be subtracted, nor a scale be undone, where {self.d_in} numbers are read and "
                f"{self.d_out} written"
            )

    @property
    def d_in(self) -> int:
        """How many numbers it reads at a position."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """How many numbers it writes at a position."""
        return self.W_dec.shape[1]

    @property
    def place(self) -> str | tuple[str, str]:
        """Where it belongs, as `spliced` takes it: the hook point, or that which it reads and that which it writes.

        Raises:
            ValueError: If that is not known.
        """
        if self.hook_name is None:
            raise ValueError("this dictionary does not say at which hook point it belongs: name the hook point")
        return self.hook_name if self.hook_name_out is None else (self.hook_name, self.hook_name_out)

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """The latents of activations, in the dictionary's own precision.

        Raises:
            ValueError: If the activations are not `d_in` wide.
        """
        if x.shape[-1] != self.d_in:
            raise ValueError(f"this dictionary reads activations of width {self.d_in}, not {x.shape[-1]}")
        shift, scale = self._scale_of(x)
        read = (x.to(self.W_enc.dtype) - shift) / (
            scale + (_EPSILON if self.normalize_activations == "layer_norm" else 0)
        )
        return self._architecture.activation(self, (read - self.b_dec if self.subtract_b_dec else read) @ self.W_enc)

    def decode(
        self, f: Float[Tensor, "*rows d_sae"], x: Float[Tensor, "*rows d_in"] | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """The activations that latents stand for.

        Args:
            f: The latents.
            x: The activations that they were read from, whose scale is restored. Only a dictionary that normalises
                activations (`normalize_activations`) needs them.

        Raises:
            ValueError: If there are not `d_sae` latents, or the activations are needed and missing.
        """
        if f.shape[-1] != self.d_sae:
            raise ValueError(f"this dictionary has {self.d_sae} latents, not {f.shape[-1]}")
        if self.rescale_by_decoder_norm:
            f = f / self.W_dec.norm(dim=-1)
        out = f @ self.W_dec + self.b_dec
        if self.normalize_activations == "none":
            return out
        if x is None:
            raise ValueError(
                f"this dictionary normalises activations ({self.normalize_activations}): give decode those that were "
                f"encoded, as its second argument"
            )
        shift, scale = self._scale_of(x)
        return out * scale + shift

    def to(self, device: Any) -> Dictionary:
        """A copy whose tensors are on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _scale_of(self, x: Float[Tensor, "*rows d_in"]) -> tuple[Any, Any]:
        """What is subtracted from activations before they are read, and what they are then divided by."""
        x = x.to(self.W_enc.dtype)
        if self.normalize_activations == "constant_norm_rescale":
            return 0.0, x.norm(dim=-1, keepdim=True) / self.d_in**0.5
        if self.normalize_activations == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return 0.0, 1.0

    @property
    def _architecture(self) -> _Architecture:
        return _ARCHITECTURES[self.architecture]

    def _tensors(self) -> dict[str, Tensor]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __repr__(self) -> str:
        at = " to ".join(name for name in (self.hook_name, self.hook_name_out) if name is not None)
        return f"Dictionary({self.architecture}: {self.d_sae:,} latents{f' of {printable(at)}' if at else ''})"


# --- architectures ---


def _relu(dictionary: Dictionary, a: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
    return (a + dictionary.b_enc).relu()


def _above_threshold(dictionary: Dictionary, a: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
    assert dictionary.threshold is not None
    h = a + dictionary.b_enc
    return h.relu() * (h > dictionary.threshold)


def _top_k(dictionary: Dictionary, a: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
    h = a + dictionary.b_enc
    if dictionary.rescale_by_decoder_norm:
        h = h * dictionary.W_dec.norm(dim=-1)
    assert dictionary.k is not None
    largest = h.topk(dictionary.k)
    return torch.zeros_like(h).scatter(-1, largest.indices, largest.values.relu())


def _gated(dictionary: Dictionary, a: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_sae"]:
    assert dictionary.r_mag is not None
    assert dictionary.b_gate is not None
    return (a * dictionary.r_mag.exp() + dictionary.b_enc).relu() * (a + dictionary.b_gate > 0)


@dataclass(frozen=True)
class _Architecture:
    """How latents follow from (x - b_dec) W_enc, and what that needs."""

    activation: Callable[[Dictionary, Tensor], Tensor]
    parts: tuple[str, ...] = ()
    """Fields of `Dictionary` beside encoder, decoder and their biases."""
    stored: Mapping[str, str] | None = None
    """Names in SAELens' file that differ from those of the fields."""
    writes_elsewhere: bool = False


_THRESHOLD = ("threshold",)
_ARCHITECTURES = {
    "standard": _Architecture(_relu),
    "gated": _Architecture(_gated, ("b_gate", "r_mag"), {"b_enc": "b_mag"}),
    "jumprelu": _Architecture(_above_threshold, _THRESHOLD),
    "topk": _Architecture(_top_k, ("k",)),
    "batchtopk": _Architecture(_above_threshold, _THRESHOLD, {"threshold": "topk_threshold"}),
    "transcoder": _Architecture(_relu, writes_elsewhere=True),
    "jumprelu_transcoder": _Architecture(_above_threshold, _THRESHOLD, writes_elsewhere=True),
}


# --- SAELens' folders ---


def load_dictionary(folder: str | os.PathLike[str]) -> Dictionary:
    """Load a sparse autoencoder or transcoder from a folder that SAELens wrote; SAELens is not needed.

    Tensors are converted to float32 and kept on the CPU; `spliced` moves them to the model's device.

    Args:
        folder: With `cfg.json` (of SAELens 6 with its `metadata`, or of an earlier version) and
            `sae_weights.safetensors`.

    Raises:
        FileNotFoundError: If one of the two files does not exist.
        ValueError: If they are damaged, or describe a dictionary that is not supported: of another architecture or
            activation function, scaled by a factor that the folder does not hold, or of a single head.

    Example:
        >>> dictionary = bc.load_dictionary("sae")  # a folder with cfg.json and sae_weights.safetensors
    """
    config = _read_config(Path(folder) / _CONFIG)
    weights = Path(folder) / _WEIGHTS
    try:
        architecture = _supported(config)
        parts = _ARCHITECTURES[architecture]
        tensors = _read_tensors(weights)
        names = {name: (parts.stored or {}).get(name, name) for name in (*_ALWAYS, *parts.parts) if name != "k"}
        for name in {*names.values()} ^ set(tensors):
            wrong = "lacks the tensor" if name in names.values() else "has the unknown tensor"
            wanted = ", ".join(names.values())
            raise ValueError(f"{_WEIGHTS} {wrong} {shown(name)}: a {architecture} dictionary has {wanted}")
        values: dict[str, Any] = {name: tensors[stored] for name, stored in names.items()}
        rescaled = _flag(config, "rescale_acts_by_decoder_norm", architecture == "batchtopk")
        if architecture == "batchtopk":
            values = _with_threshold(values, rescaled)
        found = Dictionary(
            architecture,
            **values,
            k=_number(config, "k") if architecture == "topk" else None,
            hook_name=_name(config, "hook_name"),
            hook_name_out=_name(config, "hook_name_out") if parts.writes_elsewhere else None,
            subtract_b_dec=_flag(config, "apply_b_dec_to_input", not parts.writes_elsewhere),
            normalize_activations=config["normalize_activations"],
            rescale_by_decoder_norm=rescaled and architecture == "topk",
        )
        for name in ("d_in", "d_sae", *(["d_out"] if parts.writes_elsewhere else [])):
            if _number(config, name) != getattr(found, name):
                raise ValueError(f"its {_CONFIG} says {name} {config[name]}, but its tensors {getattr(found, name)}")
    except (ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(folder)!r} is not a dictionary that can be read: {reason}") from error
    return found


_FORMER = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of a dictionary under the names of SAELens 6, with those of its `metadata` beside the others."""
    with opened(path) as file:
        try:
            record = parse_json(file.read())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    metadata = record.get("metadata") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(metadata, dict | None):
        raise ValueError(f"{str(path)!r} should be a record with names, not {shown(record)}")
    values: dict[str, Any] = {**(metadata or {}), **record}
    config = {_FORMER.get(name, name): value for name, value in values.items()}
    config.setdefault("architecture", "standard")
    if config["architecture"] == "standard" and config.get("activation_fn") == "topk":
        config |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    scaled = config.get("normalize_activations")
    if scaled is None or isinstance(scaled, bool):
        config["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    return config


def _supported(config: Mapping[str, Any]) -> str:
    """The architecture of a dictionary. Raises ValueError if it, or how it is used, is not supported."""
    architecture, head = config["architecture"], config.get("hook_head_index")
    if architecture == "matryoshka_batchtopk":
        architecture = "batchtopk"
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ValueError(f"its architecture is {shown(architecture)}, not one of {', '.join(_ARCHITECTURES)}")
    activation = config.get("activation_fn", "relu")
    if activation not in ("relu", "topk"):
        raise ValueError(f"its activation function is {shown(activation)}, not relu or topk")
    if config["normalize_activations"] == "expected_average_only_in":
        raise ValueError(
            "its activations are scaled by a factor that is not in the folder (normalize_activations is "
            "'expected_average_only_in'): fold the factor into its weights with SAELens, and save it again"
        )
    if config.get("finetuning_scaling_factor"):
        raise ValueError("it has a finetuning_scaling_factor, which is not supported")
    if head is not None:
        raise ValueError(f"it is of the head {shown(head)} alone, not of all that is at its hook point")
    return architecture


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary as float32; a scaling factor of 1, which some versions wrote, is left out."""
    regular_size(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    scaling = tensors.get("scaling_factor")
    if scaling is not None and bool((scaling == 1).all()):
        del tensors["scaling_factor"]
    return tensors


def _with_threshold(values: Mapping[str, Tensor], rescaled: bool) -> dict[str, Tensor]:
    """The tensors of a BatchTopK dictionary that was saved in training, with a threshold for each latent.

    `rescaled`: latents were multiplied by the norms of their decoder directions, which is done to the weights here.
    """
    norm = values["W_dec"].norm(dim=-1) if rescaled else torch.ones(len(values["W_dec"]))
    return {
        "W_enc": values["W_enc"] * norm,
        "b_enc": values["b_enc"] * norm,
        "W_dec": values["W_dec"] / norm[:, None],
        "b_dec": values["b_dec"],
        "threshold": values["threshold"].expand(len(norm)).clone(),
    }


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"its {name} should be true or false, not {shown(value)}")
    return value


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int:
        raise ValueError(f"its {name} should be a whole number, not {shown(value)}")
    return value


def _name(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"its {name} should be the name of a hook point, not {shown(value)}")
    return value
