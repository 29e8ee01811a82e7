"""Faithfulness curves: their numbers are those of Hugging Face's model and NumPy, and planted nodes come first."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.experiments.faithfulness_curves import METHODS
from bigram_circuits.workflow import curves as curves_of
from tests.conftest import UNFIT_INPUTS
from tests.example_runs import HOSTILE, Elements, without_libraries

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = bc.SparsifyConfig(method="straight_through", target_fraction=0.5, max_steps=10, batch_size=8, retries=0)
OPTIONS = {"units": "head", "sizes": (0.25, 0.5), "seeds": 3, "steps": 4, "check_memory": "off"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("curves")


@pytest.fixture(scope="module")
def planted(place):
    """Two of its eight heads do induction."""
    return bc.plant_attention("induction", d_vocab=8, folder=place / "model")


@pytest.fixture(scope="module")
def corpus(planted):
    rows = planted.task.corpus()
    return replace(rows, train=rows.train[:64], held_out=rows.held_out[:24])


@pytest.fixture(scope="module")
def found(planted, corpus, place):
    return bc.faithfulness_curves(planted.model, planted.task, corpus, CONFIG, run_dir=place / "run", **OPTIONS)


def loss_by_hand(place, circuit, tokens):
    """-log P(the answer) of the plain model, where the rows of c_proj that dropped heads would use are 0."""
    plain = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        for layer, block in enumerate(plain.transformer.h):
            mask = circuit[f"blocks.{layer}.attn.hook_z"]
            rows = block.attn.c_proj.weight
            rows.view(len(mask), -1, rows.shape[1])[~mask] = 0
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        log_probs = log_softmax(plain(ids).logits.double().numpy()[:, :-1], axis=-1)
    surprisals = -np.take_along_axis(log_probs, ids[:, 1:, None].numpy(), -1)[..., 0]
    return surprisals[:, -6:].sum(1).mean()  # the block again, but for its first token


def test_every_number_is_that_of_the_plain_model(found, planted, corpus, place):
    full = bc.Circuit.full(planted.model, "head")
    ends = [loss_by_hand(place, one, corpus.held_out) for one in (~full, full)]
    assert [found.curves.notes["empty"], found.curves.notes["full"]] == pytest.approx(ends, rel=1e-5)
    assert found.curves.points == (0.25, 0.5)
    assert found.curves.conditions == METHODS
    areas = dict(zip(found.areas.names, found.areas.values.T, strict=True))
    for method in ("learned", "integrated", "attribution", "patching"):
        assert [one.kept for one in found.circuits[method]] == [2, 4]
        losses = [loss_by_hand(place, one, corpus.held_out) for one in found.circuits[method]]
        assert found.curves.get("cross_entropy", method) == pytest.approx(losses, rel=1e-5)
        heights = [0.0, *((ends[0] - loss) / (ends[0] - ends[1]) for loss in losses), 1.0]
        assert found.curves.get("faithfulness", method) == pytest.approx(heights[1:3], abs=1e-5)
        cmd, area, cpr, over = areas[method]

        def under(of, heights=heights):
            at = [0, 0.25, 0.5, 1]
            parts = zip(at, at[1:], heights, heights[1:], strict=False)
            return sum((b - a) * (of(y) + of(z)) / 2 for a, b, y, z in parts)

        expected = [under(lambda y: abs(1 - y)), under(lambda y: min(max(y, 0), 1)), under(lambda y: y)]
        assert [cmd, area, cpr] == pytest.approx(expected, abs=1e-5)
        assert np.isnan(over) if method == "learned" else over == pytest.approx(cmd - areas["learned"][0], abs=1e-6)
        low, high = found.curves.interval("faithfulness", method)
        assert (low <= np.array(heights[1:3]) + 1e-5).all()
        assert (high >= np.array(heights[1:3]) - 1e-5).all()


def test_random_ones_are_means_over_draws(found, planted, corpus):
    target, drawn = bc.TaskTarget(planted.task), []
    rng = np.random.default_rng(CONFIG.seed)
    for _ in range(3):
        order = np.argsort(-rng.permutation(8).astype(float), kind="stable")
        labels = [f"L{head // 4}H{head % 4}" for head in order[:2]]
        circuit = bc.Circuit.empty(planted.model, "head").keep(*labels)
        drawn.append(bc.evaluate(planted.model, circuit, target, corpus.held_out, controls=False).subnetwork)
        if len(drawn) == 1:
            assert found.circuits["random"][0] == circuit
    mean = np.mean([one.cross_entropy for one in drawn])
    assert found.curves.get("cross_entropy", "random")[0] == pytest.approx(mean, rel=1e-6)


def test_the_planted_heads_come_first_and_random_ones_last(found):
    planted = {"L0H1", "L1H2"}
    for method in ("learned", "integrated", "patching"):
        assert set(found.circuits[method][0].nodes) == planted, method
        assert found.smallest(method).kept == 2
    # where attention is saturated, the gradient alone misses the head that the other one reads
    assert set(found.circuits["attribution"][0].nodes) & planted == {"L1H2"}
    cmd = dict(zip(found.areas.names, found.areas.values[0], strict=True))
    assert max(cmd, key=cmd.get) == "random"
    at, over = found.areas.names.index("random"), [one.name for one in found.areas.quantities].index("cmd_over_learned")
    assert found.areas.low[over, at] > 0
    assert found.smallest("random", 2.0) is None


def test_it_is_saved_and_read_and_goes_on(found, planted, corpus, place):
    read = bc.FaithfulnessCurves.load(place / "run")
    assert read.curves.to_json() == found.curves.to_json()
    assert read.areas.to_json() == found.areas.to_json()
    assert read.circuits == found.circuits
    assert (read.left_out, str(read)) == (found.left_out, str(found))

    class Never:
        def on_step(self, record):
            raise AssertionError("everything was learned before")

        def on_end(self, found):
            pass

    again = bc.faithfulness_curves(
        planted.model, planted.task, corpus, CONFIG, run_dir=place / "run", callbacks=[Never()],
        **(OPTIONS | {"methods": ("learned", "random")}),
    )  # fmt: skip
    assert again.curves.to_json()["values"] == found.curves.only("learned", "random").to_json()["values"]
    with pytest.raises(ValueError, match="holds another run"):
        bc.faithfulness_curves(
            planted.model, planted.task, corpus, replace(CONFIG, seed=7), run_dir=place / "run", **OPTIONS
        )
    found.curves.save(place / "run" / "areas.json")
    with pytest.raises(ValueError, match="holds other results than faithfulness curves"):
        bc.FaithfulnessCurves.load(place / "run")
    found.save(place / "run")
    (place / "run" / "circuits" / "random-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        bc.FaithfulnessCurves.load(place / "run")


def test_what_cannot_be_is_refused(planted, corpus, found, tmp_path):
    def curves(target=None, **changes):
        bc.faithfulness_curves(planted.model, target or planted.task, corpus, CONFIG, **(OPTIONS | changes))

    for changes, says in (
        ({"methods": ("learned", "best")}, "methods must be some of learned, .*, not best"),
        ({"methods": ()}, "methods must be some of .*, not none"),
        ({"sizes": (0.1, 1)}, r"sizes must be shares of the nodes, above 0 and below 1, not \[0.1, 1\]"),
        ({"seeds": 0}, "at least 1 random draw, not 0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"units": ("head", "weight")}, "leave weight out of units"),
        ({"units": "tail"}, "'tail' is neither a unit"),
        ({"replace": "counterfactual"}, "needs a task whose rows have"),
        ({"target": planted.model}, "needs the methods cross_entropy and surprisal"),
    ):
        with pytest.raises(ValueError, match=says):
            curves(**changes)
    nonsense = bc.TaskTarget(planted.task, "loss").nonsense(0)
    with pytest.raises(ValueError, match="the full model is not better than the empty circuit"):
        bc.faithfulness_curves(planted.model, nonsense, corpus, CONFIG, **(OPTIONS | {"methods": ("random",)}))
    with pytest.raises(ValueError, match="is a folder: name a file"):
        bc.write_curves(found, tmp_path)
    with pytest.raises(ValueError, match="curves have no option 'polish'"):
        curves_of(planted.model, corpus, polish=1)


def test_too_many_nodes_are_not_patched_one_by_one(planted, corpus, monkeypatch, tmp_path):
    monkeypatch.setattr("bigram_circuits.experiments.faithfulness_curves._MOST_PATCHED", 7)
    few = bc.faithfulness_curves(
        planted.model, planted.task, corpus, CONFIG, **(OPTIONS | {"methods": ("patching", "random")})
    )
    assert few.left_out == {"patching": "since 8 nodes are too many to replace one at a time"}
    assert few.curves.conditions == ("random",)
    assert np.isnan(few.areas.get("cmd_over_learned")["random"])
    few.save(tmp_path)
    assert bc.FaithfulnessCurves.load(tmp_path).left_out == few.left_out
    text = " ".join(Elements(without_libraries(bc.write_curves(few, tmp_path / "page.html").read_text())).text)
    assert "Left out: patching one by one, since 8 nodes are too many" in text


def test_the_page_is_one_file_with_every_number(found, tmp_path):
    notes = {**found.curves.notes, "model": f"model {HOSTILE}"}
    page = bc.write_curves(replace(found, curves=replace(found.curves, notes=notes)), tmp_path / "a.html").read_text()
    rest = without_libraries(page)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", rest)
    assert "<img" not in rest
    elements = Elements(rest)
    text = " ".join(elements.text)
    assert "Left out" not in text
    for words in (
        "Faithfulness by size", "Areas over size", "What each way keeps", "How it was made", "L0H1, L1H2",
        "the task repeated random tokens (measure loss)", "Dropped nodes are given the value 0.",
        "24 held-out sequences",
        "The fewest nodes with a faithfulness of at least 0.9: learned 2 (25.0%)", "closer to the full model than",
    ):  # fmt: skip
        assert words in text, words
    for values in (found.curves.values, found.areas.values):
        assert set(values[~np.isnan(values)].tolist()) <= set(elements.values)


def test_many_nodes_are_counted_by_layer_and_kind(planted, corpus, tmp_path):
    found = bc.faithfulness_curves(
        planted.model, planted.task, corpus, CONFIG,
        **(OPTIONS | {"units": "edge", "methods": ("attribution",), "sizes": (0.05, 0.5)}),
    )  # fmt: skip
    assert found.noun == "edges"
    assert found.plot().layout.xaxis.title.text == "share of edges kept"
    page = without_libraries(bc.write_curves(found, tmp_path / "page.html").read_text())
    text = " ".join(Elements(page).text)
    small, large = found.circuits["attribution"]
    assert ", ".join(small.edges) in text
    for (layer, kind), count in large.by_place().items():
        if count.kept:
            place = kind if kind == "logits" else f"L{layer} {kind}"
            assert f"{place} {count.kept} of {count.total}" in text


@UNFIT_INPUTS
def test_the_command_writes_folder_and_page(tiny_folders, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} bottles of beer on the wall, {n} bottles." for n in range(99)))
    out = tmp_path / "out"
    command = ["curves", str(tiny_folders["gpt2"]), "--corpus", str(tmp_path / "text.txt"), "--out", str(out)]
    command += ["--context-length", "32", "--max-steps", "2", "--retries", "0", "--held-out", "0.3", "--device", "cpu"]
    command += [
        "--check-memory",
        "off",
        "--batch-size",
        "2",
        "--unit",
        "head",
        "--replace",
        "mean",
        "--target",
        "model",
    ]
    command += ["--sizes", "0.25", "--methods", "learned,random", "--draws", "1"]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert str(bc.FaithfulnessCurves.load(out)) in told
    assert str(out / "curves.html") in told
    assert {"curves.json", "areas.json", "circuits", "learned-2", "curves.html"} <= {one.name for one in out.iterdir()}
    assert bc.load_run(out / "learned-2").settings.recipe.method == "straight_through"
    before = (out / "curves.json").read_bytes()
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["folder"], found["page"]) == (str(out), str(out / "curves.html"))
    assert found["curves"] == {name: one for name, one in json.loads(before).items() if name != "checksum"}
    assert (out / "curves.json").read_bytes() == before
    assert cli.main([*command[:-4], "--methods", "best"]) == 1
    assert "methods must be some of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["curves", "--target-fraction", "0.1"])
