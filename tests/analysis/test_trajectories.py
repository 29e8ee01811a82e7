import math

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import bigram_circuits as bc
from bigram_circuits.analysis import trajectories
from bigram_circuits.analysis.overlap import jaccard
from bigram_circuits.analysis.trajectories import faithfulness_to, subnetworks_over_training, trajectory
from bigram_circuits.targets.model import ModelTarget
from tests.conftest import D_VOCAB, save_tiny

SMALL = {"vocab_size": D_VOCAB, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three checkpoints: random weights of growing size."""
    root = tmp_path_factory.mktemp("checkpoints")
    return [
        save_tiny(
            root / f"step{step}",
            GPTNeoXConfig(**SMALL, hidden_size=8, intermediate_size=12, initializer_range=0.02 + 0.1 * step),
        )
        for step in range(3)
    ]


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(1, 3, size=(40, 16)), axis=1) % D_VOCAB
    return bc.Corpus.from_tokens(tokens[:32], tokens[32:])


@pytest.fixture(scope="module")
def target(corpus):
    return bc.count_ngrams(corpus.train, 2, d_vocab=D_VOCAB)


def total_weight(model) -> dict[str, float]:
    return {"norm": float(sum(site.weight.norm() ** 2 for site in bc.weight_sites(model)))}


def test_one_table_over_checkpoints(folders):
    curves = trajectory(folders, total_weight, device="cpu", title="Size of the weights")
    assert curves.points == ("step0", "step1", "step2")
    assert (curves.axis, curves.conditions) == ("checkpoint", ("full",))
    expected = [total_weight(bc.load_model(folder, device="cpu"))["norm"] for folder in folders]
    assert curves.get("norm").tolist() == pytest.approx(expected)
    assert list(curves.to_dataframe().columns) == ["condition", "checkpoint", "norm"]


def test_faithfulness_of_given_weights_at_every_checkpoint(folders, corpus, target):
    last = bc.load_model(folders[-1], device="cpu")
    subnetwork = bc.Subnetwork.full(last).drop_layer(1)
    curves = trajectory(folders, faithfulness_to(subnetwork, target, corpus), device="cpu")
    assert curves.conditions == ("full", "subnetwork", "complement", "random")
    expected = bc.evaluate(last, subnetwork, target, corpus.held_out, controls=False)
    assert curves.get("kl", "subnetwork")[2] == pytest.approx(expected.subnetwork.kl)
    low, high = curves.interval("surprisal_correlation", "subnetwork")[:, 2]
    assert (low, high) == pytest.approx(expected.intervals["subnetwork"]["surprisal_correlation"])
    assert curves.quantity("kl").unit == "nats"
    assert curves.plot("kl") is not None
    own = trajectory(folders[:1], faithfulness_to(ModelTarget, corpus), device="cpu")  # a target for every model
    assert own.get("kl")[0] == pytest.approx(0, abs=1e-5)


def test_subnetworks_over_training(folders, corpus, target, tmp_path):
    recipe = {"max_steps": 6, "batch_size": 8, "learning_rate": 0.1, "beta_growth": 1.3, "retries": 0}
    config = bc.SparsifyConfig(**recipe, target_fraction=0.2)
    runs = tmp_path / "runs"
    result = subnetworks_over_training(folders, target, corpus, config, run_dir=runs, device="cpu")
    curves = result.curves
    assert result.to_dataframe().equals(curves.to_dataframe())
    assert result.plot().layout.title.text.endswith("fraction")
    assert curves.conditions == ("subnetwork", "full", "random")
    assert list(result.subnetworks) == ["step0", "step1", "step2"]
    for place, one in enumerate(result.subnetworks.values()):
        assert curves.get("fraction", "subnetwork")[place] == one.fraction
        assert curves.get("share_in_first_mlp", "subnetwork")[place] == one.by_component()[0, "mlp"].kept / one.kept
    first, second, last = result.subnetworks.values()
    assert math.isnan(curves.get("jaccard_with_previous", "subnetwork")[0])
    assert curves.get("jaccard_with_previous", "subnetwork")[1] == jaccard(first, second)
    assert curves.get("jaccard_with_last", "subnetwork").tolist() == [jaccard(first, last), jaccard(second, last), 1]
    assert np.isnan(curves.get("fraction", "full")).all()
    assert np.isfinite(curves.get("surprisal_correlation", "full")).all()
    assert sorted(path.name for path in runs.iterdir()) == ["step0", "step1", "step2"]
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    again = subnetworks_over_training(folders, target, corpus, config, run_dir=runs, device="cpu")
    assert again.subnetworks == result.subnetworks
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")} == written


def test_revisions_of_a_hub_model(monkeypatch, folders):
    asked = []

    def load(name, *, revision, device, dtype):
        asked.append((name, revision))
        return bc.load_model(folders[int(revision.removeprefix("step"))], device="cpu")

    monkeypatch.setattr(trajectories, "load_model", load)
    curves = trajectory(["step0", "step2"], total_weight, model="EleutherAI/pythia-70m")
    assert asked == [("EleutherAI/pythia-70m", "step0"), ("EleutherAI/pythia-70m", "step2")]
    assert curves.points == ("step0", "step2")
    assert curves.notes["model"] == "EleutherAI/pythia-70m"


def test_all_known_checkpoints_of_a_model_as_one_call(monkeypatch, folders):
    asked = []

    def load(name, *, revision, device, dtype):
        asked.append((name, revision))
        return loaded

    loaded = bc.load_model(folders[0], device="cpu")
    steps = bc.checkpoints("EleutherAI/pythia-70m")[::70]
    assert len(steps) == 3
    monkeypatch.setattr(trajectories, "load_model", load)
    monkeypatch.setattr(trajectories, "known_checkpoints", lambda name: bc.checkpoints(name)[::70])
    curves = trajectory("EleutherAI/pythia-70m", lambda model: {"layers": 2.0})
    assert asked == [("EleutherAI/pythia-70m", step) for step in steps]
    assert curves.points == steps


def test_models_in_memory_by_name_or_in_order(folders, corpus, target):
    plains = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    expected = trajectory(folders, total_weight, device="cpu").get("norm").tolist()
    curves = trajectory(plains, total_weight)
    assert curves.points == ("0", "1", "2")
    assert curves.get("norm").tolist() == expected
    mixed = {"before": plains[0], "then": bc.load_model(plains[1]), "after": folders[2]}
    curves = trajectory(mixed, total_weight)
    assert curves.points == ("before", "then", "after")
    assert curves.get("norm").tolist() == expected
    config = bc.SparsifyConfig(max_steps=2)
    over = subnetworks_over_training(dict(zip("ab", plains, strict=False)), target, corpus, config)
    again = subnetworks_over_training(folders[:2], target, corpus, config, device="cpu")
    assert over.subnetworks["b"] == again.subnetworks["step1"]


def test_bad_input_is_said_in_one_line(folders, tiny_folders, tmp_path):
    with pytest.raises(ValueError, match="at least one checkpoint"):
        trajectory([], total_weight)
    with pytest.raises(ValueError, match="must be a list of names"):
        trajectory("step0", total_weight, model="EleutherAI/pythia-70m")
    with pytest.raises(ValueError, match="must be a list of names"):
        trajectory(str(folders[0]), total_weight)
    with pytest.raises(ValueError, match="no training checkpoints of 'step0' are known"):
        trajectory("step0", total_weight)
    with pytest.raises(ValueError, match="a int is not a model"):
        trajectory([3], total_weight)
    with pytest.raises(ValueError, match="is given twice"):
        trajectory([folders[0], folders[0]], total_weight)
    with pytest.raises(ValueError, match=r"'gpt_neox' has weight matrices of other shapes than 'step0': blocks\.0"):
        trajectory([folders[0], tiny_folders["gpt_neox"]], total_weight, device="cpu")
    calls = iter([{"a": 1.0}, {"b": 1.0}])
    with pytest.raises(ValueError, match="returned full: b at checkpoint 'step1', but full: a at 'step0'"):
        trajectory(folders, lambda model: next(calls), device="cpu")
    with pytest.raises(ValueError, match="must give numbers by name, not dict"):
        trajectory(folders, lambda model: {}, device="cpu")
    with pytest.raises(ValueError, match="not both"):
        trajectory(folders, lambda model: {"a": 1.0, "full": {"b": 2.0}}, device="cpu")
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        trajectory([tmp_path / "nothing"], total_weight)
