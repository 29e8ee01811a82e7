"""Cosines, rotations and CKA against what they must be, and against what a planted circuit makes them."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis import geometry
from bigram_circuits.analysis.geometry import (
    cosine_to_unembedding,
    covariance_cosine,
    covariance_similarity,
    layer_rotations,
    linear_cka,
    rotation_angles,
    unbiased_hsic,
)
from bigram_circuits.models.activations import residual_streams


def rotation(degrees: float) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])


# --- cosine ---


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_an_embedding_has_cosine_1_with_itself(tiny_folders, random_tokens, name):
    model = bc.load_model(tiny_folders[name], device="cpu")
    found = cosine_to_unembedding(model, random_tokens)
    assert found.get("current_embedding")[0] == pytest.approx(1, abs=1e-6)
    assert found.get("current_embedding")[1] < 0.999
    assert abs(found.get("current_embedding_baseline")[0]) < 0.5


def test_cosines_are_those_of_torch(any_model, random_tokens):
    target = bc.count_ngrams(random_tokens, 2, d_vocab=257)
    found = cosine_to_unembedding(any_model, random_tokens, target=target)
    tokens = torch.from_numpy(random_tokens)
    with torch.no_grad():
        streams, logits = residual_streams(any_model, tokens)
        columns = any_model.W_U.T
        wanted = {
            "current_embedding": any_model.W_E[tokens[:, :-1]],
            "next_unembedding": columns[tokens[:, 1:]],
            "predicted_unembedding": columns[logits[:, :-1].argmax(-1)],
            "target_unembedding": columns[target.top1(tokens)[:, :-1]],
        }
    for name, vectors in wanted.items():
        cosine = torch.cosine_similarity(streams[:, :, :-1], vectors[None], dim=-1).mean((1, 2))
        np.testing.assert_allclose(found.get(name), cosine, atol=1e-5)
        low, high = found.interval(name)
        assert (low <= found.get(name)).all()
        assert (found.get(name) <= high).all()


def test_a_prompt_gives_a_matrix_by_layer_and_position(tiny_model):
    found = cosine_to_unembedding(tiny_model, ~bc.Subnetwork.empty(tiny_model).keep_layer(1), "abcdef")
    n = len(tiny_model.to_tokens("abcdef")[0])
    assert found.values.shape == (4, 4, 3, n)
    assert np.isnan(found.get("next_unembedding")[:, -1]).all()
    assert np.isfinite(found.get("next_unembedding")[:, :-1]).all()
    assert np.isnan(found.get("target_unembedding")).all()
    np.testing.assert_allclose(found.get("current_embedding", "subnetwork")[0], 1, atol=1e-6)


def test_a_planted_bigram_turns_towards_the_next_token_after_the_first_block(planted):
    model, subnetwork, tokens = planted
    target = bc.count_ngrams(tokens, 2, d_vocab=model.cfg.d_vocab)
    found = cosine_to_unembedding(model, subnetwork, tokens, target=target)
    for name in ("full", "subnetwork"):
        assert abs(found.get("target_unembedding", name)[0]) < 0.01
        assert (found.get("target_unembedding", name)[1:] > 0.3).all()
        assert found.get("current_embedding", name)[0] == pytest.approx(1, abs=0.01)
        assert (found.get("current_embedding", name)[1:] < 0.8).all()
        assert (found.get("next_unembedding", name)[1:] > found.get("next_unembedding_baseline", name)[1:] + 0.1).all()
    assert (np.abs(found.get("target_unembedding", "complement")) < 0.1).all()


def test_a_target_without_an_opinion_on_the_last_position(tiny_model, random_tokens):
    found = cosine_to_unembedding(tiny_model, random_tokens, target=bc.NextTokenTarget())
    np.testing.assert_allclose(found.get("target_unembedding"), found.get("next_unembedding"))


# --- rotation ---


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0, 135.0, 180.0])
def test_a_rotation_turns_by_its_angle(degrees):
    np.testing.assert_allclose(rotation_angles(rotation(degrees)), degrees, atol=1e-6)
    np.testing.assert_allclose(rotation_angles(3 * rotation(-degrees)), degrees, atol=1e-6)


def test_rotations_of_blocks_give_their_median():
    blocks = torch.block_diag(rotation(10.0), rotation(50.0), rotation(80.0))
    basis = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = basis @ blocks @ torch.linalg.inv(basis)
    assert rotation_angles(matrix).quantile(0.5).item() == pytest.approx(50, abs=1e-6)


def test_layers_that_only_add_constants_do_not_turn(tiny_model):
    tokens = np.random.default_rng(0).integers(0, 257, size=(40, 16))
    found = layer_rotations(tiny_model, bc.Subnetwork.empty(tiny_model), tokens, alpha=1e-4)
    np.testing.assert_allclose(found.get("output_angle", "subnetwork"), 0, atol=0.5)
    assert found.get("output_angle", "full")[0] > 2
    assert found.get("output_angle", "full")[-1] == pytest.approx(0, abs=0.5)
    assert found.get("output_complex", "full")[0] > 0.3
    with pytest.raises(ValueError, match="need a text"):
        layer_rotations(tiny_model)


# --- covariance similarity ---


def activations(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_cka_of_the_same_and_of_an_orthogonal_image_is_1():
    x = activations(100, 20, 0) * torch.arange(1, 21)
    orthogonal = torch.linalg.qr(activations(20, 20, 1)).Q
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, 7 * x @ orthogonal + 100) == pytest.approx(1, abs=1e-4)
    assert linear_cka(x, x * torch.arange(20, 0, -1)) < 0.95


def test_cka_of_independent_noise_is_near_0_also_with_fewer_tokens_than_dimensions():
    found = [linear_cka(activations(60, 200, seed), activations(60, 200, seed + 100)) for seed in range(20)]
    assert abs(np.mean(found)) < 0.02
    x, y = (activations(60, 200, seed) for seed in (0, 100))
    biased = [one - one.mean(0) for one in (x, y)]
    by_norms = (biased[0].T @ biased[1]).norm() ** 2 / (
        (biased[0].T @ biased[0]).norm() * (biased[1].T @ biased[1]).norm()
    )
    assert by_norms > 0.5  # the control: the biased estimate sees similarity where there is none


def test_cka_of_many_tokens_is_the_ratio_of_norms():
    x = activations(4000, 6, 0)
    y = x @ activations(6, 5, 1) + activations(4000, 5, 2)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    norms = [(a.T @ b).norm() for a, b in ((centred_x, centred_y), (centred_x, centred_x), (centred_y, centred_y))]
    assert linear_cka(x, y) == pytest.approx(float(norms[0] ** 2 / (norms[1] * norms[2])), abs=2e-3)


def test_hsic_is_the_formula_of_song_et_al():
    x, y = activations(9, 4, 0).double(), activations(9, 3, 1).double()
    k, m = (one @ one.T for one in (x, y))
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    n, one = 9, torch.ones(9, dtype=torch.float64)
    wanted = (
        torch.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
    ) / (n * (n - 3))
    assert unbiased_hsic((x @ x.T)[None], (y @ y.T)[None])[0, 0].item() == pytest.approx(wanted.item())


def test_layers_of_a_model_by_similarity(tiny_model):
    tokens = np.random.default_rng(0).integers(0, 257, size=(20, 16))
    found = covariance_similarity(tiny_model, bc.Subnetwork.empty(tiny_model), tokens, tokens_at_once=64)
    assert found.conditions == ("full", "subnetwork", "full (rows) and subnetwork")
    for name in ("full", "subnetwork"):
        np.testing.assert_allclose(np.diag(found.get("cka", name)), 1, atol=1e-5)
        np.testing.assert_allclose(found.get("cka", name), found.get("cka", name).T, atol=1e-5)
    np.testing.assert_allclose(found.get("cka", "subnetwork"), 1, atol=1e-4)  # blocks that only add constants
    between = found.get("cka", "full (rows) and subnetwork")
    np.testing.assert_allclose(between[0], 1, atol=1e-4)  # both start with the same embeddings
    assert between[2, 0] < 0.999
    np.testing.assert_allclose(between[:, 0], found.get("cka", "full")[:, 0], atol=1e-4)
    alone = covariance_similarity(tiny_model, tokens, tokens_at_once=64)
    np.testing.assert_allclose(alone.get("cka"), found.get("cka", "full"), atol=1e-5)


def test_too_few_tokens_are_told(tiny_model):
    with pytest.raises(ValueError, match="at least 4 tokens, not 3"):
        linear_cka(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="at least 4 tokens, not 2"):
        covariance_similarity(tiny_model, np.array([[1, 2]]))


def test_a_constant_layer_has_no_similarity():
    assert np.isnan(linear_cka(torch.ones(10, 3), activations(10, 3, 0)))
    assert geometry._CKA.name == "cka"


# --- the Frobenius cosine of covariances ---


def cosine_by_numpy(x, y):
    """From singular values of centred activations, as one would do it with all of them in memory."""
    rests = []
    for one in (np.asarray(x, dtype=float), np.asarray(y, dtype=float)):
        _, values, directions = np.linalg.svd(one - one.mean(0), full_matrices=False)
        values[0] = 0
        rests.append((directions.T * values**2) @ directions / len(one))
    return (rests[0] * rests[1]).sum() / np.linalg.norm(rests[0]) / np.linalg.norm(rests[1])


def test_the_cosine_of_covariances_is_that_of_numpy():
    x = activations(60, 7, 0) * torch.arange(1, 8) + 5
    y = x @ activations(7, 7, 1)
    assert covariance_cosine(x, y[:40]) == pytest.approx(cosine_by_numpy(x, y[:40]), abs=1e-9)
    assert covariance_cosine(x, 3 * x + 100) == pytest.approx(1, abs=1e-9)
    outlier = torch.zeros(7)
    outlier[2] = 1
    loud = y + 1e3 * activations(60, 1, 2) * outlier  # a direction of extreme variance in one of them hides nothing
    assert covariance_cosine(y, loud) < 1 - 1e-3
    assert covariance_cosine(loud, loud.flip(0)) == pytest.approx(1, abs=1e-9)


def test_the_cosine_of_covariances_depends_on_the_basis_and_cka_does_not():
    x = activations(100, 20, 0) * torch.arange(1, 21)
    turned = x @ torch.linalg.qr(activations(20, 20, 1)).Q
    assert linear_cka(x, turned) == pytest.approx(1, abs=1e-4)
    assert covariance_cosine(x, turned) < 0.9


def test_activations_along_one_line_have_no_cosine():
    line = torch.linspace(0, 1, 10, dtype=torch.float64)[:, None] * torch.arange(3) + 7
    assert np.isnan(covariance_cosine(line, activations(10, 3, 0)))
    with pytest.raises(ValueError, match="at least 2 tokens, not 1"):
        covariance_cosine(torch.ones(1, 3), activations(10, 3, 0))


def test_layers_by_the_cosine_of_covariances(any_model, random_tokens):
    some = ~bc.Subnetwork.empty(any_model).keep_layer(1)
    found = covariance_similarity(any_model, some, random_tokens, measure="covariance_cosine")
    streams = []
    for kept in (bc.Subnetwork.full(any_model), some):
        with torch.no_grad(), bc.masked(any_model, kept):
            streams.append(residual_streams(any_model, torch.from_numpy(random_tokens))[0].flatten(1, 2).numpy())
    full, alone = streams
    for name, rows, columns in (
        ("full", full, full), ("subnetwork", alone, alone), ("full (rows) and subnetwork", full, alone),
    ):  # fmt: skip
        wanted = [[cosine_by_numpy(x, y) for y in columns] for x in rows]
        np.testing.assert_allclose(found.get("covariance_cosine", name), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="measure must be one of cka, covariance_cosine, not 'cosine'"):
        covariance_similarity(any_model, random_tokens, measure="cosine")
