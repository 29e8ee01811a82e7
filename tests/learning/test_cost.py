"""What learning does not compute and does not keep: the output is the same, and nothing is left behind."""

import gc

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.learning import memory
from bigram_circuits.masking.gates import group_gates
from bigram_circuits.masking.methods.continuous_sparsification import ContinuousSparsification
from bigram_circuits.models.activations import lean_forward, recomputed
from bigram_circuits.runs import RunFolder
from tests.conftest import D_VOCAB, planted_circuit

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (8, 32))
CORPUS = bc.Corpus.from_tokens(TEXT, TEXT[:2])
TARGET = bc.count_ngrams(TEXT, 2, d_vocab=D_VOCAB)
TOKENS = torch.from_numpy(TEXT[:2])


def gradient(model, *, low_memory=False):
    """Of the loss, with respect to every gate."""
    gates = ContinuousSparsification(group_gates(bc.weight_sites(model), {"attn": "weight", "mlp": "weight"}))
    with bc.gated(model, gates), lean_forward(model):
        gates.refresh(0)
        if low_memory:
            with recomputed(model):
                TARGET.cross_entropy(model(TOKENS), TOKENS).mean().backward()
        else:
            TARGET.cross_entropy(model(TOKENS), TOKENS).mean().backward()
    return gates.gradient.flat()


def graphs_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) and thing.grad_fn is not None for thing in gc.get_objects())


def test_a_lean_forward_pass_has_the_same_output_and_leaves_the_model_as_it_was(any_model):
    cached = any_model.original_model.config.use_cache
    replaced = {module for module in any_model.modules() if "forward" in vars(module)}
    with torch.no_grad():
        expected = any_model(TOKENS)
        with lean_forward(any_model):
            torch.testing.assert_close(any_model(TOKENS), expected)
            assert any_model.original_model.config.use_cache is False
    assert any_model.original_model.config.use_cache == cached
    assert {module for module in any_model.modules() if "forward" in vars(module)} == replaced
    with pytest.raises(RuntimeError, match="inside"), lean_forward(any_model), recomputed(any_model):
        raise RuntimeError("inside")
    assert {module for module in any_model.modules() if "forward" in vars(module)} == replaced


def test_hooks_on_norms_still_see_and_change_what_passes(any_model):
    name = next(n for n in any_model.hook_dict if n.endswith("ln1.hook_normalized"))
    seen = []
    hooks = any_model.hooks(fwd_hooks=[(name, lambda value, hook: seen.append(value))])
    with torch.no_grad(), hooks, lean_forward(any_model):
        any_model(TOKENS)
    assert len(seen) == 1
    hooks = any_model.hooks(fwd_hooks=[(name, lambda value, hook: seen.append(value))])
    with torch.no_grad(), lean_forward(any_model), hooks:  # placed later
        any_model(TOKENS)
    assert len(seen) == 2


def test_the_end_of_learning_holds_no_attention_pattern_and_no_copy_of_all_scores(tiny_model):
    gates = ContinuousSparsification(group_gates(bc.weight_sites(tiny_model), {"attn": "weight", "mlp": "weight"}))
    tokens = torch.from_numpy(TEXT)
    with memory._Record() as record:
        masks = gates.masks()
    largest = max(group.place.stop - group.place.start for group in gates.groups)
    assert len(gates.scores) > 4 * largest
    assert max(record.sizes) <= 4 * largest  # float32 scores of one matrix
    kept = bc.Subnetwork({site.name: site.from_stored(masks[site.name]) for site in bc.weight_sites(tiny_model)})
    with memory._Record() as record:
        bc.soft_hard_gap(tiny_model, gates, kept, TARGET, tokens, step=0)
    patterns = 4 * tokens.numel() * tokens.shape[1] * tiny_model.cfg.n_heads
    assert patterns not in record.sizes
    with memory._Record() as record, torch.no_grad():
        tiny_model(tokens)
    assert patterns in record.sizes  # of TransformerLens' own attention


def test_blocks_computed_twice_give_the_same_gradient(any_model):
    torch.testing.assert_close(gradient(any_model, low_memory=True), gradient(any_model), rtol=1e-4, atol=1e-7)


def test_blocks_that_are_computed_again_keep_less(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "_RETAINED_LOW", memory._RETAINED)  # the tensors alone
    recipes = {low: bc.SparsifyConfig(low_memory=low) for low in (False, True)}
    kept = {low: bc.forecast_memory(tiny_model, TARGET, CORPUS, recipe) for low, recipe in recipes.items()}
    assert kept[True].per_sequence < 0.75 * kept[False].per_sequence
    assert kept[True].gates < 0.7 * kept[False].gates


@pytest.mark.parametrize("low_memory", [False, True])
def test_no_graph_is_left_behind(tiny_folders, low_memory):
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    gradient(model)
    before = graphs_alive()
    config = bc.SparsifyConfig(max_steps=2, retries=0, low_memory=low_memory)
    bc.forecast_memory(model, TARGET, CORPUS, config)
    assert graphs_alive() == before
    bc.find_subnetwork(model, TARGET, CORPUS, config)
    assert graphs_alive() == before


@pytest.mark.parametrize(
    "method",
    ["continuous_sparsification", "straight_through", pytest.param("hard_concrete", marks=pytest.mark.slow)],
)
def test_low_memory_learns_as_well(method):
    planted = planted_circuit("neox")
    shared = {"method": method, "max_steps": 60, "retries": 0, "target_fraction": 0.2}
    shared |= {"beta_growth": 1.1} if method == "continuous_sparsification" else {}
    loss = {}
    for low_memory in (False, True):
        config = bc.SparsifyConfig(**shared, low_memory=low_memory)
        found = bc.find_subnetwork(planted.model, planted.target, planted.corpus, config)
        assert found.subnetwork.kept == round(0.2 * found.subnetwork.total)
        loss[low_memory] = bc.evaluate(
            planted.model, found.subnetwork, planted.target, planted.corpus.held_out, controls=False
        ).subnetwork.cross_entropy
    assert loss[True] < loss[False] + 0.3


def test_low_memory_continues_bit_for_bit(tiny_model, tmp_path, monkeypatch):
    config = bc.SparsifyConfig(max_steps=6, batch_size=4, low_memory=True, retries=0)
    whole = bc.find_subnetwork(tiny_model, TARGET, CORPUS, config)
    monkeypatch.setattr(RunFolder, "checkpoint_is_due", lambda *_: True)
    written = RunFolder.write_checkpoint

    def interrupted(self, checkpoint):
        written(self, checkpoint)
        if checkpoint.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bc.find_subnetwork(tiny_model, TARGET, CORPUS, config, run_dir=tmp_path / "run")
    monkeypatch.setattr(RunFolder, "write_checkpoint", written)
    again = bc.find_subnetwork(tiny_model, TARGET, CORPUS, config, run_dir=tmp_path / "run")
    assert again.subnetwork == whole.subnetwork
    assert [record["cross_entropy"] for record in again.history] == [r["cross_entropy"] for r in whole.history]
