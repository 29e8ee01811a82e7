import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis.location import (
    by_head,
    by_layer,
    by_matrix,
    by_neuron,
    concentration,
    max_activating_tokens,
    neuron_counts,
    whole_neurons,
)
from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.masking.apply import masked


def some_weights(model, seed: int = 0, density: float = 0.3) -> bc.Subnetwork:
    generator = torch.Generator().manual_seed(seed)
    shapes = bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()})


def test_layers_matrices_and_heads_are_the_subnetworks_counts(any_model):
    subnetwork = some_weights(any_model)
    layers, matrices, heads = by_layer(subnetwork), by_matrix(subnetwork), by_head(subnetwork)
    assert layers.columns == ("attn", "mlp")
    assert layers.get("share_of_kept", "subnetwork").sum() == pytest.approx(1)
    assert matrices.get("share_of_kept", "subnetwork").sum() == pytest.approx(1)
    assert layers.get("density", "subnetwork")[1, 0] == subnetwork.by_component()[1, "attn"].fraction
    column = matrices.columns.index("W_out")
    assert matrices.get("density", "subnetwork")[0, column] == subnetwork.by_weight()["blocks.0.mlp.W_out"].fraction
    assert heads.get("density", "subnetwork")[1, 2] == subnetwork.by_head()[1, 2].fraction
    assert heads.get("density", "random")[1, 2] == subnetwork.random_like(0).by_head()[1, 2].fraction
    assert layers.plot("share_of_kept") is not None


def test_neurons_are_counted_in_all_their_matrices(any_model):
    full = bc.Subnetwork.full(any_model)
    chosen = bc.Subnetwork.empty(any_model).keep_neurons(1, [3, 7])
    gated = "blocks.0.mlp.W_gate" in full
    density = by_neuron(chosen).get("density", "subnetwork")
    assert density.shape == (2, 40)
    assert np.flatnonzero(density[1]).tolist() == [3, 7]
    assert density[1, 3] == 1
    assert by_neuron(chosen).get("share_of_kept", "subnetwork")[1, 7] == 0.5
    assert neuron_counts(chosen)[1].shape == (3 if gated else 2, 40)
    subnetwork = some_weights(any_model)
    counts = neuron_counts(subnetwork)[0]
    assert counts[0, 5] == int(subnetwork["blocks.0.mlp.W_in"][:, 5].sum())
    assert counts[-1, 5] == int(subnetwork["blocks.0.mlp.W_out"][5].sum())


def test_whole_neurons(tiny_model):
    sprinkled = some_weights(tiny_model, density=0.2).keep_neurons(0, [4]).drop_neurons(1, [9])
    result = whole_neurons(sprinkled, threshold=0.9)
    assert result.names == ("L0N4",)
    assert result.get("density") == {"L0N4": 1}
    assert result.get("density_W_out") == {"L0N4": 1}
    assert result.notes["neurons_that_reach_it"] == {"subnetwork": 1, "random": 0}
    many = whole_neurons(sprinkled, threshold=0, most=5)
    assert len(many.names) == 5
    assert many.names[0] == "L0N4"
    assert list(many.get("density").values()) == sorted(many.get("density").values(), reverse=True)
    assert whole_neurons(bc.Subnetwork.empty(tiny_model)).names == ()


def test_concentration_is_a_lorenz_curve(tiny_model):
    evenly = concentration(bc.Subnetwork.full(tiny_model))
    assert np.allclose(evenly.get("share_of_kept", "subnetwork"), evenly.points)
    assert evenly.notes["gini"]["subnetwork"] == pytest.approx(0, abs=1e-12)
    neurons = bc.Subnetwork.empty(tiny_model).keep_neurons(0, range(8))  # 8 of 80
    packed = concentration(neurons)
    curve = packed.get("share_of_kept", "subnetwork")
    assert curve[10] == pytest.approx(1)
    assert curve[5] == pytest.approx(0.5)
    assert packed.notes["gini"]["subnetwork"] == pytest.approx(0.9)
    assert packed.notes["gini"]["random"] < 0.7
    assert (np.diff(curve) >= 0).all()
    first = concentration(neurons, layers=[0]).get("share_of_kept", "subnetwork")
    assert first[20] == pytest.approx(1)
    assert concentration(some_weights(tiny_model)).notes["gini"]["subnetwork"] == pytest.approx(
        concentration(some_weights(tiny_model)).notes["gini"]["random"], abs=0.05
    )


def test_max_activating_tokens_are_means_by_current_token(any_model, random_tokens):
    subnetwork = some_weights(any_model)
    tokens = random_tokens % 20
    neurons = [(1, 3), (0, 7)]
    result = max_activating_tokens(any_model, neurons, subnetwork, tokens, k=4, min_count=4)
    assert result.conditions == ("full", "subnetwork", "complement", "random")
    with torch.inference_mode(), masked(any_model, subnetwork):
        _, cache = any_model.run_with_cache(torch.from_numpy(tokens))
    activations = cache["blocks.1.mlp.hook_post"][..., 3].numpy()
    means = {t: activations[tokens == t].mean() for t in range(20) if (tokens == t).sum() >= 4}
    best = sorted(means, key=lambda token: -means[token])[:4]
    assert result.text is not None
    assert result.text[1][0] == tuple(token_words(any_model, best))
    assert result.get("mean_activation", "subnetwork")[0] == pytest.approx([means[token] for token in best], abs=1e-5)
    assert result.get("count")[0].min() >= 4
    above = (means[best[0]] - activations.mean()) / activations.std()
    assert result.get("deviations", "subnetwork")[0, 0] == pytest.approx(above, rel=1e-3)


def test_fewer_tokens_than_asked_for_leave_cells_empty(tiny_model):
    tokens = np.array([[1, 2, 1, 2, 1, 2]])
    result = max_activating_tokens(tiny_model, [(0, 0)], tokens, k=3, min_count=1)
    assert result.text is not None
    assert result.text[0][0][2] == ""
    assert np.isnan(result.get("count")[0, 2])


def test_bad_input_is_said_in_one_line(tiny_model, random_tokens):
    empty = bc.Subnetwork.empty(tiny_model)
    with pytest.raises(ValueError, match="keeps no MLP weight there"):
        concentration(empty)
    with pytest.raises(ValueError, match="there is no layer 2: layers are 0 to 1"):
        concentration(bc.Subnetwork.full(tiny_model), layers=[2])
    with pytest.raises(ValueError, match="at least 2 points"):
        concentration(bc.Subnetwork.full(tiny_model), points=1)
    with pytest.raises(ValueError, match="threshold must be a share"):
        whole_neurons(empty, threshold=50)
    with pytest.raises(ValueError, match="most must be at least 1"):
        whole_neurons(empty, most=0)
    with pytest.raises(ValueError, match="there is no neuron 40 in layer 0: it has neurons 0 to 39"):
        max_activating_tokens(tiny_model, [(0, 40)], random_tokens)
    with pytest.raises(ValueError, match="there is no layer 2: layers are 0 to 1"):
        max_activating_tokens(tiny_model, [(2, 0)], random_tokens)
    with pytest.raises(ValueError, match="no token occurs 50 times in these 96 tokens"):
        max_activating_tokens(tiny_model, [(0, 0)], random_tokens, min_count=50)
    with pytest.raises(ValueError, match="at least one neuron"):
        max_activating_tokens(tiny_model, [], random_tokens)
    with pytest.raises(ValueError, match="no MLP weights"):
        neuron_counts(bc.Subnetwork({"blocks.0.attn.W_Q": torch.ones(2, 3, 4, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="no attention heads"):
        by_head(bc.Subnetwork({"blocks.0.mlp.W_in": torch.ones(2, 3, dtype=torch.bool)}))
    assert np.isnan(by_layer(empty).get("share_of_kept", "subnetwork")).all()


def test_the_earlier_name_still_works(tiny_model, random_tokens):
    with pytest.warns(DeprecationWarning, match="is called max_activating_tokens now"):
        earlier = bc.analysis.exciting_tokens(tiny_model, [(0, 1)], random_tokens, min_count=1)
    assert earlier.text == max_activating_tokens(tiny_model, [(0, 1)], random_tokens, min_count=1).text
