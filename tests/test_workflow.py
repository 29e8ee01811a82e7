"""`study` does what `bigram-circuits find` does."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.recipe import Inputs
from bigram_circuits.workflow import Subjects, inputs_of, reopen
from tests.conftest import UNFIT_INPUTS, byte_tokenizer
from tests.text.test_tokenizers import hooked, sentencepiece

pytestmark = UNFIT_INPUTS
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


def test_a_study_of_several_seeds_is_the_run_that_represents_them(tiny_folders, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines, quick = [], QUICK | {"max_steps": 3}
    how = {"context_length": 32, "max_tokens": 9_000}
    run = bc.study(tiny_folders["gpt_neox"], text, seeds=2, tell=lines.append, **how, **quick)
    several = bc.load_seeds(run.path, run)
    assert run.settings.recipe.seed == several.representative
    assert str(several) in "\n".join(lines)
    page = (run.path / "report.html").read_text()
    assert "over 2 seeds" in page
    assert "--seeds 2 --random-seeds 1" in page
    command = ["find", str(tiny_folders["gpt_neox"]), "--corpus", str(text), "--context-length", "32", "--max-tokens"]
    command += ["9000", "--max-steps", "3", "--batch-size", "4", "--random-seeds", "1", "--no-analysis"]
    before = (run.path / "seeds" / "runs.json").stat().st_mtime_ns
    assert cli.main([*command, "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert str(run.path) in said  # the same folder, found before
    assert "Seed" in said
    assert (run.path / "seeds" / "runs.json").stat().st_mtime_ns == before
    assert cli.main(["evaluate", str(run.path), "--random-seeds", "1"]) == 0
    with pytest.raises(ValueError, match="sparsity_weights find one path, of one seed: leave out seeds"):
        bc.study(seeds=2, sparsity_weights=(1.0, 2.0))


def test_mistakes_are_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("bigram_circuits.workflow.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="there is no option 'stpes'"):
        bc.study(stpes=3)
    with pytest.raises(ValueError, match="max_steps must be a whole number of at least 1, not 0"):
        bc.study(max_steps=0)


# --- the same names from elsewhere, and another model under the same name ---


@pytest.fixture
def elsewhere(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def change_weight(folder, name, by=0.5):
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0] += by
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def run_here(tiny_folders, text, tmp_path, monkeypatch):
    """A run of a model and a text in the working directory, by their relative names; and the model's folder."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(tiny_folders["gpt_neox"], tmp_path / "m")
    command = [
        "find",
        "./m",
        "--corpus",
        "text.txt",
        "--context-length",
        "32",
        "--max-tokens",
        "9000",
        "--device",
        "cpu",
    ]
    command += ["--max-steps", "3", "--batch-size", "4", "--random-seeds", "1", "--no-analysis", "--out", "run"]
    assert cli.main(command) == 0
    return tmp_path / "run", model, command


def test_a_run_of_relative_names_is_evaluated_continued_and_exported_from_anywhere(
    run_here, elsewhere, monkeypatch, capsys
):
    folder, model, command = run_here
    page = (folder / "report.html").read_text()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "m").mkdir()  # another folder of that name
    assert cli.main(["evaluate", str(folder), "--random-seeds", "1", "--device", "cpu"]) == 0
    assert cli.main(["export", str(folder), "--out", str(elsewhere / "masked"), "--device", "cpu"]) == 0
    capsys.readouterr()
    again = [*command[:-1], str(folder)]
    again[1], again[3] = str(model), str(folder.parent / "text.txt")
    assert cli.main(again) == 0
    assert "found before" in capsys.readouterr().out
    model.rename(elsewhere / "moved")  # the same weights are the same model
    again[1] = "moved"
    assert cli.main(again) == 0
    assert "found before" in capsys.readouterr().out
    run = bc.load_run(folder)
    assert (run.rebuild.model, run.rebuild.corpus) == (str(model), str(folder.parent / "text.txt"))
    assert run.model_words == "m"
    assert "of m)" in repr(run.subnetwork)
    assert f"<h1>{model}" not in page
    assert page.count(str(model)) <= 3  # the command, and the settings


def test_a_model_that_changed_is_refused_by_every_command(run_here, capsys):
    folder, model, command = run_here
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    config = json.loads((model / "config.json").read_text())
    weights, settings = "weights in float32 with", "a configuration with"
    changes = {
        "embedding": (lambda: change_weight(model, "gpt_neox.embed_in.weight"), weights),
        "final norm": (lambda: change_weight(model, "gpt_neox.final_layer_norm.weight"), weights),
        "matrix": (lambda: change_weight(model, "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"), weights),
        "rotation": (lambda: configure(config["rope_parameters"] | {"rope_theta": 500.0}, "rope_parameters"), settings),
        "activation": (lambda: configure("relu", "hidden_act"), settings),
    }

    def configure(value, key):
        (model / "config.json").write_text(json.dumps(config | {key: value}))

    commands = (
        ["evaluate", str(folder), "--device", "cpu"],
        ["analyze", str(folder), "--device", "cpu"],
        ["export", str(folder), "--out", "masked", "--device", "cpu"],
        command,
    )
    kept = shutil.copytree(model, model.parent / "kept")
    for number, (change, said) in enumerate(changes.values()):
        change()
        for words in commands if number == 0 else commands[number % 4 :][:1]:
            assert cli.main(words) == 1
            assert said in capsys.readouterr().err
        shutil.copytree(kept, model, dirs_exist_ok=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_killed_run_is_not_continued_with_other_embeddings(tiny_folders, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 257, (16, 16))
    corpus, table = bc.Corpus.from_tokens(tokens, tokens[:4]), bc.count_ngrams(tokens, d_vocab=257)
    model = bc.load_model(tiny_folders["llama"], device="cpu")

    class Stop(bc.Callback):
        def on_step(self, record):
            if record.step == 2:
                raise KeyboardInterrupt

    config = bc.SparsifyConfig(max_steps=5, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        bc.find_subnetwork(model, table, corpus, config, run_dir=tmp_path / "run", callbacks=[Stop()])
    with torch.no_grad():
        model.W_E[3] += 0.1
    with pytest.raises(ValueError, match=r"holds another run \(its model is another, weights in float32 with hash"):
        bc.find_subnetwork(model, table, corpus, config, run_dir=tmp_path / "run")
    again = bc.load_model(tiny_folders["llama"], device="cpu")
    assert bc.find_subnetwork(again, table, corpus, config, run_dir=tmp_path / "run").subnetwork.total > 0


def test_one_model_is_hashed_once_in_a_study(tiny_model, tmp_path, monkeypatch):
    from bigram_circuits.models import identity

    hashed, real = [], identity._hash_of
    monkeypatch.setattr(identity, "_hash_of", lambda model: hashed.append(model) or real(model))
    tokens = np.random.default_rng(0).integers(0, 257, (16, 16))
    bc.study(tiny_model, bc.Corpus.from_tokens(tokens, tokens[:4]), target="model", out=tmp_path / "run", **QUICK)
    assert len(hashed) <= 2  # the target is made before


@pytest.fixture
def choices(tiny_folders, tmp_path):
    """A task that the tiny model can do: of two letters, the one it prefers is right; and the same the other way."""
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    rows = []
    for n in range(40):
        ids = torch.tensor([[0, *model.tokenizer.encode(f"row {n:02d}" + "x" * (n % 2))]])
        with torch.no_grad():
            logits = model(ids)[0, -1]
        right, wrong = sorted("ab", key=lambda letter: -logits[model.tokenizer.encode(letter)[0]].item())
        rows.append({"prompt": f"row {n:02d}" + "x" * (n % 2), "answer": right, "wrong": wrong})
    for name, ends in (("can", ("answer", "wrong")), ("cannot", ("wrong", "answer"))):
        lines = [{"prompt": row["prompt"], "answer": row[ends[0]], "wrong": row[ends[1]]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_study_of_a_task(tiny_folders, choices, capsys):
    model, path, folder = str(tiny_folders["gpt_neox"]), choices / "can.jsonl", choices / "run"
    quick = ["--max-steps", "4", "--batch-size", "8", "--random-seeds", "1", "--no-analysis", "--out", str(folder)]
    command = ["find", model, "--task", str(path), "--measure", "logit_difference", *quick]
    assert cli.main(command) == 0
    assert "Verdict" in capsys.readouterr().out
    run = bc.load_run(folder)
    assert run.checked.ability.preferred == 1
    assert run.rebuild.target_words == ("can", "the choice between right and wrong answers of the task can")
    page = (folder / "report.html").read_text()
    assert "Which few weights of" in page
    assert "enough to reproduce the choice between right and wrong answers of the task can" in page
    assert f"--task {path} --measure logit_difference" in page
    assert cli.main(command) == 0
    assert "found before" in capsys.readouterr().out
    before = run.evaluation.to_json()
    assert cli.main(["evaluate", str(folder), "--random-seeds", "1"]) == 0
    assert bc.load_run(folder).evaluation.to_json() == before


@pytest.mark.slow
def test_the_analyses_of_a_task_are_of_its_answers(tiny_folders, choices, capsys):
    options = {"max_steps": 4, "batch_size": 8, "random_seeds": 1}
    run = bc.study(tiny_folders["gpt_neox"], task=choices / "can.jsonl", out=choices / "run", **options)
    found, task = run.analyses["task"], bc.load_task(choices / "can.jsonl", tokenizer=byte_tokenizer())
    assert found.names == ("full", "subnetwork", "complement", "random")
    assert found.get("preferred")["full"] == 1
    assert found.notes["rows"] == len(task.split()[1])
    assert run.analyses["ablation_heads"].notes["prompts"] == len(task.split()[1])
    assert "defined at some places of a sequence" in run.left_out["faithful_tokens"]
    assert "The answers of the task" in (run.path / "report.html").read_text()
    capsys.readouterr()


def test_a_task_that_the_model_cannot_do_needs_force(tiny_folders, choices, capsys):
    model, path = tiny_folders["gpt_neox"], choices / "cannot.jsonl"
    options = {"max_steps": 2, "batch_size": 8, "random_seeds": 1, "analysis": False}
    with pytest.raises(ValueError, match=r"right preferred in 0% \(guessing 50%\): the model is NOT shown .*--force"):
        bc.study(model, task=path, out=choices / "run", **options)
    run = bc.study(model, task=path, out=choices / "run", force=True, **options)
    assert "NOT shown" in run.checked.warnings[0]
    assert run.rebuild.force
    for wrong, message in (
        ({"corpus": "reference", "target": "model"}, "a task brings its own text and target: leave target out"),
        ({"corpus": ["a text"]}, "leave corpus and target out"),
        ({"context_length": 5}, "leave context_length out"),
        ({"measure": "r"}, "measure must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            bc.study(model, task=path, **wrong)
    with pytest.raises(ValueError, match="measure and force belong to a task"):
        bc.study(model, measure="kl")
    capsys.readouterr()


def test_the_task_of_a_foreign_run_is_not_opened(tiny_folders, choices):
    run = bc.study(tiny_folders["gpt_neox"], task=choices / "can.jsonl", out=choices / "run", measure="kl", **QUICK)
    config = json.loads((run.path / "config.json").read_text())
    assert config["rebuild"]["task"] == str(choices / "can.jsonl")
    foreign = bc.load_run(run.path)
    object.__setattr__(foreign, "made_here", False)
    with pytest.raises(ValueError, match=r"add --model .* --task .*can.jsonl"):
        inputs_of(foreign)
    assert inputs_of(foreign, model="m", task="t.jsonl").task == "t.jsonl"
