"""The n-gram ladder: what it measures is what Hugging Face's model and NumPy give, and it goes on and reads back."""

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.experiments.ladder import FREE_STEPS, NESTED_STEPS, WITHIN
from bigram_circuits.workflow import ladder as ladder_of
from tests.conftest import UNFIT_INPUTS
from tests.example_runs import HOSTILE, Elements, without_libraries

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = bc.SparsifyConfig(
    max_steps=6, batch_size=8, learning_rate=0.1, beta_growth=1.3, sparsity_weight=0.3, retries=0
)
OPTIONS = {"prompts": 24, "period": 6, "check_memory": "off"}
MASKS = ("unigram", "bigram", "trigram", "induction", *WITHIN)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture(scope="module")
def planted(place):
    return bc.plant_attention("induction", d_vocab=8, folder=place / "model")


@pytest.fixture(scope="module")
def corpus():
    """Text of a trigram over the same tokens."""
    text = bc.plant_attention("trigram", d_vocab=8).corpus
    return bc.Corpus.from_tokens(text.train[:64], text.held_out[:24], source="a planted trigram")


@pytest.fixture(scope="module")
def ladder(planted, corpus, place):
    return bc.find_ladder(planted.model, corpus, CONFIG, run_dir=place / "runs", **OPTIONS)


@pytest.fixture(scope="module")
def masks(ladder, planted, place):
    found = {name: bc.load_run(place / "runs" / name.replace(" ", "-")).subnetwork for name in MASKS}
    return found | {"empty": bc.Subnetwork.empty(planted.model), "full": bc.Subnetwork.full(planted.model)}


def losses_by_hand(planted, place, mask, tokens):
    """Surprisals [sequence, position] of the next token of the plain model with its parameters multiplied by a mask."""
    plain = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        parameters = dict(plain.named_parameters())
        for name, kept in mask.to_huggingface(planted.model).items():
            parameters[name].mul_(torch.as_tensor(kept, dtype=torch.float32))
        logits = plain(torch.from_numpy(np.asarray(tokens, dtype=np.int64))).logits.double().numpy()
    found = log_softmax(logits[:, :-1], axis=-1)
    return -np.take_along_axis(found, np.asarray(tokens, dtype=np.int64)[:, 1:, None], -1)[..., 0]


def test_every_loss_is_that_of_the_masked_plain_model(ladder, masks, planted, corpus, place):
    task = bc.analysis.repeated_random_tokens(planted.model, prompts=24, period=6).distinct()
    rows = task.corpus().held_out
    assert [one.name for one in ladder.rungs] == ["empty", *MASKS, "full"]
    for one in ladder.rungs:
        assert one.kept == masks[one.name].kept
        by_hand = losses_by_hand(planted, place, masks[one.name], corpus.held_out)
        assert one.loss == pytest.approx(by_hand.mean(), rel=1e-5)
        assert one.loss_interval[0] <= one.loss <= one.loss_interval[1]
        by_hand = losses_by_hand(planted, place, masks[one.name], rows)[:, -5:]  # all but the block's first token
        assert one.repeated == pytest.approx(by_hand.mean(), rel=1e-4)
    assert ladder.ability.able
    assert ladder.rung("full").repeated < 1 < ladder.rung("empty").repeated


def test_each_is_measured_against_its_own_target(ladder, masks, planted, corpus):
    for order, name in enumerate(("unigram", "bigram", "trigram"), 1):
        table = bc.count_ngrams(corpus.train, order, d_vocab=8)
        for rung in (one for one in ladder.rungs if one.name.split()[0] == name):
            alone = bc.evaluate(planted.model, masks[rung.name], table, corpus.held_out, seeds=1)
            assert rung.own == alone.subnetwork
            assert (rung.kl_of_empty, rung.kl_of_full) == (alone.empty.kl, alone.full.kl)
            assert rung.faithfulness == pytest.approx(1 - alone.subnetwork.kl / alone.empty.kl)
    induced = ladder.rung("induction").own
    assert induced.kl == pytest.approx(5 * ladder.rung("induction").repeated, rel=1e-5)
    assert math.isnan(induced.surprisal_correlation)


def test_nested_masks_are_nested_and_steps_add_up(ladder, masks):
    for inner, outer in WITHIN.items():
        assert (masks[inner] - masks[outer]).kept == 0
        assert ladder.rung(inner).within == outer
    loss = {one.name: one.loss for one in ladder.rungs}
    for kind, names in (("free", FREE_STEPS), ("nested", NESTED_STEPS)):
        steps = [one for one in ladder.steps if one.ladder == kind]
        assert [(one.before, one.name) for one in steps] == list(itertools.pairwise(names))
        for one in steps:
            assert one.gain == pytest.approx(loss[one.before] - loss[one.name])
            assert one.interval[0] <= one.gain <= one.interval[1]
        assert sum(one.gain for one in steps) == pytest.approx(loss["empty"] - loss["full"])


def test_shared_weights_are_counted_against_chance(ladder, masks):
    for one in ladder.overlaps:
        a, b = ({name: mask.numpy() for name, mask in masks[key].items()} for key in (one.first, one.second))
        assert one.shared == sum((a[name] & b[name]).sum() for name in a)
        assert one.expected == pytest.approx(sum(a[name].sum() * b[name].sum() / a[name].size for name in a))
        assert one.share_of_first == pytest.approx(one.shared / masks[one.first].kept)
    given = {(one.first, one.second) for one in ladder.overlaps if one.is_given}
    nested = {("trigram", "bigram within trigram"), ("trigram", "unigram within bigram")}
    assert given == nested | {("bigram within trigram", "unigram within bigram")}
    for one in ladder.rungs:
        if one.places is not None:
            assert sum(one.places.values()) == one.kept
            assert set(one.places) == {f"L{layer}.{part}" for layer in range(2) for part in ("attn", "mlp")}


def test_it_goes_on_where_it_was_interrupted(ladder, planted, corpus, place):
    (place / "runs" / "ladder.json").unlink()

    class Never:
        def on_step(self, record):
            raise AssertionError("nothing is left to be learned")

        def on_end(self, found):
            pass

    again = bc.find_ladder(planted.model, corpus, CONFIG, run_dir=place / "runs", callbacks=[Never()], **OPTIONS)
    read = bc.load_ladder(place / "runs")
    assert again.to_json() == ladder.to_json() == read.to_json()
    with pytest.raises(ValueError, match="another run"):
        bc.find_ladder(planted.model, corpus, replace(CONFIG, seed=1), run_dir=place / "runs", **OPTIONS)


def test_what_cannot_be_is_refused(planted, corpus, ladder, place, tmp_path):
    with pytest.raises(ValueError, match="leave out target_fraction"):
        bc.find_ladder(planted.model, corpus, replace(CONFIG, target_fraction=0.1))
    with pytest.raises(ValueError, match="held-out part of the corpus 'tokens' is empty"):
        bc.find_ladder(planted.model, bc.Corpus.from_tokens(corpus.train, corpus.held_out[:0]))
    with pytest.raises(ValueError, match="have 41 tokens, more than the model's 15"):
        bc.find_ladder(bc.plant_attention("previous_token", d_vocab=24).model, corpus, period=20)
    with pytest.raises(FileNotFoundError, match="holds no ladder"):
        bc.load_ladder(tmp_path)
    ladder.save(tmp_path)
    record = json.loads((tmp_path / "ladder.json").read_text())
    (tmp_path / "ladder.json").write_text(json.dumps(record | {"model": "other"}))
    with pytest.raises(ValueError, match="is damaged"):
        bc.load_ladder(tmp_path)
    with pytest.raises(ValueError, match="there is no rung 'fourgram'"):
        ladder.rung("fourgram")
    with pytest.raises(ValueError, match="no option 'order'"):
        ladder_of(planted.model, corpus, order=2)
    with pytest.raises(ValueError, match="is a folder"):
        bc.write_ladder(ladder, tmp_path)


def test_it_is_shown(ladder):
    table = ladder.to_dataframe()
    assert table.rung.tolist() == [one.name for one in ladder.rungs]
    assert table.mean_surprisal.tolist() == [one.loss for one in ladder.rungs]
    assert table.kept.tolist() == [one.kept for one in ladder.rungs]
    bars = ladder.plot("repeated_surprisal").data[0]
    assert list(bars.y) == [one.repeated for one in ladder.rungs]
    for text in (str(ladder), ladder._repr_html_()):
        for one in ladder.rungs:
            assert one.name in text
            assert f"{one.kept:,}" in text
        assert f"{ladder.steps[0].gain:+.3f}" in text
    unable = replace(ladder, ability=replace(ladder.ability, interval=(1.0, 9.0)))
    assert "not shown to do it" in str(unable)


def test_the_page_is_one_file_with_every_number(ladder, tmp_path):
    page = bc.write_ladder(replace(ladder, model=f"model {HOSTILE}"), tmp_path / "ladder.html").read_text()
    rest = without_libraries(page)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", rest)
    assert "<img" not in rest
    elements = Elements(rest)
    text = " ".join(elements.text)
    assert "Left out" not in text
    for heading in ("The rungs", "What each step adds", "Induction", "Which weights they share", "Where they live"):
        assert heading in text
    for one in ladder.rungs:
        assert {one.loss, one.repeated} <= set(elements.values)
    assert {one.gain for one in ladder.steps} | {one.shared for one in ladder.overlaps} <= set(elements.values)


@UNFIT_INPUTS
def test_the_command_writes_folder_and_page(tiny_folders, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} bottles of beer on the wall, {n} bottles." for n in range(99)))
    out = tmp_path / "out"
    command = ["ladder", str(tiny_folders["gpt2"]), "--corpus", str(tmp_path / "text.txt"), "--out", str(out)]
    command += ["--context-length", "32", "--max-steps", "1", "--retries", "0", "--held-out", "0.3", "--device", "cpu"]
    command += ["--granularity", "mlp=neuron", "--check-memory", "off", "--batch-size", "2"]
    assert cli.main([*command, "--json"]) == 0
    answer, told = capsys.readouterr()
    found = json.loads(answer)
    assert (found["folder"], found["page"]) == (str(out), str(out / "ladder.html"))
    assert found["ladder"] == bc.load_ladder(out).to_json()
    assert str(bc.load_ladder(out)) in told
    assert str(out / "ladder.html") in told
    assert {path.name for path in out.iterdir()} >= {"bigram-within-trigram", "induction", "ladder.json", "ladder.html"}
    with pytest.raises(SystemExit):
        cli.main(["ladder", "--target-fraction", "0.1"])
