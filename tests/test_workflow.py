"""`study` does what `bigram-circuits find` does."""

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits import cli

QUICK = {"max_steps": 8, "batch_size": 4, "random_seeds": 1, "analysis": False}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} of a small text\n" + "\n" * (n % 7 == 0) for n in range(800)))
    return path


def test_a_study_by_names_is_the_command(tiny_folders, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, lines = tiny_folders["gpt_neox"], []
    run = bc.study(model, text, context_length=32, max_tokens=9_000, tell=lines.append, **QUICK)
    options = ["--context-length", "32", "--max-tokens", "9000", "--lr", "0.02"]
    options += ["--max-steps", "8", "--batch-size", "4", "--random-seeds", "1", "--no-analysis"]
    assert cli.main(["find", str(model), "--corpus", str(text), *options[:4], *options[6:]]) == 0
    assert "found before" in capsys.readouterr().out  # the same folder: the same identity
    assert run.path.parent.name == "runs"
    assert run.evaluation.full is not None
    assert (run.path / "report.html").is_file()
    assert any("the page to look at" in line for line in lines)
    assert run.rebuild == bc.load_run(run.path).rebuild
    assert run.rebuild.max_tokens == 9_000


def test_a_study_of_objects_needs_no_names(tiny_model, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 257, (16, 16))
    corpus = bc.Corpus.from_tokens(tokens, tokens[:4])
    run = bc.study(tiny_model, corpus, target=bc.NextTokenTarget(), out=tmp_path / "run", **QUICK)
    assert run.rebuild is None
    assert run.settings.target.kind == "NextTokenTarget"
    assert run.evaluation.subnetwork.kept == run.subnetwork.kept
    named = bc.study(tiny_model, corpus, target="model", out=tmp_path / "other", **QUICK)
    assert named.settings.target.kind == "ModelTarget"


def test_a_study_of_several_weights_is_a_path(tiny_model, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 257, (16, 16))
    corpus = bc.Corpus.from_tokens(tokens, tokens[:4])
    quick = {name: value for name, value in QUICK.items() if name in ("max_steps", "batch_size")}
    path = bc.study(tiny_model, corpus, out=tmp_path / "path", sparsity_weights=(0.001, 0.01), **quick)
    assert isinstance(path, bc.SubnetworkPath)
    assert len(path.found) == 2


def test_mistakes_are_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("bigram_circuits.workflow.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="there is no option 'stpes'"):
        bc.study(stpes=3)
    with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1, not 0"):
        bc.study(max_steps=0)
