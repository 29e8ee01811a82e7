"""`study` does what `bigram-circuits find` does."""

import json

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.recipe import Inputs
from bigram_circuits.workflow import Subjects, reopen
from tests.text.test_tokenizers import hooked, sentencepiece

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


def test_how_the_text_was_read_is_part_of_the_run(tiny_folders, tmp_path, capsys):
    texts = tmp_path / "texts"
    (texts / ".git").mkdir(parents=True)
    rows = [json.dumps({"body": f"line {n} of a small text. " * 9}) for n in range(80)]
    (texts / "a.ndjson").write_text("\n".join(rows))
    model = str(tiny_folders["gpt_neox"])
    options = ["--text-column", "body", "--held-out", "0.3", "--bos", "sequence", "--context-length", "32"]
    quick = ["--max-steps", "2", "--batch-size", "4", "--random-seeds", "1", "--no-analysis"]
    folder = tmp_path / "run"
    assert cli.main(["find", model, "--corpus", str(texts), *options, *quick, "--out", str(folder)]) == 0
    said = capsys.readouterr()
    assert "1 file read (1 of JSON lines), 1 skipped: .git (hidden)" in said.err
    assert "<|endoftext|> at the start of every sequence and document" in said.out
    run, subjects = reopen(folder)
    assert (run.rebuild.text_column, run.rebuild.held_out, run.rebuild.bos) == ("body", 0.3, "sequence")
    assert subjects.corpus.fingerprint == run.settings.corpus.fingerprint
    assert (subjects.corpus.train[:, 0] == 0).all()
    assert 0.15 < subjects.corpus.documents[1] / 80 < 0.45
    assert "at the start of every sequence and document" in (folder / "report.html").read_text()


def test_a_run_from_before_there_was_a_choice_keeps_its_text(tmp_path):
    """The text of a Llama-like model was separated by the end of text then, with no BOS anywhere."""
    hooked(tmp_path / "llama", sentencepiece())
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{'a be cd ' * 300}{letter}\n\n" for letter in "abcdefgh"))
    before = Inputs.from_json({"model": str(tmp_path / "llama"), "corpus": str(path), "context_length": 8})
    corpus = Subjects.load(before).corpus
    assert (
        corpus.train[0].tolist() == [2, *sentencepiece()("a be cd a be cd", add_special_tokens=False)["input_ids"]][:8]
    )
    assert 1 not in corpus.train
    now = Subjects.load(Inputs(str(tmp_path / "llama"), corpus=str(path), context_length=8)).corpus
    assert (now.train[:, 0] == 1).all()


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
