"""A copy of the plain model behind a hooked one, with its weights as they are now."""

from __future__ import annotations

from typing import Any

import torch

from bigram_circuits.models.faithful import Agreement
from bigram_circuits.models.identity import config_hash_of, other_tensors
from bigram_circuits.models.layouts import huggingface_layout
from bigram_circuits.models.loading import plain_of
from bigram_circuits.models.model import Model
from bigram_circuits.models.plain import twin
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.weights import full_weights, weight_sites


@uses_model
def unhooked(model: Model) -> Any:
    """Copy the plain model behind a hooked one to the CPU, with the hooked model's weights as they are now.

    Masks that are applied do not matter.

    Raises:
        ValueError: If there is no plain model, or it is another one than was hooked.
        OSError: If the model was hooked by other means than `load_model`, and the files of that name do not exist.
    """
    plain = plain_of(model).model
    edited = f"the model {model.cfg.model_name!r} is not the plain model that it was hooked from"
    if config_hash_of(plain) != config_hash_of(model.original_model):
        raise ValueError(f"{edited}: the configurations differ; load it again")
    copied = twin(plain).eval()
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = tensor.data.to("cpu", copy=True)
    layout, state, others = huggingface_layout(model), copied.state_dict(), other_tensors(model)
    with torch.no_grad():
        for site in weight_sites(model):
            place = layout.places[site.name]
            place.view(state[place.parameter]).copy_(site.weight.view(place.sizes))
        for name in state.keys() & others.keys():
            state[name].copy_(others[name])
        with full_weights(model):
            agreement = Agreement(getattr(model.cfg, "checked", True))
            agreement.run_plain(copied)
            try:
                agreement.confirm(model)
            except ValueError as error:
                raise ValueError(f"{edited}: their logits differ; load it again, or save it and load that") from error
    return copied
