"""Quantised weights, which no mask can drop one by one: recognised before a model is read, and refused.

A mask sets single weights to 0. Packed 8-bit and 4-bit weights are codes that stand for numbers only together with
scales, and their layers do not multiply by `weight`: a mask on it would change nothing, or something else. Neither
bitsandbytes nor any other of these libraries needs to be installed for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bigram_circuits.storage.records import shown

_LAYERS = ("Linear8bitLt", "Linear4bit", "LinearNF4", "LinearFP4", "Params4bit", "Int8Params")
"""Classes of bitsandbytes; other libraries are recognised by their tensors."""
_PACKED = ("qweight", "weight_packed", "qzeros", "SCB")
"""Tensors of layers of GPTQ, AWQ, compressed-tensors and bitsandbytes."""
_FILES = ("quantize_config.json", "quant_config.json")
"""Settings of GPTQ and AWQ beside a config.json that does not mention them."""


def kind_of_quantisation(module: nn.Module, weight: Any) -> str | None:
    """How a layer's weights are quantised, as a phrase such as `Linear4bit, uint8`; None if they are plain numbers.

    `weight` is its weight as stored, or whatever it has instead.
    """
    kinds = [one.__name__ for one in type(module).__mro__]
    if isinstance(weight, Tensor):
        kinds += [one.__name__ for one in type(weight).__mro__]
    found = next((kind for kind in kinds if kind in _LAYERS), None)
    found = found or next((type(module).__name__ for name in _PACKED if getattr(module, name, None) is not None), None)
    if found is None and isinstance(weight, Tensor):
        is_packed = not weight.is_floating_point() or weight.dtype.itemsize < 2
        if is_packed or type(weight).__module__.partition(".")[0] == "torchao":
            found = type(module).__name__ if is_packed else type(weight).__name__
    if found is None:
        return None
    return f"{found}, {str(weight.dtype).removeprefix('torch.')}" if isinstance(weight, Tensor) else found


def check_layer(name: str, module: nn.Module, weight: Any) -> None:
    """Raise ValueError if the weights of a layer, called by `name`, are quantised."""
    if (kind := kind_of_quantisation(module, weight)) is not None:
        raise ValueError(
            f"this model cannot be masked: {name} is quantised ({kind}): load the unquantised model, or dequantise it "
            f"(model.dequantize()) and load the result"
        )


def check_module(module: nn.Module) -> None:
    """Raise ValueError if any layer of a model is quantised, before it is hooked; the error names the first."""
    for path, part in module.named_modules():
        check_layer(path or type(part).__name__, part, getattr(part, "weight", None))


def check_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a model folder holds quantised weights by its settings; no weight is read.

    Args:
        folder: The folder.
        config: The contents of its `config.json`.
    """
    of_text = config.get("text_config")
    places = [config, of_text] if isinstance(of_text, Mapping) else [config]
    found = next((one["quantization_config"] for one in places if one.get("quantization_config")), None)
    beside = next((file for file in _FILES if (folder / file).is_file()), None)
    if found is None and beside is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    what = "quantization_config in config.json" + ("" if method is None else f", {shown(method)}")
    raise ValueError(
        f"the weights in the folder {str(folder)!r} are quantised ({what if found is not None else beside}), and masks "
        f"need plain ones: load the unquantised model, or save what model.dequantize() returns and load that"
    )
