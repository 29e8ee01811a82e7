"""Share a subnetwork: as a plain Hugging Face model, as masks by Hugging Face name, or as a repository on the hub.

Folders are written atomically: built under a temporary name, then renamed.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.circuit import WEIGHT, Circuit
from bigram_circuits.masking.apply import MaskLike, as_mask
from bigram_circuits.models.layouts import huggingface_layout
from bigram_circuits.models.loading import hub_errors, is_local, plain_of
from bigram_circuits.models.model import Model
from bigram_circuits.models.native import is_native
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.unhooked import unhooked
from bigram_circuits.published import MODEL_KEY
from bigram_circuits.storage.files import whole_file, whole_folder
from bigram_circuits.storage.records import seal_tensors, write_tensors
from bigram_circuits.subnetwork import Subnetwork, SubnetworkLike, as_subnetwork

_HUB_FILE = "subnetwork.safetensors"
_HUB_ID = re.compile(r"([A-Za-z0-9_.-]{1,96}/)?[A-Za-z0-9_.-]{1,96}")
_HASH = re.compile(r"[0-9a-z:,]+")


@uses_model
def export_huggingface(model: Model, subnetwork: MaskLike, folder: str | os.PathLike[str]) -> Path:
    """Export the masked model, with every dropped weight set to 0, for `AutoModelForCausalLM.from_pretrained`.

    All weights are those of `model` as it is now; its files are not read again. Of a circuit of heads and neurons whose
    dropped nodes are 0, the weights that they own are dropped (`Circuit.weights`), which is the same model.

    Returns:
        The folder.

    Raises:
        ValueError: If the subnetwork does not fit the model, the folder is not empty, the model is no Hugging Face
            model, or a circuit is no set of weights: its dropped nodes are replaced by other values than 0, or are
            neither heads nor neurons.
        OSError: If the folder cannot be written.

    Example:
        >>> folder = bc.export_huggingface(model, found, "masked")  # for AutoModelForCausalLM.from_pretrained
    """
    subnetwork = _weights_of(model, subnetwork)
    if is_native(model.original_model):
        raise ValueError(
            f"{model.cfg.model_name!r} is not a Hugging Face model, but one of TransformerLens' own (boot_native): "
            f"export_masks or Subnetwork.save keep the masks"
        )
    with whole_folder(folder, replace=False) as temporary:
        layout, plain, tokenizer = huggingface_layout(model), unhooked(model), plain_of(model).tokenizer
        state = plain.state_dict()
        for name, place in layout.places.items():
            place.view(state[place.parameter]).masked_fill_(~subnetwork[name].view(place.sizes), 0)
        plain.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return Path(folder)


@uses_model
def export_masks(model: Model, subnetwork: MaskLike, path: str | os.PathLike[str]) -> Path:
    """Export boolean masks by Hugging Face parameter name; `import_published` reads them.

    Args:
        model: The model.
        subnetwork: A subnetwork of that model, or a circuit, as for `export_huggingface`.
        path: File to write, `.npz` or `.safetensors`.

    Raises:
        ValueError: If the subnetwork does not fit the model, the file has another suffix, or a circuit is no set of
            weights.
        OSError: If the file cannot be written.

    Example:
        >>> bc.export_masks(model, found, "masks.safetensors")  # by Hugging Face parameter name
    """
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"masks are written as .npz or .safetensors, but the file is {str(path)!r}")
    masks = _weights_of(model, subnetwork).to_huggingface(model)
    name = str(model.cfg.model_name)
    made_for = {} if is_local(name) else {MODEL_KEY: name}  # a local path means nothing to others
    with whole_file(path) as temporary:
        if path.suffix == ".safetensors":
            arrays = {key: mask.numpy() for key, mask in masks.items()}
            write_tensors(temporary, arrays, seal_tensors(arrays, made_for))
        else:
            with temporary.open("wb") as file:
                content: dict[str, Any] = {key: mask.numpy() for key, mask in masks.items()}
                content |= {key: np.array(value) for key, value in made_for.items()}
                np.savez_compressed(file, **content)  # a zip file, with a checksum per member
    return path


def check_is_of_weights(given: Any) -> None:
    """Raise ValueError if something is a circuit whose masked model is not that of a set of weights."""
    mask = as_mask(given)
    if not isinstance(mask, Circuit):
        return
    if mask.replacement.kind != "zero" and mask.kept < mask.total:
        raise ValueError(
            f"weights alone cannot hold a circuit whose nodes are replaced, replace={mask.replacement.kind!r}: "
            "Circuit.save keeps it, circuit.weights(model) are the weights that its nodes own"
        )
    other = next((name for name, (_, unit) in mask.places.items() if unit not in ("head", "neuron", WEIGHT)), None)
    if other is not None:
        raise ValueError(f"weights alone cannot hold this circuit: the nodes of {other} are no heads or neurons")


def _weights_of(model: Model, given: MaskLike) -> Subnetwork:
    """The weights that make the masked model."""
    mask = as_mask(given)
    mask.check_fits(model)
    check_is_of_weights(mask)
    return mask.weights(model) if isinstance(mask, Circuit) else mask


def push_subnetwork(
    subnetwork: SubnetworkLike,
    repo_id: str,
    *,
    private: bool = False,
    description: str = "",
    message: str | None = None,
) -> str:
    """Upload a subnetwork to the hub, with a model card; creates the repository if it does not exist.

    Args:
        subnetwork: The subnetwork; its file takes about one bit per maskable weight.
        repo_id: Name of the repository, `user/name`.
        private: Whether a new repository is private.
        description: Additional text for the model card, in Markdown.
        message: Commit message.

    Returns:
        The URL of the repository.

    Raises:
        OSError: If the hub cannot be reached, or refuses the upload.
        ValueError: If `repo_id` is not a valid repository name.

    Example:
        >>> bc.push_subnetwork(found, "me/my-subnetwork", private=True)
    """
    import huggingface_hub

    subnetwork = as_subnetwork(subnetwork)
    with tempfile.TemporaryDirectory() as folder, hub_errors("repository", repo_id):
        subnetwork.save(Path(folder) / _HUB_FILE)
        (Path(folder) / "README.md").write_text(model_card(subnetwork, repo_id, description), encoding="utf-8")
        hub = huggingface_hub.HfApi()
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message or f"Upload {subnetwork!r}")
    return str(address)


def pull_subnetwork(repo_id: str, model: Model, *, revision: str | None = None) -> Subnetwork:
    """Download a subnetwork that was uploaded by `push_subnetwork`, and check it against the model's weights.

    Raises:
        OSError: If the hub cannot be reached, or has no such repository or file.
        ValueError: If the file is damaged, or was made for other weights.

    Example:
        >>> subnetwork = bc.pull_subnetwork("me/my-subnetwork", model)
    """
    import huggingface_hub

    with hub_errors("repository", repo_id, revision):
        cached = huggingface_hub.try_to_load_from_cache(repo_id, _HUB_FILE, revision=revision)
    try:
        with hub_errors("repository", repo_id, revision):
            huggingface_hub.HfApi().model_info(repo_id, revision=revision, timeout=10)  # a download would try for long
            path = huggingface_hub.hf_hub_download(repo_id, _HUB_FILE, revision=revision)
    except OSError:
        if not isinstance(cached, str):
            raise
        path = cached  # without a network, the copy of an earlier download
    return Subnetwork.load(path, model)


def model_card(subnetwork: Subnetwork, repo_id: str, description: str = "") -> str:
    """Write a subnetwork's model card for the hub.

    A model's name may come from someone else's file: one that could not be a hub id is left out, as a folder's is.
    """
    name = subnetwork.model_name or ""
    on_hub = name != "reference" and not is_local(name) and _HUB_ID.fullmatch(name) is not None
    title = name if on_hub or name == "reference" else "a model"
    found_hash = subnetwork.weight_hash or ""
    known_hash = f"`{found_hash}`" if _HASH.fullmatch(found_hash) else "not recorded"
    header = ["library_name: bigram_circuits", "tags: [subnetwork, interpretability]"]
    header += [f"base_model: {name}"] if on_hub else []
    components = subnetwork.by_component()
    rows = [
        f"| {layer} | {component} | {count.kept:,} | {100 * count.fraction:.3g}% |"
        for (layer, component), count in components.items()
    ]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            f"# A subnetwork of {title}",
            "",
            f"{subnetwork.kept:,} of {subnetwork.total:,} attention and MLP weights "
            f"({100 * subnetwork.fraction:.3g}%); embeddings, normalisation and biases are all kept.",
            *(["", description] if description else []),
            "",
            "```python",
            "import bigram_circuits as bc",
            "",
            f'model = bc.load_model("{"path/to/the/model" if title == "a model" else name}")',
            f'subnetwork = bc.pull_subnetwork("{repo_id if _HUB_ID.fullmatch(repo_id) else "user/name"}", model)',
            "with bc.masked(model, subnetwork):",
            '    logits = model("The value of")',
            "```",
            "",
            "| layer | component | weights kept | of the component |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Hash of the weights it was made for: {known_hash}.",
            "",
        ]
    )
