"""On devices that are not there: a forgotten `.to(device)` raises here as on a GPU, in every function of a model.

The devices are those of `tests/pretend_device.py`. The functions are those of `tests/models/test_state.py`.
"""

import numpy as np
import pytest
import torch
from transformers import GPT2Config

import bigram_circuits as bc
from tests.conftest import D_VOCAB, save_tiny
from tests.models.test_state import TEXT, USES
from tests.pretend_device import PretendTensor, move, moving_inputs, pretended

pytestmark = pytest.mark.usefixtures("one_thread")

SPREAD = (
    "evaluate", "find_subnetwork", "find_circuit", "granularity", "ModelTarget", "logit_lens", "ablate", "attention",
)  # fmt: skip
"""What also runs on two devices: explanations, edges and polishing take a model on one."""

ALIKE = {
    "prompt_lens", "prompt_cosine", "covariance_cosine", "ablate_means", "predicted_effects", "neuron_map",
    "faithfulness_to", "norm_effect", "retrieval_scores",
}  # fmt: skip
"""What runs the same code as another of them does."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = GPT2Config(vocab_size=D_VOCAB, n_embd=24, n_layer=2, n_head=4, n_inner=20, n_positions=64)
    return save_tiny(tmp_path_factory.mktemp("devices"), config)


@pytest.fixture(scope="module", params=[1, 2], ids=["one device", "two devices"])
def placed(request, folder):
    """A model on a device that is not there, or on two, and how many they are."""
    model = bc.load_model(folder, device="cpu")
    if request.param == 2:
        move(model.blocks[1], "cuda:1")
        moving_inputs(model.blocks[1], "cuda:1")
        moving_inputs(model.ln_final, "cuda:0")
    move(model, "cuda:0")
    model.cfg.device, model.cfg.n_devices = "cuda:0", request.param
    return model, request.param


@pytest.mark.parametrize(
    ("placed", "name"),
    [(1, name) for name in USES if name not in ALIKE] + [(2, name) for name in SPREAD],
    indirect=["placed"],
    scope="module",
)
def test_no_tensor_is_on_another_device(placed, monkeypatch, name):
    model, _ = placed
    with pretended(monkeypatch):
        corpus, target = bc.Corpus.from_tokens(TEXT[:2, :6], TEXT[:4, :6]), bc.count_ngrams(TEXT, d_vocab=D_VOCAB)
        USES[name](model, target, corpus)


def test_every_gate_is_on_the_device_of_its_weight(placed, monkeypatch):
    model, devices = placed
    with pretended(monkeypatch):
        config = bc.SparsifyConfig()
        gates, _ = bc.masking.candidates.Candidates(model, config).gates(config, 0, None)
        assert len(gates.scores.tensors) == devices
        for group in gates.groups:
            assert gates.scores[group.place].device == group.site.original.device


def test_masks_do_not_depend_on_the_devices(placed, folder, monkeypatch):
    model, _ = placed
    corpus, config = bc.Corpus.from_tokens(TEXT, TEXT), bc.SparsifyConfig(max_steps=4, batch_size=3)
    plain = bc.find_subnetwork(bc.load_model(folder, device="cpu"), bc.NextTokenTarget(), corpus, config)
    with pretended(monkeypatch):
        found = bc.find_subnetwork(model, bc.NextTokenTarget(), corpus, config, check_memory="off")
    assert [one.cross_entropy for one in found.history] == pytest.approx([one.cross_entropy for one in plain.history])
    assert sum(int((found.mask[name] ^ plain.mask[name]).sum()) for name in found.mask) <= 2


# --- the devices that are not there ---


def test_they_refuse_what_cuda_refuses_and_allow_what_it_allows(monkeypatch):
    with pretended(monkeypatch):
        here = torch.arange(6.0)
        there, other = here.to("cuda:0"), here.to("cuda:1")
        assert (here.device.type, there.device, other.device.index) == ("cpu", torch.device("cuda:0"), 1)
        assert torch.zeros(2, device="cuda").device == torch.zeros(2, device=there.device).device == there.device
        for one, two in ((here, there), (there, other), (there, torch.tensor(1.0, device="cuda:1"))):
            with pytest.raises(RuntimeError, match="to be on the same device"):
                one + two
        with pytest.raises(RuntimeError, match="to be on the same device"):
            torch.nn.functional.embedding(torch.tensor([1]), there[:, None])
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        assert (there + torch.tensor(1.0)).tolist() == (here + 1).tolist()
        assert there[torch.tensor([1, 3])].tolist() == there[[1, 3]].tolist() == [1, 3]
        assert np.array_equal(there.cpu().numpy(), here.numpy())
        assert here.copy_(other) is here
        assert other.to(there).device == there.device
        assert there.sum().item() == 15
        there[2:].mul_(2)
        assert there.tolist() == [0, 1, 4, 6, 8, 10]
        weight = other.clone().requires_grad_()
        (weight.to("cuda:0") * there).sum().backward()
        assert weight.grad.device == other.device
        assert weight.grad.tolist() == there.tolist()


def test_a_forgotten_move_is_noticed(placed, monkeypatch):
    model, devices = placed
    with pretended(monkeypatch):
        with pytest.raises(RuntimeError, match="to be on the same device"):
            model(torch.from_numpy(TEXT[:1]))
        logits = model(torch.from_numpy(TEXT[:1]).to("cuda:0"))
        assert isinstance(logits, PretendTensor)
        if devices == 2:
            seen = []
            model.run_with_hooks(
                torch.from_numpy(TEXT[:1]).to("cuda:0"),
                fwd_hooks=[("blocks.1.hook_resid_post", lambda v, hook: seen.append(v))],
            )
            with pytest.raises(RuntimeError, match="to be on the same device"):
                seen[0] + model.W_E[0]
