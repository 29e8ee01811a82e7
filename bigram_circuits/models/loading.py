"""Load a model as a hooked `TransformerBridge`, from the hub or a folder.

Sizes and links are checked before large files are read; then, that the files hold every weight; then, that the hooked
model computes what the plain Hugging Face model does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bigram_circuits.environment import DEVICE, default_device
from bigram_circuits.models.converted import from_legacy_folder, from_legacy_hub, is_legacy_config, is_legacy_name
from bigram_circuits.models.faithful import Agreement, checked_weights
from bigram_circuits.models.hooking import hook, with_bos
from bigram_circuits.models.identity import config_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.native import is_native, rebuilt
from bigram_circuits.models.objects import check_tokenizer, hook_object
from bigram_circuits.models.plain import Plain, known_plain, remember_plain, twin
from bigram_circuits.models.precision import round_rotations
from bigram_circuits.models.quantised import check_folder as check_quantisation
from bigram_circuits.models.quiet import one_line, quiet_transformers
from bigram_circuits.models.state import usual_torch
from bigram_circuits.names import is_in_memory
from bigram_circuits.storage.records import count_tensors, parse_json, regular_size, shown
from bigram_circuits.text.tokenizers import remember_template, template_of

REFERENCE_FOLDER = Path(__file__).parent / "reference"
_LOGGER = logging.getLogger("bigram_circuits")
_PYTHIA = re.compile(
    r"(EleutherAI/)?pythia(-\d+(\.\d+)?[mb](-deduped)?)?(-v0|(-data|-weight)?-seed\d|-(hidden|attn|all)dropout)?"
)
_STANFORD = re.compile(r"stanford-crfm(/[a-z]+-gpt2-(small|medium)-x\d+)?")
_SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_LARGEST_SETTINGS = 1 << 26  # bytes of a JSON settings file
_WEIGHTS_IN_A_BYTE = 4  # at most, with 2-bit weights
_LEAST_BOUND = 1 << 16  # sizes up to here are never refused
_MOST_LAYERS = 1_000
_MOST_POSITIONS = 1 << 24  # of a context with rotary embeddings, which are computed as they are needed
_LEAST_PAIRS = 1 << 28  # of positions: masks of this size are never refused
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_SIZE = re.compile(
    r"vocab_size|n_embd|n_inner|n_layers?|n_heads?|d_model|d_ff|ffn_dim|head_dim|num_experts|num_local_experts"
    r"|((hidden|intermediate|embedding|moe_intermediate|word_embed_proj)_)(size|dim)"
    r"|num_(hidden_|decoder_)?layers|num_(attention|key_value)_heads|num_labels"
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@usual_torch()
def load_model(
    name: str | Path | Any = "reference",
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    check: bool = True,
) -> Model:
    """Load a causal language model as a TransformerLens `TransformerBridge`, in eval mode, with unprocessed weights.

    A model that is an object in memory is left as it is: the hooked model has modules of its own, over the same
    weights, and nothing is read from a name.

    Args:
        name: `"reference"` (the small trained model in this package), a Hugging Face hub id, or a local folder
            written by `save_pretrained` with a model and a tokenizer. A folder of that name takes precedence over the
            hub; a `Path` is always a folder. Models in TransformerLens' former format (a `config.json` with its own
            settings, and a `.pth` file; `NeelNanda/...` on the hub) are converted. Or an object: a Hugging Face causal
            language model (fine-tuned, edited, with adapters merged, compiled), TransformerLens' `NativeModel`, a model
            that tracr has compiled, or a `TransformerBridge`, which is returned as it is.
        tokenizer: A Hugging Face tokenizer: that of a model in memory, or one to use instead of a folder's. A model in
            memory can do without, but then takes token ids only.
        revision: Branch, tag or commit of a hub model; training checkpoints are published as revisions.
        device: Device to load the model onto; by default that of the environment variable `BIGRAM_CIRCUITS_DEVICE`, or
            CUDA if available, else the CPU; for an object, where it is.
        dtype: Precision of the weights, for example `torch.bfloat16` or `"bfloat16"`; float32 by default; for an
            object, its own. Another device or precision than its own makes a copy of an object's weights.
        check: Compare a forward pass on a few tokens with the plain Hugging Face model's, and refuse a hooked model
            that computes something else; False takes it as it is.

    Raises:
        FileNotFoundError: If `name` is a path that does not exist, or a folder without a model or a tokenizer.
        OSError: If the hub cannot be reached, or has no such model or revision.
        ValueError: If an argument is invalid, TransformerLens does not support the architecture, a weight is not in the
            files, or, with `check`, the hooked model does not compute what the plain one does. Of an object also if it
            is not a language model, has no weights, adapters or hooks of its own, or is split over devices.

    Example:
        >>> model = bc.load_model("reference", device="cpu")
        >>> logits = model("import os")  # [batch, pos, d_vocab]
    """
    if not isinstance(name, str | Path):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models on the hub, but this is an object in memory")
        return hook_object(
            name, tokenizer=tokenizer, check=check, device=None if device is None else _device(device),
            dtype=None if dtype is None else _precision(dtype),
        )  # fmt: skip
    known_as = full_name(name)
    source = _source(known_as)
    precision, device = _precision(dtype), _device(device)
    _LOGGER.debug("loading %r to %s as %s", known_as, device, precision)
    check_tokenizer(tokenizer)
    if is_in_memory(known_as):
        raise ValueError(f"the model {str(name)!r} was an object in memory: pass the object")
    converted = _converted(source, revision, precision)
    if converted is not None:
        tokenizer = converted.tokenizer if tokenizer is None else tokenizer
        model = hook(converted.model.to(device), tokenizer=tokenizer, name=known_as, check=check)
        model.cfg.revision = revision
        return model
    if is_local(source):
        _check_folder(source, str(name), needs_tokenizer=tokenizer is None)
        with quiet_transformers(), one_line(f"cannot load the model {str(name)!r}"):
            _check_matrices(source)
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models on the hub, but {str(name)!r} is a local folder")
    else:
        _check_hub(source, revision)
    from transformer_lens.model_bridge import TransformerBridge

    with quiet_transformers(), one_line(f"cannot load the model {str(name)!r}"):
        loader = _Loader(device, Agreement(check))
        given = {} if tokenizer is None else {"tokenizer": with_bos(tokenizer)}
        model: Any = TransformerBridge.boot_transformers(
            source, device=device, dtype=precision, revision=revision, model_class=loader, **given
        )
        if tokenizer is None and model.tokenizer is not None:
            tokenizer = _as_published(model.tokenizer, source, revision)
        if tokenizer is not None:
            remember_template(model.tokenizer, template_of(tokenizer))
        round_rotations(model)
        loader.agreement.confirm(model.eval())
    remember_plain(model, Plain(loader.plain, tokenizer))
    model.cfg.model_name = known_as
    model.cfg.checked = check
    model.cfg.revision = revision  # so that the same weights can be loaded again
    return model


def full_name(name: str | Path) -> str:
    """The name that finds a model from every working directory: `reference`, a hub id, or an absolute path."""
    if isinstance(name, str) and (name == "reference" or not is_local(name)):
        return name
    return os.path.abspath(Path(name).expanduser())


def _converted(source: str, revision: str | None, dtype: torch.dtype) -> Plain | None:
    """The plain model of a checkpoint in TransformerLens' former format; None if it is in Hugging Face's.

    Of these, a revision is the label of a training checkpoint.
    """
    folder = Path(source)
    if is_local(source):
        config = folder / "config.json"
        if not config.is_file() or not is_legacy_config(_settings(config)):
            return None
        _check_links(folder)
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models on the hub, but {source!r} is a local folder")
        return from_legacy_folder(folder, dtype=dtype)
    if not is_legacy_name(source):
        return None
    if revision is not None and not revision.isdecimal():
        raise ValueError(f"revision={revision!r} should be the number of a training checkpoint of {source!r}")
    _check_hub(source, None)
    with hub_errors("model", source):
        return from_legacy_hub(source, checkpoint=None if revision is None else int(revision), dtype=dtype)


class _Loader:
    """Loads a plain model for TransformerLens, which hooks a twin of it."""

    def __init__(self, device: str | torch.device, agreement: Agreement) -> None:
        self.agreement = agreement
        self.plain: Any = None
        self._device = device

    def from_pretrained(self, source: str, **options: Any) -> Any:
        """Load the plain model as the class for its architecture does, check its weights, and run it."""
        from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture

        architecture = next(iter(options["config"].architectures or ()), "")
        kind = get_hf_model_class_for_architecture(architecture)
        self.plain = checked_weights(kind, source, **options).to(self._device).eval()
        self.agreement.run_plain(self.plain)
        return twin(self.plain)


def _as_published(tokenizer: Any, folder: str, revision: str | None) -> Any:
    """A tokenizer without the changes of TransformerLens, which makes it add a BOS, or an EOS."""
    from transformer_lens.utilities.hf_utils import autotokenizer_with_special_token_compat

    source = str(tokenizer.name_or_path or folder)  # some architectures take their tokenizer from elsewhere
    of_model = {"revision": revision} if revision is not None and source == folder else {}
    return autotokenizer_with_special_token_compat(source, trust_remote_code=False, **of_model)


def model_source(model: Model) -> tuple[str, str | None]:
    """Return the folder or hub id that a model was loaded from, and its revision."""
    return _source(str(model.cfg.model_name)), getattr(model.cfg, "revision", None)


def _source(name: str) -> str:
    return str(REFERENCE_FOLDER) if name == "reference" else name


@usual_torch()
def plain_of(model: Model) -> Plain:
    """The plain model and tokenizer behind a hooked model.

    A model that was hooked by other means than `load_model` is read again from its name; one of TransformerLens' own
    (`boot_native`) is built again.

    Raises:
        OSError: If it has to be read again, and its files do not exist.
        ValueError: If it has to be read again, and a weight is not in the files.
    """
    known = known_plain(model)
    if known is not None:
        return known
    if is_native(model.original_model):
        return Plain(rebuilt(model), model.tokenizer)
    from transformers import AutoConfig, AutoTokenizer

    source, revision = model_source(model)
    if is_local(source):
        _check_folder(source, source)
    with quiet_transformers(), one_line(f"cannot load the model {source!r} again"):
        kind = type(model.original_model)
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        if config_hash(config) != config_hash(model.original_model.config):
            raise ValueError("its config.json is now that of another model")
        plain = checked_weights(kind, source, revision=revision, dtype=model.cfg.dtype, trust_remote_code=False)
        return Plain(plain.eval(), AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False))


def checkpoints(name: str) -> tuple[str, ...]:
    """List the published training checkpoints of a hub model, oldest first, as values of `revision` for `load_model`.

    Args:
        name: A hub id such as `"EleutherAI/pythia-70m"`, or a family: `"pythia"`, `"pythia-v0"`, `"stanford-crfm"`.
            The list is the family's known checkpoint schedule; the network is not used.

    Raises:
        ValueError: If no checkpoints are known for that name.

    Example:
        >>> bc.checkpoints("EleutherAI/pythia-70m")[:3]
        ('step0', 'step1', 'step2')
    """
    from transformer_lens.tools.model_registry import checkpoints as registry

    if _PYTHIA.fullmatch(name):
        steps = registry.PYTHIA_V0_CHECKPOINTS if name.endswith("-v0") else registry.PYTHIA_CHECKPOINTS
        return tuple(f"step{step}" for step in steps)
    if _STANFORD.fullmatch(name):
        return tuple(f"checkpoint-{step}" for step in registry.STANFORD_CRFM_CHECKPOINTS)
    raise ValueError(
        f"no training checkpoints of {name!r} are known; they are for 'pythia', 'pythia-v0' and 'stanford-crfm', and "
        f"for models of these families such as 'EleutherAI/pythia-70m'"
    )


def _precision(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as float32 or bfloat16, not {dtype!r}")
    return found


def _device(device: str | torch.device | None) -> str | torch.device:
    """Check that a device is here; by default it is that of the environment, or CUDA if available, else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        named = default_device()
        if named is None:
            return "cuda" if gpus else "cpu"
        try:
            return _device(named)
        except ValueError as error:
            raise ValueError(f"{DEVICE}: {error}") from error
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"there is no device {device!r}: use cpu, cuda, or cuda:1 and the like") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= gpus:
        there = f"{gpus} of them (cuda:0 to cuda:{gpus - 1})" if gpus else "no CUDA device"
        raise ValueError(f"the device {str(device)!r} is not here: PyTorch finds {there}; use cpu (--device cpu)")
    return device


def is_local(name: str) -> bool:
    """Whether a model name is a local path, looks like one, or is that of a model in memory."""
    return (
        is_in_memory(name)
        or Path(name).expanduser().exists()
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
    )


def _check_folder(source: str, name: str, *, needs_tokenizer: bool = True) -> None:
    """Raise an error, which calls the folder by `name`, unless `source` holds a model of possible sizes."""
    folder = Path(source)
    if folder.is_file():
        raise FileNotFoundError(f"{name!r} is a file, not a model folder")
    if not folder.is_dir():
        where = "" if name == source else f" (that is, {source!r})"
        raise FileNotFoundError(f"there is no model folder {name!r}{where}")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"the folder {name!r} holds an adapter (adapter_config.json): merge it into its base model "
            f"(merge_and_unload), save that with save_pretrained, and load the result"
        )
    if (folder / "progress.jsonl").is_file():
        raise ValueError(f"the folder {name!r} holds a run, not a model: name the model that it was made with")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the folder {name!r} is not a model: it has no config.json")
    if needs_tokenizer and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"the folder {name!r} has no tokenizer: put one there with tokenizer.save_pretrained, "
            "or give load_model a tokenizer="
        )
    if not _weight_files(folder):
        raise FileNotFoundError(f"the folder {name!r} has no weights: no .safetensors or .bin file")
    _check_links(folder)
    indices = sorted(file.name for file in folder.glob("*.index.json"))
    files = (*_SETTINGS_FILES, *indices)
    records = {file: _settings(folder / file) for file in files if (folder / file).is_file()}
    for index in indices:
        shards = records[index].get("weight_map", {})
        if not isinstance(shards, dict) or any(
            not isinstance(file, str) or Path(file).name != file for file in shards.values()
        ):
            raise ValueError(f"{str(folder / index)!r} names weights outside of its folder")
    check_quantisation(folder, records["config.json"])
    _check_sizes(folder, records["config.json"])


def _check_links(folder: Path) -> None:
    """Raise ValueError if a file of a model folder is a link to a file elsewhere.

    The hub's cache is made of such links, from `snapshots/COMMIT/` to `blobs/` of the same repository.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    for file in folder.iterdir():
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in inside):
            raise ValueError(
                f"{str(file)!r} is a link to {str(file.resolve())!r}, outside of the model's folder: copy the file "
                f"there, or load the folder that it is in"
            )


def _settings(path: Path) -> dict[str, Any]:
    """Read a small JSON file of a model folder, with limits on its size."""
    if regular_size(path) > _LARGEST_SETTINGS:
        raise ValueError(f"{str(path)!r} has {regular_size(path):,} bytes, more than settings need")
    try:
        record = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{str(path)!r} holds a {type(record).__name__}, not settings by name")
    return record


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if the config asks for sizes that the weight files are too small for, before any allocation."""
    weights = _weight_files(folder)
    most = _most_weights(folder)
    for at in (config, config.get("text_config")):
        sizes = {key: value for key, value in at.items() if _SIZE.fullmatch(key)} if isinstance(at, dict) else {}
        for key, value in sizes.items():
            if type(value) is not int and value is not None and not isinstance(value, list):
                raise ValueError(f"{str(folder / 'config.json')!r}: {key} should be a number, not {shown(value)}")
            bound = min(most, _most_layers(weights)) if "layer" in key else most
            if type(value) is int and not 0 <= value <= bound:
                raise ValueError(
                    f"{str(folder / 'config.json')!r}: {key} is {shown(value)}, but with these weights it is at most "
                    f"{bound:,}"
                )


def _weight_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin") and file.is_file()]


def _most_weights(folder: Path) -> int:
    return max(_LEAST_BOUND, sum(file.stat().st_size for file in _weight_files(folder)) * _WEIGHTS_IN_A_BYTE)


def _most_layers(weights: list[Path]) -> int:
    """Bound the number of layers by the number of tensors; if they cannot be counted, by a number no model reaches."""
    if any(file.suffix != ".safetensors" for file in weights):
        return _MOST_LAYERS
    try:
        return min(_MOST_LAYERS, sum(map(count_tensors, weights)))
    except ValueError:
        return _MOST_LAYERS  # a damaged file: loading it raises the error


def _check_matrices(folder: str) -> None:
    """Raise ValueError if a matrix would be larger than all weight files, also for sizes that transformers defaults."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    most = _most_weights(Path(folder))
    width = getattr(config, "hidden_size", None)
    is_rotary = getattr(config, "rope_parameters", None) is not None
    for key in ("hidden_size", "intermediate_size", "vocab_size", *_POSITIONS):
        size = getattr(config, key, None)
        if not isinstance(width, int) or not isinstance(size, int):
            continue
        is_position = key in _POSITIONS
        if (is_position and size > _MOST_POSITIONS) or (
            is_position and not is_rotary and size**2 > max(most, _LEAST_PAIRS)
        ):
            raise ValueError(f"a {key} of {size:,} is more than a context can be")
        if size * width > most and not (is_position and is_rotary):
            raise ValueError(f"a {key} of {size:,} by a hidden_size of {width:,} is more than its weight files hold")


def _check_hub(name: str, revision: str | None) -> None:
    """Query the hub once, so that a wrong name or a missing network fails at once instead of after many retries."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
            return  # in the local cache: no network is needed
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is not 'reference', a folder, or a hub id such as 'EleutherAI/pythia-70m'"
        ) from error
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError(f"the model {name!r} is not on this machine, and the hub is switched off (HF_HUB_OFFLINE)")
    with hub_errors("model", name, revision, or_else="; without a network, use 'reference' or a local folder"):
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)


@contextlib.contextmanager
def hub_errors(kind: str, name: str, revision: str | None = None, *, or_else: str = "") -> Iterator[None]:
    """Turn hub errors into one-line errors; `kind` is what was requested, for example `model`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is not a valid name on the hub, such as 'user/name'") from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"the {kind} {name!r} has no revision {revision!r}") from error
    except errors.GatedRepoError as error:
        raise OSError(
            f"the {kind} {name!r} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        no_folder = ", and no folder of that name here" if kind == "model" else ""
        raise OSError(f"there is no {kind} {name!r} on the hub{no_folder}") from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(f"cannot reach the model hub for the {kind} {name!r}, not downloaded already{or_else}") from error
    except errors.EntryNotFoundError as error:
        raise OSError(f"the {kind} {name!r} does not have the requested file") from error
    except errors.OfflineModeIsEnabled as error:
        raise OSError(f"the {kind} {name!r} is not on this machine, and the hub is switched off") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        raise OSError(f"the hub refused the {kind} {name!r} (HTTP {status}); `hf auth login` logs in") from error
    except (_http_error(), ConnectionError, TimeoutError) as error:
        raise OSError(
            f"cannot reach the model hub for the {kind} {name!r}, which is not a folder here nor downloaded already "
            f"({type(error).__name__}){or_else}"
        ) from error


def _http_error() -> type[Exception]:
    """Return the base error class of the HTTP library behind huggingface_hub, which depends on its version."""
    from huggingface_hub.utils import get_session

    return import_module(type(get_session()).__module__.partition(".")[0]).HTTPError
