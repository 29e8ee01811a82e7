"""A paper's numbers measured again: each against plain Hugging Face and NumPy, resumed, and beside theirs."""

import json
import pickle
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.experiments import reproduction
from bigram_circuits.experiments.controls import correlation_without_blocks, learn_linear_map
from bigram_circuits.experiments.reproduced import ReproducedNumber
from bigram_circuits.paper import PAPERS, ROWS
from tests.conftest import D_VOCAB, UNFIT_INPUTS

pytestmark = [UNFIT_INPUTS, pytest.mark.usefixtures("one_thread")]
PAPER = "chang-bergen-2025"
QUICK = {"max_steps": 6, "batch_size": 4, "learning_rate": 0.3, "retries": 0, "context_length": 16}
QUICK |= {"check_memory": "off", "device": "cpu", "sparsity_weights": (0, 20)}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file with few different words, so that most bigrams of the held-out part are known."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rng = np.random.default_rng(0)
    words = np.array(["the cat", "sat on", "a mat", "and then", "it left"])
    lines = ['{"text": "' + " ".join(rng.choice(words, 12)) + '"}' for _ in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reproduction") / "out"


@pytest.fixture(scope="module")
def made(tiny_folders, text, folder):
    """All rows of a tiny GPT-NeoX, which is said to be the paper's Pythia-160M."""
    said = []
    models = [f"pythia 160m={tiny_folders['gpt_neox']}"]
    result = bc.reproduce(PAPER, models, text, held_out=0.3, out=folder, tell=said.append, **QUICK)
    return result, said


@pytest.fixture(scope="module")
def plain(tiny_folders):
    return AutoModelForCausalLM.from_pretrained(tiny_folders["gpt_neox"]).eval()


@pytest.fixture(scope="module")
def corpus(tiny_model, text):
    return bc.load_corpus(text, tokenizer=tiny_model.tokenizer, context_length=16, held_out=0.3)


@pytest.fixture(scope="module")
def bigram(corpus):
    """Dense probabilities, by NumPy: unseen contexts have the unigram's."""
    counts = np.zeros((D_VOCAB, D_VOCAB))
    np.add.at(counts, (corpus.train[:, :-1].ravel(), corpus.train[:, 1:].ravel()), 1)
    unigram = np.bincount(corpus.train.ravel(), minlength=D_VOCAB) / corpus.train.size
    seen = counts.sum(1, keepdims=True)
    return np.where(seen > 0, counts / np.maximum(seen, 1), unigram)


def correlation(logits, tokens, probabilities):
    with np.errstate(divide="ignore"):
        theirs = -np.log(probabilities[tokens[:, :-1], tokens[:, 1:]])
    ours = -torch.from_numpy(logits).double().log_softmax(-1).numpy()[:, :-1]
    ours = np.take_along_axis(ours, tokens[:, 1:, None].astype(int), 2)[..., 0]
    used = np.isfinite(theirs)
    return np.corrcoef(ours[used], theirs[used])[0, 1]


def run_of(folder, name):
    (runs,) = (one for one in folder.iterdir() if one.is_dir())
    return bc.load_run(runs / name).subnetwork


def numbers(result, row=None):
    return {one.quantity: one.ours for one in result.models[0].numbers if row in (None, one.row)}


# --- what is measured ---


def test_every_row_is_there_with_theirs_beside_ours(made, tiny_folders):
    result, said = made
    (model,) = result.models
    assert (model.name, result.unreachable, model.left_out) == ("Pythia-160M", {}, {})
    assert model.rows == tuple(row for row in ROWS if row != "released")
    assert [one.quantity for one in model.numbers] == [one.name for row in model.rows for one in ROWS[row]]
    theirs = {one.quantity: one.theirs for one in model.numbers}
    assert (theirs["best_r"], theirs["sparse_kept"], theirs["linear_map_r"]) == (0.964, 7_238_986, 0.615)
    assert theirs["full_model_first_block"] is None
    best = next(one for one in model.numbers if one.quantity == "best_r")
    assert best.difference == pytest.approx(best.ours - 0.964)
    assert any("Pythia-160M: sweep: measured in" in line for line in said)


def test_r_and_the_selection_rule_by_plain_hugging_face(made, folder, tiny_folders, tiny_model, corpus, bigram):
    found, tokens = numbers(made[0], "sweep"), corpus.held_out
    r, kept = {}, {}
    for weight in (0, 20):
        subnetwork = run_of(folder, f"lambda-{weight}")
        other = AutoModelForCausalLM.from_pretrained(tiny_folders["gpt_neox"]).eval()
        with torch.no_grad():
            parameters = dict(other.named_parameters())
            for name, mask in subnetwork.to_huggingface(tiny_model).items():
                parameters[name] *= mask
            r[weight] = correlation(other(torch.from_numpy(tokens).long()).logits.numpy(), tokens, bigram)
        kept[weight] = sum(int(subnetwork[name].sum()) for name in subnetwork.shapes)
    assert kept[20] < kept[0]
    assert found["best_r"] == pytest.approx(max(r.values()), abs=1e-5)
    wanted = 20 if r[20] >= r[0] - 0.04 else 0
    assert (found["sparse_lambda"], found["sparse_kept"]) == (wanted, kept[wanted])
    assert found["sparse_r"] == pytest.approx(r[wanted], abs=1e-5)
    assert found["sparse_share"] == pytest.approx(kept[wanted] / found["maskable"])
    assert numbers(made[0])["trained_r"] == pytest.approx(r[0], abs=1e-5)


@pytest.mark.parametrize("far", [False, True])
def test_the_sparse_one_is_the_smallest_that_is_close_to_lambda_0(far):
    def found(kept, r):
        return SimpleNamespace(subnetwork=SimpleNamespace(kept=kept), r=r)

    sweep = {0: found(100, 0.9), 1: found(50, 0.87), 10: found(9, 0.8 if far else 0.861), 100: found(1, float("nan"))}
    subject = SimpleNamespace(sweep=sweep, paper=PAPERS[PAPER])
    assert reproduction._Subject.sparse_lambda.func(subject) == (1 if far else 10)


def test_models_without_blocks_by_plain_hugging_face(made, plain, corpus, bigram, tiny_model):
    tokens = torch.from_numpy(corpus.train).long()
    held_out = torch.from_numpy(corpus.held_out).long()
    embed, norm, head = plain.gpt_neox.embed_in, plain.gpt_neox.final_layer_norm, plain.get_output_embeddings()
    dense = torch.from_numpy(bigram).float()
    linear = torch.eye(24).requires_grad_()
    optimizer = torch.optim.Adam([linear])
    for step in range(5):  # all text at every step, so that there is no order
        loss = -(dense[tokens] * head(norm(embed(tokens) @ linear)).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 5)
        optimizer.step()
    table = bc.count_ngrams(corpus.train, 2, d_vocab=D_VOCAB)
    ours = learn_linear_map(tiny_model, table, corpus.train, steps=5, batch_size=len(tokens))
    np.testing.assert_allclose(ours, linear.detach(), atol=1e-4)
    with torch.no_grad():
        alone, mapped = (head(norm(embed(held_out) @ one)).numpy() for one in (torch.eye(24), linear))
    assert numbers(made[0])["embeddings_r"] == pytest.approx(correlation(alone, corpus.held_out, bigram), abs=1e-5)
    found = correlation_without_blocks(tiny_model, table, corpus.held_out, ours)
    assert found == pytest.approx(correlation(mapped, corpus.held_out, bigram), abs=1e-3)
    assert numbers(made[0])["linear_map_r"] > numbers(made[0])["embeddings_r"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_the_first_block_reads_by_plain_hugging_face(tiny_folders, random_tokens, name):
    model, tokens = bc.load_model(tiny_folders[name], device="cpu"), torch.from_numpy(random_tokens)
    other = AutoModelForCausalLM.from_pretrained(tiny_folders[name]).eval()
    with torch.no_grad():
        if name == "gpt2":
            read = other.transformer.wte(tokens) + other.transformer.wpe(torch.arange(tokens.shape[1]))
            logits = other.lm_head(other.transformer.ln_f(read))
        else:
            logits = other.lm_head(other.model.norm(other.model.embed_tokens(tokens)))
    table = bc.count_ngrams(random_tokens, 2, d_vocab=D_VOCAB)
    counts = np.zeros((D_VOCAB, D_VOCAB))
    np.add.at(counts, (random_tokens[:, :-1].ravel(), random_tokens[:, 1:].ravel()), 1)
    wanted = correlation(logits.numpy(), random_tokens, counts / np.maximum(counts.sum(1, keepdims=True), 1))
    assert correlation_without_blocks(model, table, random_tokens) == pytest.approx(wanted, abs=1e-5)


def test_overlap_and_components_by_numpy(made, folder):
    found = numbers(made[0])
    ours, pruned = run_of(folder, f"lambda-{found['sparse_lambda']:g}"), run_of(folder, "optimal-pruning-lambda-10")
    masks = [{name: one[name].numpy() for name in one.shapes} for one in (ours, pruned)]
    both = sum((masks[0][name] & masks[1][name]).sum() for name in masks[0])
    chance = sum(masks[0][name].sum() * masks[1][name].sum() / masks[0][name].size for name in masks[0])
    kept = {name: mask.sum() for name, mask in masks[0].items()}
    total = sum(kept.values())
    assert found["overlap_times"] == pytest.approx(both / chance)
    assert found["overlap_share"] == pytest.approx(both / total)
    attention = {matrix: sum(n for name, n in kept.items() if name.endswith(matrix)) / total for matrix in "QKVO"}
    assert found["query_key_share"] == pytest.approx(attention["Q"] + attention["K"])
    assert found["value_output_share"] == pytest.approx(attention["V"] + attention["O"])
    assert found["attention_share"] == pytest.approx(sum(attention.values()))
    assert found["mlp_share"] == pytest.approx(1 - sum(attention.values()))


def test_rotations_and_covariances_are_those_of_the_analyses(made, folder, tiny_model, corpus):
    found = numbers(made[0])
    sparse = run_of(folder, f"lambda-{found['sparse_lambda']:g}")
    curves = bc.layer_rotations(tiny_model, sparse, corpus)
    maps = bc.covariance_similarity(tiny_model, sparse, corpus, measure="covariance_cosine")
    for name, condition in (("full_model", "full"), ("subnetwork", "subnetwork")):
        for to in ("input", "output"):
            angles = curves.get(f"{to}_angle", condition)
            wanted = [found[f"{name}_{to}_{when}"] for when in ("before", "after")]
            np.testing.assert_allclose(wanted, angles[:2], atol=1e-3)
        similarity = maps.get("covariance_cosine", condition)
        assert found[f"{name}_first_block"] == pytest.approx(similarity[0, 1], abs=1e-5)
        assert found[f"{name}_later_blocks"] == pytest.approx(similarity[1, 2], abs=1e-5)


# --- the result ---


def test_it_is_read_back_and_shown(made, folder):
    result, said = made
    assert bc.load_reproduction(folder) == result
    table = result.to_dataframe()
    assert list(table.columns) == ["model", "row", "quantity", "theirs", "ours", "difference"]
    assert len(table) == len(result.models[0].numbers)
    assert np.allclose(table.difference.dropna(), (table.ours - table.theirs).dropna())
    text = str(result)
    assert text in said[-1]
    for shown in ("theirs", "Pythia-160M", "7,238,986", "8.52%", "0.953", "68.5", "3.81", "lambda 0, 20", "seed 0"):
        assert shown in text
    assert (folder / "reproduction.md").read_text() == result.to_markdown()
    assert "| Pythia-160M | best r of a subnetwork | 0.964 |" in result.to_markdown()
    assert "<table" in result._repr_html_()
    assert result.models[0].get("best_r") == numbers(result)["best_r"]
    with pytest.raises(ValueError, match="there is no number 'worst_r' of 'Pythia-160M': there are best_r"):
        result.models[0].get("worst_r")


@pytest.mark.parametrize(
    ("row", "quantity", "theirs", "ours", "shown"),
    [
        ("sweep", "best_r", 0.961, 0.9, ("0.961", "0.900", "-0.061")),
        ("sweep", "best_r", None, 0.9, ("", "0.900", "")),
        ("sweep", "sparse_kept", 1000, 12345, ("1,000", "12,345", "+11,345")),
        ("sweep", "sparse_share", 0.00171, 0.002, ("0.171%", "0.200%", "+0.029%")),
        ("sweep", "sparse_lambda", 10, 1, ("10", "1", "-9")),
        ("overlap", "overlap_times", 3.81, None, ("3.81", "", "")),
        ("rotations", "subnetwork_input_after", 47.0, 50.04, ("47.0", "50.0", "+3.0")),
    ],
)
def test_numbers_are_shown_in_their_units(row, quantity, theirs, ours, shown):
    one = ReproducedNumber(row, quantity, theirs, ours)
    assert (one.shown(one.theirs), one.shown(one.ours), one.shown(one.difference, signed=True)) == shown


def test_the_papers_own_numbers_fit_together():
    (paper,) = PAPERS.values()
    names = {one.name for row in ROWS.values() for one in row}
    for model in paper.models:
        theirs = model.numbers
        assert theirs.keys() <= names
        assert theirs["full_r"] < theirs["best_r"]
        if "sparse_kept" in theirs:
            assert theirs["sparse_share"] == pytest.approx(theirs["sparse_kept"] / theirs["maskable"], rel=5e-3)
            assert theirs["best_r"] - paper.margin <= theirs["sparse_r"] <= theirs["best_r"]
            assert theirs["sparse_lambda"] in paper.sparsity_weights
            assert model.pruning_lambda in paper.sparsity_weights
        if "trained_r" in theirs:
            assert theirs["trained_r"] == theirs["best_r"]
        if "mlp_share" in theirs:
            assert theirs["mlp_share"] + theirs["attention_share"] == pytest.approx(1)
            assert theirs["value_output_share"] + theirs["query_key_share"] == pytest.approx(theirs["attention_share"])


# --- again ---


def test_a_second_call_does_no_work_again(made, folder, tiny_folders, text, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("work is done again")

    for name in ("find_subnetwork", "evaluate", "learn_linear_map", "fit_maps", "covariance_similarity"):
        monkeypatch.setattr(reproduction, name, refuse)
    said = []
    models = [f"Pythia-160M={tiny_folders['gpt_neox']}"]
    assert bc.reproduce(PAPER, models, text, held_out=0.3, out=folder, tell=said.append, **QUICK) == made[0]
    assert "Pythia-160M: sweep: measured before" in said
    options = "--held-out 0.3 --max-steps 6 --batch-size 4 --lr 0.3 --retries 0 --context-length 16 --check-memory off"
    options += " --device cpu --sparsity-weights 0,20 --recipe ours --rows sweep overlap"
    asked = ["--model", models[0], "--corpus", str(text), "--out", str(folder), *options.split()]
    assert cli.main(["reproduce", PAPER, *asked, "--json"]) == 0
    answer, told = capsys.readouterr()
    assert str(made[0]) in told
    assert json.loads(answer)["reproduction"] == json.loads(json.dumps(made[0].to_json()))
    assert json.loads(answer)["table"] == str(folder / "reproduction.md")


def test_an_interrupted_call_goes_on(made, tiny_folders, text, tmp_path, monkeypatch):
    learned = []

    def stopped(model, target, corpus, recipe, **options):
        if len(learned) == 1 and not options["run_dir"].exists():
            raise KeyboardInterrupt
        learned.append(recipe.sparsity_weight)
        return bc.find_subnetwork(model, target, corpus, recipe, **options)

    asked = {"models": [tiny_folders["gpt_neox"]], "corpus": text, "held_out": 0.3, "rows": ["sweep"], **QUICK}
    monkeypatch.setattr(reproduction, "find_subnetwork", stopped)
    with pytest.raises(KeyboardInterrupt):
        bc.reproduce(PAPER, out=tmp_path, **asked)
    assert learned == [0]
    assert bc.load_reproduction(tmp_path).is_empty
    monkeypatch.undo()
    begun = next(tmp_path.glob("*/lambda-0/subnetwork.safetensors")).stat().st_mtime_ns
    result = bc.reproduce(PAPER, out=tmp_path, **asked)
    assert next(tmp_path.glob("*/lambda-0/subnetwork.safetensors")).stat().st_mtime_ns == begun
    assert numbers(result) == numbers(made[0], "sweep")
    assert {one.theirs for one in result.models[0].numbers} == {None}


# --- what cannot be reached ---


def test_without_a_hub_the_other_models_go_on(made, tiny_folders, text, folder, no_network, capfd):
    models = ["EleutherAI/pythia-70m", "gpt-2 small, replication", f"Pythia-160M={tiny_folders['gpt_neox']}"]
    result = bc.reproduce(PAPER, models, text, held_out=0.3, out=folder, **QUICK)
    assert result.models == made[0].models
    assert list(result.unreachable) == ["Pythia-70M", "GPT-2 small, replication"]
    assert all("\n" not in reason for reason in result.unreachable.values())
    assert "Pythia-70M: could not be loaded: cannot reach the model hub for the model 'EleutherAI/pyth" in str(result)
    arguments = [
        "reproduce",
        PAPER,
        "--model",
        "GPT-2 large",
        "--corpus",
        str(text),
        "--out",
        str(folder.parent / "no"),
    ]
    assert cli.main(arguments) == 1
    out, err = capfd.readouterr()
    assert "GPT-2 large: could not be loaded: cannot reach the model hub" in out
    assert err == "bigram-circuits: error: nothing could be measured\n"


def test_released_masks_are_measured(tiny_folders, tiny_model, text, tmp_path, monkeypatch, corpus):
    half = bc.Subnetwork.full(tiny_model).random_like().drop_layer(1)
    file = tmp_path / "subnetwork_dict_lambda1e1.pickle"
    arrays = {name: mask.numpy() for name, mask in half.to_huggingface(tiny_model).items()}
    file.write_bytes(pickle.dumps({"orig_model_name": "EleutherAI/pythia-160m", **arrays}))
    asked = []

    def model_info(self, repo_id, *, revision=None, timeout=None):
        asked.append(repo_id)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file.name)])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, revision=None: str(file))
    models = [f"Pythia-160M={tiny_folders['gpt_neox']}", tiny_folders["gpt2"], f"gpt-2 small={tiny_folders['gpt2']}"]
    result = bc.reproduce(PAPER, models, text, held_out=0.3, rows=[], released=True, out=tmp_path / "out", **QUICK)
    one, unknown, wrong = result.models
    assert asked == ["tylerachang/bigram-subnetworks-pythia-160m", "tylerachang/bigram-subnetworks-gpt2-small"]
    table = bc.count_ngrams(corpus.train, 2, d_vocab=D_VOCAB)
    r = bc.evaluate(tiny_model, half, table, corpus.held_out, controls=False).subnetwork.surprisal_correlation
    found = {number.quantity: (number.theirs, number.ours) for number in one.numbers if number.row == "released"}
    assert found["sparse_lambda"] == (10, 10)
    assert found["sparse_kept"] == (7_238_986, half.kept)
    assert found["sparse_r"] == (0.953, pytest.approx(r, abs=1e-6))
    assert unknown.left_out == {"released": "no masks of this model were released"}
    assert "do not fit the model" in wrong.left_out["released"]
    assert "released left out" in str(result)


# --- bad input ---


def test_what_is_not_there_is_told_in_a_line(made, folder, tiny_folders, text, tmp_path):
    tiny, other = tiny_folders["gpt_neox"], tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    long = tmp_path / "long.txt"
    long.write_text("another text than before\n\n" * 200)
    known = {"models": [f"Pythia-160M={tiny}"], "corpus": text, "held_out": 0.3, "out": folder, **QUICK}
    for changed, words in (
        ({"paper": "chang-2025"}, "there is no paper 'chang-2025': did you mean chang-bergen-2025?"),
        ({"rows": ["sweeps"]}, "there is no row 'sweeps': did you mean sweep?"),
        ({"recipe": "theirs"}, "there is no recipe 'theirs': "),
        ({"models": []}, "no model is named"),
        (
            {"models": [f"Pythia-1600M={tiny}"]},
            "there is no model of the paper 'Pythia-1600M': did you mean Pythia-160M",
        ),
        ({"models": ["./nowhere"]}, "there is no model folder './nowhere'"),
        ({"models": ["Pythia-160M=./nowhere"]}, "there is no model folder './nowhere'"),
        ({"models": [tmp_path / "nowhere"]}, "there is no model folder '"),
        ({"target_fraction": 0.1}, "reproduce has no option 'target_fraction'"),
        ({"steps": 3}, "there is no option 'steps'"),
        ({"out": other}, "is not empty and holds no reproduction: choose another folder"),
        ({"out": long}, "is a file, but a folder is needed"),
        ({"max_steps": 7}, r"holds another reproduction \(its max_steps is 6, not 7\): choose another folder"),
        ({"sparsity_weights": (1, 2)}, "its sparsity_weights is 0, 20, not 0, 1, 2"),
        ({"corpus": long}, r"holds numbers of 'Pythia-160M' on another text \(fingerprint"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            bc.reproduce(**{"paper": PAPER, **known, **changed})
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"holds no reproduction: it has no reproduction\.json"):
        bc.load_reproduction(other)


def test_a_damaged_result_is_told(made, folder, tmp_path):
    text = (folder / "reproduction.json").read_text()
    (tmp_path / "reproduction.json").write_text(text.replace('"best_r"', '"worst_r"'))
    with pytest.raises(ValueError, match=r"reproduction\.json' is damaged"):
        bc.load_reproduction(tmp_path)


def test_the_command_line_says_what_is_meant(capsys):
    for arguments, words in (
        (["chang-bergen"], "did you mean chang-bergen-2025?"),
        ([PAPER, "--rows", "sweeps"], "did you mean sweep?"),
        ([PAPER, "--sparsity-weight", "3"], "--sparsity-weight"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["reproduce", *arguments])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
