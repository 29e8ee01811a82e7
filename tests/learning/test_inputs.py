"""What is said of inputs before learning, with plain counts beside it, and inputs of which nothing is said."""

import itertools
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import cli, workflow
from bigram_circuits.text.coverage import context_coverage
from bigram_circuits.text.tokenizers import pieces_of_characters
from tests.conftest import D_VOCAB, byte_tokenizer
from tests.text.test_tokenizers import KINDS, hooked, sentencepiece, words

SHARED = Path(__file__).parents[3] / "shared/models"
CHINESE = ["从前有一只小猫它很喜欢在花园里玩"[start:] * 9 for start in range(16)]


def says(model, corpus, target=None, **recipe):
    target = target or bc.count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab)
    return bc.check_inputs(model, target, corpus, bc.SparsifyConfig(**recipe)).warnings


def random_corpus(n_train=64, n_held_out=16, *, below=20, length=16, seed=0):
    tokens = np.random.default_rng(seed).integers(1, below, (n_train + n_held_out, length))
    return bc.Corpus.from_tokens(tokens[:n_train], tokens[n_train:])


@pytest.fixture(scope="module")
def knowing(tiny_folders):
    """A tiny model whose biases give it the frequencies of `random_corpus`: it knows as much as a unigram does."""
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    with torch.no_grad():
        model.W_U.zero_()
        model.b_U.fill_(-30.0)
        model.b_U[1:20] = 0.0
    return model


# --- nothing is said of what fits ---


def test_nothing_is_said_of_the_reference_model_and_its_text(reference_model):
    corpus = bc.load_corpus("reference", tokenizer=reference_model.tokenizer)
    target = bc.count_ngrams(corpus.train, 2, d_vocab=reference_model.cfg.d_vocab)
    found = bc.check_inputs(reference_model, target, corpus)
    assert found.warnings == ()
    assert str(found) == "nothing to warn of"
    assert found.losses[0] < found.losses[1] - 2
    assert found.used > 0.9


def test_a_model_that_others_trained_fits_its_own_text_and_no_other_script():
    if not (SHARED / "stories260K").is_dir():
        pytest.skip("this machine has no trained model from elsewhere")
    model = bc.load_model(SHARED / "stories260K", device="cpu")
    with (SHARED / "stories260K-text.jsonl").open() as lines:
        stories = [json.loads(line)["text"] for line in itertools.islice(lines, 300)]
    own = bc.load_corpus(stories, tokenizer=model.tokenizer)
    assert says(model, own) == ()
    chinese = bc.load_corpus(CHINESE, tokenizer=model.tokenizer, context_length=64, held_out=0.3)
    inexpressible, unknown, *_ = says(model, chinese)
    assert inexpressible.startswith("97.")
    assert (
        "% of the text's tokens stand for what the model's tokenizer has no tokens for, for example '" in inexpressible
    )
    assert any(character in inexpressible for character in CHINESE[0])
    assert unknown.startswith("the model knows nothing of this text: its next-token loss is ")


# --- tokens ---


def test_bytes_that_are_no_characters_are_counted(tmp_path):
    tokenizer = sentencepiece()
    model = hooked(tmp_path / "llama", tokenizer)
    corpus = bc.load_corpus(
        ["a be é " * (30 + n) for n in range(20)], tokenizer=model.tokenizer, context_length=16, held_out=0.3
    )
    found = bc.check_inputs(model, bc.count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab), corpus)
    names = np.array(tokenizer.convert_ids_to_tokens(corpus.train.ravel().tolist()))
    assert found.inexpressible == pytest.approx(np.isin(names, ["<0xC3>", "<0xA9>"]).mean())
    assert f"{100 * found.inexpressible:.1f}% of the text's tokens" in found.warnings[0]
    assert "for example 'é" in found.warnings[0]
    plain = bc.load_corpus(
        ["a be cd\n" * (30 + n) for n in range(20)], tokenizer=model.tokenizer, context_length=16, held_out=0.3
    )
    assert not any("has no tokens for" in line for line in says(model, plain))  # a line end is a whole character


def test_unknown_words_are_counted_and_named(tmp_path):
    model = hooked(tmp_path / "words", words())
    options = {"tokenizer": model.tokenizer, "context_length": 8, "held_out": 0.3}
    corpus = bc.load_corpus(["the cat sat the dog lay " * (9 + n) for n in range(20)], **options)
    found = bc.check_inputs(model, bc.NextTokenTarget(), corpus)
    assert found.inexpressible == pytest.approx((corpus.train == words().unk_token_id).mean())
    assert f"{100 * found.inexpressible:.1f}% of the text's tokens" in found.warnings[0]
    assert "for example 'dog' and 'lay': " in found.warnings[0]
    assert corpus.without_token == ("dog", "lay")
    known = bc.load_corpus(["the cat sat " * (19 + n) for n in range(20)], **options)
    assert known.without_token == ()
    assert not any("has no tokens for" in line for line in says(model, known, bc.NextTokenTarget()))


def test_where_bytes_are_all_there_is_they_stand_in_for_nothing():
    assert pieces_of_characters(byte_tokenizer()) == set()
    pieces = pieces_of_characters(sentencepiece())
    assert sorted(sentencepiece().convert_ids_to_tokens(sorted(pieces))) == [
        f"<0x{byte:02X}>" for byte in range(128, 256)
    ]
    assert not any(pieces_of_characters(KINDS[kind]()) for kind in ("wordpiece", "words", "end of word"))


def test_a_text_of_another_tokenizer_is_told_from_one_without(tmp_path, knowing):
    model = hooked(tmp_path / "words", words())
    other = bc.load_corpus(
        ["the cat sat " * (19 + n) for n in range(20)], tokenizer=knowing.tokenizer, context_length=8, held_out=0.3
    )
    same = bc.Corpus.from_tokens(other.train % 4, other.held_out % 4)
    wrong = bc.Corpus(same.train, same.held_out, "a text", (1, 1), "ab", other.tokenizer_hash)
    assert says(model, wrong)[0].startswith("the text was tokenised by another tokenizer than the model's")
    assert not any("another tokenizer" in line for line in says(model, same))


def test_one_token_that_is_most_of_the_text(knowing):
    corpus = random_corpus()
    assert says(knowing, corpus) == ()
    mostly = np.where(np.random.default_rng(1).random(corpus.train.shape) < 0.7, 5, corpus.train)
    said = says(knowing, bc.Corpus.from_tokens(mostly, corpus.held_out))
    beginning = f"{100 * (mostly == 5).mean():.1f}% of the training text is a single token 5, '"
    assert any(line.startswith(beginning) for line in said)


# --- losses ---


def test_losses_are_those_of_hugging_face_and_of_counted_frequencies(tiny_folders, tiny_model):
    corpus = random_corpus(40, 30, below=D_VOCAB)
    found = bc.check_inputs(tiny_model, bc.NextTokenTarget(), corpus)
    rows = corpus.held_out[np.linspace(0, 29, 16).round().astype(int)]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_folders["gpt_neox"])(torch.from_numpy(rows).long()).logits
    own = -logits[:, :-1].log_softmax(-1).gather(2, torch.from_numpy(rows[:, 1:, None]).long())[..., 0].numpy()
    seen = Counter(corpus.train.ravel().tolist())
    known = np.array([[token in seen for token in row[1:]] for row in rows.tolist()])
    assert 0 < known.mean() < 1  # some have no finite surprisal under the frequencies
    unigram = [-np.log(seen[token] / corpus.train.size) for token in rows[:, 1:][known].tolist()]
    assert found.losses == pytest.approx((own[known].mean(), np.mean(unigram)), rel=1e-4)
    line = f"its next-token loss is {found.losses[0]:.2f} nats on held-out text, that of the training text's token "
    assert any(f"{line}frequencies alone {found.losses[1]:.2f}" in one for one in found.warnings)


# --- the size of the text ---


@pytest.mark.parametrize("order", [2, 3])
def test_contexts_are_counted_as_by_hand(order):
    corpus = random_corpus(12, 8, below=40)
    found = context_coverage(corpus.train, corpus.held_out, order, d_vocab=D_VOCAB)

    def contexts(rows):
        return [tuple(row[at : at + order - 1]) for row in rows.tolist() for at in range(len(row) - order + 1)]

    seen, held_out = Counter(contexts(corpus.train)), contexts(corpus.held_out)
    once = {context for context, count in seen.items() if count == 1}
    assert (found.order, found.contexts, found.once) == (order, len(seen), len(once))
    assert found.train_once == pytest.approx(len(once) / seen.total())
    assert found.held_out_once == pytest.approx(np.mean([context in once for context in held_out]))
    assert found.held_out_unseen == pytest.approx(np.mean([context not in seen for context in held_out]))
    short = corpus.train[:, : order - 1]
    assert context_coverage(short, short, order, d_vocab=D_VOCAB) is None


def test_a_text_too_small_for_its_order(knowing):
    corpus = random_corpus()
    trigram = bc.count_ngrams(corpus.train, 3, d_vocab=D_VOCAB)
    found = bc.check_inputs(knowing, trigram, corpus)
    assert any(line.startswith("the training text is small for a trigram: ") for line in found.warnings)
    assert any("--order 2" in line and f"({found.contexts.once:,} of " in line for line in found.warnings)
    finite = np.isfinite(trigram.surprisal(corpus.held_out).numpy()).mean()
    assert found.used == pytest.approx(finite)
    assert any(f"above 0 at only {100 * finite:.1f}% of the held-out positions" in line for line in found.warnings)
    other = random_corpus(seed=1, below=200)
    assert bc.check_inputs(knowing, bc.count_ngrams(other.train, 2, d_vocab=D_VOCAB), corpus).contexts is None
    short = bc.Corpus.from_tokens(corpus.train.reshape(-1, 2), corpus.held_out.reshape(-1, 2))
    assert any("sequences have 2 tokens, so that every position" in line for line in says(knowing, short, trigram))


def test_parts_of_too_few_sequences(knowing):
    (few,) = says(knowing, random_corpus(n_held_out=3))
    assert few.startswith("the held-out part has 3 sequences of 16 tokens, too few for intervals")
    (batch,) = says(knowing, random_corpus(), batch_size=100)
    assert batch.startswith("the training part has 64 sequences, fewer than a batch of 100")


# --- who says it ---


def test_a_study_warns_before_it_learns(tiny_model, tmp_path, monkeypatch):
    corpus = random_corpus(n_held_out=2)

    def learn(*_, **__):
        raise ValueError("learning begins")

    monkeypatch.setattr(workflow, "find_mask", learn)
    with pytest.warns(bc.InputWarning) as told, pytest.raises(ValueError, match="learning begins"):
        bc.study(tiny_model, corpus, out=tmp_path / "run")
    assert [str(one.message).partition(":")[0] for one in told] == [
        "the model knows nothing of this text",
        "the held-out part has 2 sequences of 16 tokens, too few for intervals (a bootstrap over sequences)",
    ]
    monkeypatch.setattr(workflow, "sparsity_path", learn)
    with pytest.warns(bc.InputWarning), pytest.raises(ValueError, match="learning begins"):
        bc.study(tiny_model, corpus, out=tmp_path / "path", sparsity_weights=(1, 10))
    with pytest.raises(ValueError, match="the held-out part of the corpus 'tokens' is empty, but a study measures on"):
        bc.study(tiny_model, bc.Corpus.from_tokens(corpus.train, corpus.train[:0]), out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command_line_says_each_in_a_line_and_the_run_records_them(tiny_folders, tmp_path, capsys):
    text, folder = tmp_path / "text.jsonl", tmp_path / "run"
    text.write_text("\n".join(json.dumps({"text": f"{number} " * 60}) for number in range(20)))
    options = [
        "--context-length",
        "32",
        "--held-out",
        "0.01",
        "--max-steps",
        "2",
        "--batch-size",
        "4",
        "--random-seeds",
        "1",
    ]
    command = ["find", str(tiny_folders["gpt2"]), "--corpus", str(text), *options, "--no-analysis", "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main([*command, "--out", str(folder)]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert cli.main([*command, "--out", str(folder)]) == 0  # found before: no hour is spent
        assert "warning" not in capsys.readouterr().err
    checked = bc.load_run(folder).checked
    assert said == [f"bigram-circuits: warning: {line}" for line in checked.warnings]
    assert len(said) >= 2
    page = (folder / "report.html").read_text()
    assert "Do model, text and target fit together?" in page
    assert page.count("Warning before learning: ") == len(said)
    assert f"contexts of 2-grams, {checked.contexts.once} of them only once" in page
