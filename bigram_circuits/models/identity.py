"""Which model is it? A hash of everything that its logits depend on, in every precision that it can be rounded to.

A hash is a text of parts, `float32:…,float16:…,bfloat16:…,maskable:…,config:…`, each a digest:

- for the precision that the weights were loaded in, and for every lower one that they can be rounded to, one of all
  parameters and persistent buffers but for the maskable weights in bfloat16;
- `maskable`, of the maskable weights in bfloat16: the whole hash in version 0.1.0;
- `config`, of the settings of the architecture.

Two hashes are compared in the highest precision that both have. So a checkpoint loaded in float32 and in bfloat16 is
one model, while two models in float32 are told apart by a single bit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from bigram_circuits.models.model import Model
from bigram_circuits.models.native import is_native
from bigram_circuits.models.state import memo, uses_model
from bigram_circuits.models.weights import fused_modules, weight_sites
from bigram_circuits.names import short_hash

_PRECISIONS = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
"""From the highest to the lowest; a float16 weight is rounded to bfloat16, not the other way round."""
_LONGEST = 32  # hexadecimal digits of a digest
_WORDS = {"config": "a configuration", "maskable": "attention and MLP weights"}
_NO_COMMON = "float16 and bfloat16 cannot be compared if the checkpoint is finer: load one of them in float32"
_FORMER = re.compile(r"[0-9a-f]{32}")
_HASH = re.compile(r"\w+:[0-9a-f]+(?:,\w+:[0-9a-f]+)+|\b[0-9a-f]{32}\b")
_NO_MATTER = re.compile(  # settings that logits in eval mode do not depend on
    r"_.*|.*_token_id|.*(dropout|pdrop|drop)(_.*)?|initializer_.*|.*_initializer_range|init_.*|.*_std|use_cache|"
    r"tie_word_embeddings|architectures|(torch_)?dtype|transformers_version|output_.*|return_dict|attn_implementation|"
    r"attn_impl|id2label|label2id|num_labels|problem_type|chunk_size_feed_forward|gradient_checkpointing|summary_.*|"
    r"router_aux_loss_coef|is_(encoder_)?decoder|pretraining_tp|task_specific_params|tokenizer_class|cache_.*"
)

_OF_NATIVE = (  # settings of TransformerLens' own models that logits depend on, but for sizes that weights show
    "n_heads", "n_key_value_heads", "normalization_type", "final_rms", "eps", "act_fn", "gated_mlp", "attention_dir",
    "attn_scale", "use_attn_scale", "attn_scores_soft_cap", "output_logits_soft_cap", "positional_embedding_type",
    "rotary_dim", "rotary_base", "rope_scaling", "n_ctx",
)  # fmt: skip


@uses_model
def weight_hash(model: Model) -> str:
    """Hash all weights and the configuration, to tell models and checkpoints apart; `same_model` compares two hashes.

    The hash has a part for the precision of the weights and for each lower one, so a checkpoint is recognised in
    float32 and in bfloat16. Masks that are applied do not matter. Hashing reads every weight: within one call of a
    public function, during which nobody edits them, a model is hashed at most once.

    Example:
        >>> bc.weight_hash(model) == found.subnetwork.weight_hash
        True
    """
    known, key = memo(), ref(model)
    assert known is not None, "uses_model opens a memo"
    if key not in known:
        known[key] = _hash_of(model)
    return known[key]


def same_model(one: str | None, other: str | None) -> bool:
    """Whether two hashes are of the same model, as far as both tell; None is the hash of an unknown model.

    Example:
        >>> bc.same_model(found.subnetwork.weight_hash, bc.weight_hash(model))
        True
    """
    return one == other or (one is not None and other is not None and how_models_differ(one, other) is None)


def how_models_differ(one: str, other: str) -> str | None:
    """A phrase that says in what the models of two hashes differ, with both digests; None if they are the same."""
    mine, theirs = _parts(one), _parts(other)
    highest = next((name for name in _PRECISIONS.values() if name in mine and name in theirs), "bfloat16")
    compared = ["config", *(["maskable"] if highest == "bfloat16" else []), highest]
    shared = [name for name in compared if name in mine and name in theirs]
    if not shared and one != other:
        return f"hash {one!r}, not {other!r}"
    for name in shared:
        if mine[name] != theirs[name]:
            what = _WORDS.get(name, f"weights in {name}")
            says = f"{what} with hash {short_hash(mine[name])}, not {short_hash(theirs[name])}"
            return f"{says}; {_NO_COMMON}" if name != "config" and _are_both_narrow(mine, theirs) else says
    return None


def _are_both_narrow(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether one is of weights in float16 and the other of weights in bfloat16, neither rounded to the other."""
    highest = {next((name for name in _PRECISIONS.values() if name in parts), None) for parts in (one, other)}
    return highest == {"float16", "bfloat16"}


def check_is(model: Model, made_for: str | None, what: str) -> None:
    """Raise ValueError if the hash `made_for` is of another model; None, of an unknown one, is not checked.

    `what` begins the sentence, for example "the mask m.safetensors was made for 'gpt2'".
    """
    how = None if made_for is None else how_models_differ(made_for, weight_hash(model))
    if how is not None:
        raise ValueError(f"{what}, but {model.cfg.model_name!r} is another model ({how})")


def same_text(one: str | None, other: str | None) -> bool:
    """Whether two texts are the same but for hashes in them, which may be of the same model in different precisions."""
    if one is None or other is None or one == other:
        return one == other
    hashes = zip(_HASH.findall(one), _HASH.findall(other), strict=False)
    return _HASH.sub("", one) == _HASH.sub("", other) and all(same_model(*pair) for pair in hashes)


def config_hash(config: Any) -> str:
    """Hash the settings of a Hugging Face configuration that logits depend on, but for those left at their defaults."""
    return _digest_of_settings(_settings(config))


def config_hash_of(module: Any) -> str:
    """The `config_hash` of a module, hooked or not; of TransformerLens' `NativeModel`, of the settings in its `cfg`."""
    if not is_native(module):
        return config_hash(module.config)
    return _digest_of_settings({name: getattr(module.cfg, name, None) for name in _OF_NATIVE})


def _digest_of_settings(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_LONGEST]


def _parts(whole: str) -> Mapping[str, str]:
    """The digests of a hash by name."""
    if _FORMER.fullmatch(whole):
        return {"maskable": whole}
    return dict(part.split(":", 1) for part in whole.split(",") if ":" in part)


def _settings(config: Any) -> dict[str, Any]:
    """The settings that matter, without those that have their default: a later version may add some."""
    try:
        defaults = type(config)().to_dict()
    except (TypeError, ValueError):
        defaults = {}
    return {
        key: _without(value)
        for key, value in config.to_dict().items()
        if not _NO_MATTER.fullmatch(str(key)) and (key == "model_type" or value != defaults.get(key, ...))
    }


def _without(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {str(key): _without(inner) for key, inner in value.items() if not _NO_MATTER.fullmatch(str(key))}


def _hash_of(model: Model) -> str:
    sites = weight_sites(model)
    others = other_tensors(model)
    canonical = {f"{site.name} {site.shape}": site.weight for site in sites}
    stored = {site.name: site.original.detach() for site in sites} | others
    precisions = list(_PRECISIONS)
    dtypes = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
    precisions = precisions[max(map(precisions.index, dtypes)) :]
    jobs: dict[str, tuple[dict[str, Tensor], torch.dtype, Any]] = {
        _PRECISIONS[dtype]: (stored, dtype, hashlib.sha256()) for dtype in precisions[:-1]
    }
    jobs["bfloat16"] = (others, torch.bfloat16, hashlib.sha256())
    jobs["maskable"] = (canonical, torch.bfloat16, hashlib.blake2b(digest_size=16))
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(jobs)))) as pool:
        digests = dict(zip(jobs, pool.map(lambda job: _digest_of(*job), jobs.values()), strict=True))
    digests["config"] = config_hash_of(model.original_model)
    return ",".join(f"{name}:{digest}" for name, digest in digests.items())


def _digest_of(tensors: Mapping[str, Tensor], dtype: torch.dtype, digest: Any) -> str:
    """Hash tensors by name; those of floating point are rounded first."""
    for name, tensor in tensors.items():
        label = name if name.endswith(")") else f"{name} {tuple(tensor.shape)}"
        digest.update(label.encode())
        rounded = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).cpu().contiguous()
        digest.update(rounded.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_LONGEST]


def other_tensors(model: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers that are no maskable weights, by Hugging Face name, without unused ones.

    A buffer of zeros is left out: TransformerLens adds some.
    """
    sites = weight_sites(model)
    leaves = {id(site.leaf) for site in sites}
    unused = {id(module) for module in fused_modules(model, sites)}
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.original_model.named_modules(remove_duplicate=False):
        if id(module) in unused or "parametrizations" in path.split("."):
            continue
        buffers = {
            name: buffer
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set and bool(buffer.any())
        }
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is None or (id(module) in leaves and name == "weight"):
                continue
            full = f"{path}.{name}".replace("_original_component.", "")
            known = found.get(id(tensor), ("", tensor))[0]
            found[id(tensor)] = max(full, known, key=lambda one: (len(one), one)), tensor  # TransformerLens' is shorter
    return dict(sorted(found.values()))
