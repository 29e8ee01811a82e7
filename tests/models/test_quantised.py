"""Precisions: 16-bit checkpoints are the float32 one, rounded; quantised ones are refused in a line with a remedy.

The libraries that quantise are not installed: the layers and tensors here have their names and shapes.
"""

import json

import pytest
import torch
from torch import nn

import bigram_circuits as bc
from bigram_circuits.models.quantised import check_folder, check_module
from tests.conftest import TINY_CONFIGS, save_tiny


def packed(kind, weight):
    """A linear layer of a quantising library: a subclass of `nn.Linear` with codes as its weight."""
    layer = type(kind, (nn.Linear,), {})(4, 4)
    del layer.weight
    layer.weight = weight
    return layer


def gptq():
    layer = type("QuantLinear", (nn.Module,), {})()
    layer.register_buffer("qweight", torch.zeros(1, 4, dtype=torch.int32))
    return layer


def torchao():
    weight = torch.randn(24, 24).as_subclass(
        type("AffineQuantizedTensor", (torch.Tensor,), {"__module__": "torchao.x"})
    )
    layer = nn.Linear(24, 24)
    layer.weight = nn.Parameter(weight)
    return layer


LAYERS = {
    "Linear8bitLt, int8": lambda: packed("Linear8bitLt", torch.zeros(24, 24, dtype=torch.int8)),
    "Linear4bit, uint8": lambda: packed("Linear4bit", torch.zeros(288, 1, dtype=torch.uint8)),
    "QuantLinear": gptq,
    "AffineQuantizedTensor, float32": torchao,
    "Fp8, float8_e4m3fn": lambda: packed("Fp8", torch.zeros(24, 24).to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_quantised_layer_is_refused_by_name_with_the_remedy(kind, tiny_folders):
    model = bc.load_model(tiny_folders["llama"], device="cpu")
    model.blocks[1].attn.o._modules["_original_component"] = LAYERS[kind]()
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.W_O is quantised") as caught:
        bc.weight_sites(model)
    assert f"({kind})" in str(caught.value)
    assert "model.dequantize()" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_so_is_a_plain_module_before_it_is_hooked(kind):
    plain = nn.ModuleDict({"embed": nn.Embedding(3, 4), "first": nn.Linear(4, 4)})
    check_module(plain)
    plain["second"] = LAYERS[kind]()
    with pytest.raises(ValueError, match="second is quantised"):
        check_module(plain)


def test_a_folder_is_refused_by_its_config_before_any_weight_is_read(tmp_path):
    check_folder(tmp_path, {"model_type": "llama", "quantization_config": None})
    for settings in ({"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}):
        for config in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
            with pytest.raises(ValueError, match=r"quantised \(quantization_config in config.json") as caught:
                check_folder(tmp_path, config)
            assert ("'gptq'" in str(caught.value)) == ("bits" in settings)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    with pytest.raises(ValueError, match=r"quantize_config.json.*dequantize"):
        check_folder(tmp_path, {"model_type": "llama"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_16_bits_is_the_one_in_32_rounded(dtype, tmp_path):
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS["llama"])
    whole, rounded = bc.load_model(folder, device="cpu"), bc.load_model(folder, device="cpu", dtype=dtype)
    assert bc.same_model(bc.weight_hash(whole), bc.weight_hash(rounded))
    bc.Subnetwork.full(whole).save(tmp_path / "mask.safetensors")
    bc.Subnetwork.load(tmp_path / "mask.safetensors", rounded)
    rounded.blocks[0].attn.q.weight.data[0, 0] += 1
    assert not bc.same_model(bc.weight_hash(whole), bc.weight_hash(rounded))
