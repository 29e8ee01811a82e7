"""What is measured and minimised at the answers of a task, against plain Hugging Face passes over unpadded rows."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.evaluation import Evaluation
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.recipe import MEASURES
from bigram_circuits.targets.base import counted, logits_at
from tests.conftest import TINY_CONFIGS, byte_tokenizer

ROWS = [
    {"prompt": "ab ab a", "answer": "b", "wrong": ["c", "d"]},
    {"prompt": "xyz", "answer": "w", "wrong": "v"},
    {"prompt": "hello there, how ar", "answer": "e", "wrong": ["a", "o"]},
    {"prompt": "12345", "answer": ["6", "7"], "wrong": "5"},
    {"prompt": "The q", "answer": "u", "wrong": "x"},
    {"prompt": "one two thr", "answer": "e", "wrong": "i"},
]
LONG = [{"prompt": "ab ab a", "answer": "b a"}, {"prompt": "xyz", "answer": "w"}, {"prompt": "hello", "answer": " you"}]
KINDS = {"loss": ROWS, "logit_difference": ROWS, "kl": LONG}

pytestmark = pytest.mark.usefixtures("one_thread")


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plain(folder, rows):
    """Log-probabilities where the tokens of each row's answer are predicted, from a pass over that row alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, found = byte_tokenizer(), []
    for row in rows:
        answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
        ids = [0, *tokenizer.encode(row["prompt"] + answer)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().numpy()
        found.append((log_softmax(logits[-1 - len(answer) : -1]), ids[-len(answer) :]))
    return found


def ids_of(texts):
    return [byte_tokenizer().encode(text)[0] for text in ([texts] if isinstance(texts, str) else texts)]


def by_hand(read, rows):
    """Every measure of every row, with NumPy."""
    found = {name: [] for name in ("loss", "probability", "accuracy", "logit_difference", "preferred")}
    for (log_probs, ids), row in zip(read, rows, strict=True):
        several = not isinstance(row["answer"], str)
        right = ids_of(row["answer"]) if several else [ids[0]]
        if several:
            log_p = math.log(sum(math.exp(log_probs[0, one]) for one in right))
            first = log_probs[0].argmax() in right
        else:
            log_p = sum(log_probs[place, one] for place, one in enumerate(ids))
            first = all(log_probs[place].argmax() == one for place, one in enumerate(ids))
        found["loss"].append(-log_p)
        found["probability"].append(math.exp(log_p))
        found["accuracy"].append(float(first))
        if "wrong" in row:
            wrong = ids_of(row["wrong"])
            found["logit_difference"].append(log_p - math.log(sum(math.exp(log_probs[0, one]) for one in wrong)))
            found["preferred"].append(float(log_probs[0, right].max() > log_probs[0, wrong].max()))
    return {name: np.array(values) for name, values in found.items() if values}


@pytest.mark.parametrize("architecture", list(TINY_CONFIGS))
@pytest.mark.parametrize("rows", [ROWS, LONG], ids=["with wrong", "several tokens"])
def test_answers_are_measured_as_by_plain_passes_over_unpadded_rows(architecture, rows, tiny_folders):
    expected = by_hand(plain(tiny_folders[architecture], rows), rows)
    for side in ("left", "right"):  # the tokenizer's padding makes no difference
        model = bc.load_model(tiny_folders[architecture], device="cpu")
        model.tokenizer.padding_side = side
        task = bc.load_task(rows, tokenizer=model.tokenizer)
        found = bc.measure_task(model, task)
        assert {one.name for one in found.quantities} == {*expected, "kl"}
        for name, values in expected.items():
            assert found.get(name)["full"] == pytest.approx(values.mean(), rel=1e-4, abs=1e-5), name
        assert found.get("kl")["full"] == 0
        at = found.quantities.index(found.quantity("loss"))
        assert found.low[at, 0] < found.values[at, 0] < found.high[at, 0]
        target, tokens = bc.TaskTarget(task), torch.from_numpy(task.tokens.astype(np.int64))
        with torch.no_grad():
            logits = model(tokens)
        np.testing.assert_allclose(target.cross_entropy(logits, tokens)[:, 0], expected["loss"], rtol=1e-4)
        np.testing.assert_allclose(target.agreement(logits, tokens)[:, 0], expected["accuracy"])
        assert counted(target, tokens).sum() == task.scored.sum()
        assert logits_at(target, logits, tokens).shape == (task.scored.sum(), 257)
        if "preferred" in expected:
            target = bc.TaskTarget(task, "logit_difference")
            choice = np.log1p(np.exp(-expected["logit_difference"]))
            np.testing.assert_allclose(target.cross_entropy(logits, tokens)[:, 0], choice, rtol=1e-4)
            np.testing.assert_allclose(target.agreement(logits, tokens)[:, 0], expected["preferred"])


def test_kl_is_from_the_full_model_where_the_answer_is_predicted(tiny_folders, tiny_model, tmp_path):
    subnetwork = bc.Subnetwork.full(tiny_model).random_like().drop_layer(1)
    bc.export_huggingface(tiny_model, subnetwork, tmp_path / "masked")
    task = bc.load_task(LONG, tokenizer=tiny_model.tokenizer)
    read = [plain(folder, LONG) for folder in (tiny_folders["gpt_neox"], tmp_path / "masked")]
    kl = [(np.exp(full) * (full - own)).sum() for (full, _), (own, _) in zip(*read, strict=True)]
    entropy = [-(np.exp(full) * full).sum() for full, _ in read[0]]
    target = bc.TaskTarget(task, "kl", model=tiny_model)
    tokens = torch.from_numpy(task.tokens.astype(np.int64))
    with bc.masked(tiny_model, subnetwork), torch.no_grad():
        logits = tiny_model(tokens)
        np.testing.assert_allclose(target.cross_entropy(logits, tokens)[:, 0], np.add(kl, entropy), rtol=1e-4)
        same = [(full.argmax(-1) == own.argmax(-1)).all() for (full, _), (own, _) in zip(*read, strict=True)]
        np.testing.assert_allclose(target.agreement(logits, tokens)[:, 0], same)
    np.testing.assert_allclose(target.entropy(tokens)[:, 0], entropy, rtol=1e-4)
    surprisal = target.surprisal(tokens)
    assert torch.isfinite(surprisal).sum() == task.scored.sum()
    own = [full[place, one] for full, ids in read[0] for place, one in enumerate(ids)]
    np.testing.assert_allclose(surprisal[torch.isfinite(surprisal)], np.negative(own), rtol=1e-4)
    found = bc.measure_task(tiny_model, task, subnetwork)
    assert found.names == ("full", "subnetwork", "complement", "random")
    assert found.get("kl")["subnetwork"] == pytest.approx(np.mean(kl), rel=1e-4)


def test_an_evaluation_counts_the_answers_alone(tiny_model):
    task = bc.load_task(ROWS, tokenizer=tiny_model.tokenizer)
    corpus, target = task.corpus(0.5), bc.TaskTarget(task)
    subnetwork = bc.Subnetwork.full(tiny_model).random_like().drop_layer(1)
    found = bc.evaluate(tiny_model, subnetwork, target, corpus.held_out, seeds=2)
    held_out = target.task_of(corpus.held_out)
    assert {row.prompt for row in held_out.rows} | {row.prompt for row in task.split(0.5)[0].rows} == {
        row["prompt"] for row in ROWS
    }
    measured = bc.measure_task(tiny_model, held_out, subnetwork)
    for name, numbers in (("full", found.full), ("subnetwork", found.subnetwork), ("complement", found.complement)):
        assert numbers.cross_entropy == pytest.approx(measured.get("loss")[name], rel=1e-5)
        assert numbers.top1_agreement == measured.get("accuracy")[name]
        assert math.isnan(numbers.surprisal_correlation)
    assert found.positions == len(held_out)
    assert found.by_loss
    gain = found.empty.cross_entropy - found.full.cross_entropy
    assert math.isnan(found.recovered) == (gain <= 0)
    assert "cross-entropy" in found.verdict
    assert "undefined, since the target's surprisals do not vary" in str(found)
    assert repr(Evaluation.from_json(json.loads(json.dumps(found.to_json())))) == repr(found)


def test_the_verdict_is_by_cross_entropy_where_correlations_are_undefined():
    def numbers(loss):
        return {"surprisal_correlation": None, "cross_entropy": loss, "kl": loss, "mean_surprisal": loss,
                "top1_agreement": 0.5, "kept": 5, "total": 100, "fraction": 0.05}  # fmt: skip

    record = {name: numbers(loss) for name, loss in (("subnetwork", 1.0), ("full", 0.8), ("empty", 5.0))}
    record["advantage"] = {"full": [-0.4, 0.1], "empty": [3.5, 4.5]}
    found = Evaluation.from_json(record)
    assert found.recovered == pytest.approx(4 / 4.2)
    assert "sufficient: 95.2% of the full model's gain over the empty subnetwork" in found.verdict
    assert "below that of the empty subnetwork" in found.verdict
    assert "NOT shown to be below that of the full model" in found.verdict
    better = Evaluation.from_json({**record, "full": numbers(2.0)})
    assert "better at it than the full model" in better.verdict
    assert "undefined" in Evaluation.from_json({**record, "full": numbers(6.0)}).verdict


@pytest.mark.parametrize("measure", MEASURES)
def test_masks_are_learned_for_a_task(tiny_model, measure):
    task = bc.load_task(KINDS[measure], tokenizer=tiny_model.tokenizer)
    target, corpus = bc.TaskTarget(task, measure, model=tiny_model), task.corpus(0.3)
    before = bc.weight_hash(tiny_model)
    config = bc.SparsifyConfig(max_steps=30, batch_size=8, sparsity_weight=0.1, retries=0)
    found = bc.find_subnetwork(tiny_model, target, corpus, config)
    assert bc.weight_hash(tiny_model) == before
    assert found.history[-1].cross_entropy < found.history[0].cross_entropy
    polished = bc.polish(tiny_model, found, target, corpus, sparsity_weight=0.1, passes=1, most=6)
    random = found.subnetwork.random_like()
    losses = [
        bc.evaluate(tiny_model, one, target, corpus.train, controls=False).subnetwork.cross_entropy
        for one in (found.subnetwork, random)
    ]
    assert losses[0] < losses[1]
    assert polished.before == pytest.approx(losses[0], rel=1e-4)
    assert bc.forecast_memory(tiny_model, target, corpus, config).per_sequence > 0


def test_a_nonsense_target_deals_the_answers_to_other_prompts(tiny_model):
    rows = [{"prompt": f"row {n:02d}", "answer": chr(97 + n), "wrong": chr(98 + n)} for n in range(12)]
    task = bc.load_task(rows, tokenizer=tiny_model.tokenizer)
    tokens = torch.from_numpy(task.tokens.astype(np.int64))
    for measure in MEASURES:
        target = bc.TaskTarget(task, measure, model=tiny_model)
        nonsense = target.nonsense(0)
        assert nonsense.fingerprint != target.fingerprint
        assert nonsense.fingerprint == target.nonsense(0).fingerprint != target.nonsense(1).fingerprint
        with torch.no_grad():
            logits = tiny_model(tokens)
        mine, other = (one.cross_entropy(logits, tokens) for one in (target, nonsense))
        assert (mine != other).sum() > 6
        if measure == "loss":
            order = nonsense._asked
            assert sorted(order) == list(range(12))
            own = logits[:, -2].log_softmax(-1)
            dealt = torch.from_numpy(task.tokens[order, -1].astype(np.int64))
            np.testing.assert_allclose(other[:, 0], -own[torch.arange(12), dealt], rtol=1e-5)
        if measure == "kl":  # the full model's distribution at another prompt
            assert torch.equal(nonsense.entropy(tokens), target.entropy(tokens)[torch.from_numpy(nonsense._asked)])


def test_rows_are_known_with_and_without_padding(tiny_model):
    task = bc.load_task(LONG, tokenizer=tiny_model.tokenizer)
    target = bc.TaskTarget(task)
    short = torch.from_numpy(task.tokens[1:2, : task.ends[1] + 1].astype(np.int64))
    whole = torch.from_numpy(task.tokens[1:2].astype(np.int64))
    with torch.no_grad():
        losses = [target.cross_entropy(tiny_model(tokens), tokens) for tokens in (short, whole)]
    torch.testing.assert_close(*losses)
    with pytest.raises(NotShownError, match="defined on the prompts of the task 'rows' alone"):
        target.surprisal(torch.full((1, 5), 7))
    rows = [{"prompt": f"{n:02d}", "answer": "x" * (1 + (n % 3 == 0))} for n in range(12)]
    task = bc.load_task(rows, tokenizer=tiny_model.tokenizer)
    text = bc.TaskTarget(task).unpadded(task.corpus(0.4))
    assert text.train.shape[1] == text.held_out.shape[1] == 4
    assert (text.train[:, 1:] > 0).all()


def test_wrong_targets_are_refused(tiny_model):
    task = bc.load_task(LONG, tokenizer=tiny_model.tokenizer)
    twice = task.select(np.array([0, 1, 0]))
    for bad, message in (
        (lambda: bc.TaskTarget(LONG), "made of a Task, such as load_task returns, not of list"),
        (lambda: bc.TaskTarget(task, "r"), "measure must be one of kl, logit_difference, loss, not 'r'"),
        (lambda: bc.TaskTarget(task, "logit_difference"), "needs wrong answers, but the task 'rows' has none"),
        (lambda: bc.TaskTarget(task, "kl"), "compares with the full model: give it as model="),
        (lambda: bc.TaskTarget(twice), "prompts 0 and 2 of the task 'rows' have the same tokens"),
        (lambda: bc.measure_task(tiny_model, LONG), "measures a Task, such as load_task returns, not a list"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_inputs_are_checked_by_ability_and_rows(tiny_model):
    task = bc.load_task(ROWS, tokenizer=tiny_model.tokenizer)
    found = bc.check_inputs(tiny_model, bc.TaskTarget(task), task.corpus())
    assert not found.ability.able
    first, few, batch = found.warnings
    assert "NOT shown to do it" in first
    assert "held-out part of the task has" in few
    assert "fewer than a batch of 16" in batch
    assert type(found).from_json(json.loads(json.dumps(found.to_json()))) == found
    expected = by_hand(plain_of(tiny_model, task), ROWS)["preferred"].mean()
    assert bc.analysis.ability(tiny_model, task).preferred == pytest.approx(expected)
    assert found.ability.preferred_by_chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 2 / 3 + 1 / 2 + 1 / 2) / 6)


def plain_of(model, task):
    """As `plain`, from the hooked model, of rows whose answers are single tokens."""
    with torch.no_grad():
        logits = model(torch.from_numpy(task.tokens.astype(np.int64))).double().numpy()
    ends = task.ends
    return [
        (log_softmax(logits[row, end - 1 : end]), [int(task.tokens[row, end])]) for row, end in enumerate(ends.tolist())
    ]
