"""The state of the model and of torch: results do not depend on it, and it is as before afterwards."""

import contextlib
import threading
import weakref

import numpy as np
import pytest
import torch
from transformers import GPT2Config

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.experiments.controls import correlation_without_blocks, learn_linear_map
from bigram_circuits.models import edges, state
from tests.conftest import D_VOCAB, save_tiny

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (6, 16))
CONFIG = bc.SparsifyConfig(max_steps=2, batch_size=2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 that would drop half of its activations in training mode."""
    config = GPT2Config(
        vocab_size=D_VOCAB, n_embd=24, n_layer=2, n_head=4, n_inner=40, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5,
        attn_pdrop=0.5,
    )  # fmt: skip
    return save_tiny(tmp_path_factory.mktemp("dropout"), config)


@pytest.fixture(scope="module")
def model(folder):
    return bc.load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def corpus():
    return bc.Corpus.from_tokens(TEXT, TEXT[::-1])


@pytest.fixture(scope="module")
def target():
    return bc.count_ngrams(TEXT, d_vocab=D_VOCAB)


def half(model):
    return bc.Subnetwork.full(model).random_like().drop_layer(1)


def rows(model):
    return bc.load_task([{"prompt": "ab", "answer": "c"}, {"prompt": "d", "answer": "ef"}], tokenizer=model.tokenizer)


def latents(model):
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (24, 5), "b_enc": (5,), "W_dec": (5, 24), "b_dec": (24,)}
    tensors = {
        name: torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu") for name, shape in shapes.items()
    }
    return bc.Dictionary("standard", **tensors)


def probabilities(model):
    with torch.no_grad():
        return bc.ModelTarget(model).log_probs(torch.from_numpy(TEXT[:2]))


# every public function that runs a model; what it returns is compared as text and as numbers
USES = {
    "evaluate": lambda m, t, c: bc.evaluate(m, half(m), t, c.held_out, seeds=1).to_json(),
    "find_subnetwork": lambda m, t, c: bc.find_subnetwork(m, t, c, CONFIG, check_memory="off").subnetwork.checksum,
    "find_circuit": lambda m, t, c: bc.find_circuit(m, t, c, CONFIG, units="head", check_memory="off").circuit.checksum,
    "replaced": lambda m, t, c: [
        value.tolist() for value in bc.replaced(m, bc.Circuit.full(m), "mean", text=c).replacement.means.values()
    ],
    "same_function": lambda m, t, c: str(bc.same_function(m, half(m), half(m).random_like(1), t, c.held_out)),
    "node_effects": lambda m, t, c: [
        score.tolist() for score in bc.node_effects(m, bc.Circuit.full(m, "head"), t, c.held_out).values()
    ],
    "faithfulness_curves": lambda m, t, c: bc.faithfulness_curves(
        m, bc.ModelTarget(m), c, CONFIG, units="head", sizes=(0.5,), methods=("attribution",)
    ).curves.to_dataframe(),
    "worst_case_ablation": lambda m, t, c: (
        bc.worst_case_ablation(m, half(m), bc.ModelTarget(m), c, (0, 2), 2, force=True).values
    ),
    "polish": lambda m, t, c: bc.polish(m, half(m), t, c, most=8, passes=1).subnetwork.checksum,
    "granularity": lambda m, t, c: (
        bc.find_subnetwork(
            m, t, c, bc.SparsifyConfig(max_steps=2, granularity={"attn": "head", "mlp": "neuron"}), check_memory="off"
        ).subnetwork.checksum
    ),
    "forecast_memory": lambda m, t, c: bc.forecast_memory(m, t, c, CONFIG).per_sequence,
    "check_inputs": lambda m, t, c: bc.check_inputs(m, t, c, CONFIG).to_json(),
    "InducedTarget": lambda m, t, c: bc.InducedTarget(m, c.train).log_probs(torch.from_numpy(TEXT[:2])),
    "ModelTarget": lambda m, t, c: probabilities(m),
    "ngrams": lambda m, t, c: bc.count_ngrams(TEXT, order=3, d_vocab=D_VOCAB).log_probs(
        torch.from_numpy(TEXT[::-1].copy())
    ),
    "magnitude": lambda m, t, c: bc.Subnetwork.magnitude(m, like=half(m)).checksum,
    "edge_sites": lambda m, t, c: (edges._LAYOUTS.pop(m, None), bc.edge_sites(m))[1],
    "weight_hash": lambda m, t, c: bc.weight_hash(m),
    "huggingface": lambda m, t, c: sorted(half(m).to_huggingface(m)),
    "logit_lens": lambda m, t, c: analysis.logit_lens(m, half(m), t, c).values,
    "prompt_lens": lambda m, t, c: analysis.logit_lens(m, half(m), text="abcdef").values,
    "affine_lens": lambda m, t, c: analysis.affine_lens(m, half(m), t, c, refine_steps=2).values,
    "cosine": lambda m, t, c: analysis.cosine_to_unembedding(m, half(m), t, c).values,
    "prompt_cosine": lambda m, t, c: analysis.cosine_to_unembedding(m, half(m), t, "abcdef").values,
    "rotations": lambda m, t, c: analysis.layer_rotations(m, half(m), c).values,
    "covariance": lambda m, t, c: analysis.covariance_similarity(m, half(m), c).values,
    "covariance_cosine": lambda m, t, c: (
        analysis.covariance_similarity(m, half(m), c, measure="covariance_cosine").values
    ),
    "without_blocks": lambda m, t, c: correlation_without_blocks(m, t, c.held_out),
    "linear_map": lambda m, t, c: learn_linear_map(m, t, c.train, steps=2, batch_size=2),
    "ablate": lambda m, t, c: analysis.ablate(m, ["L0H1", "L1.mlp", "complement"], half(m), t, c, seeds=1).values,
    "ablate_means": lambda m, t, c: analysis.ablate(m, "mlps", half(m), t, c, by="mean", seeds=0).values,
    "stochastic": lambda m, t, c: analysis.stochastic_ablation(m, half(m), t, c, shares=(0, 0.5), draws=1).values,
    "sufficiency": lambda m, t, c: analysis.sufficiency(m, half(m), "L1H1", c, seeds=1).values,
    "attribution": lambda m, t, c: analysis.logit_attribution(m, half(m), "abc", by="head").values,
    "attention": lambda m, t, c: analysis.attention_patterns(m, half(m), "abc").values,
    "max_activating": lambda m, t, c: analysis.max_activating_tokens(m, [(0, 1)], half(m), c, min_count=1).values,
    "passages": lambda m, t, c: analysis.passages(m, half(m), t, c).values,
    "next_tokens": lambda m, t, c: analysis.next_tokens(m, half(m), t, ["ab", "c"]).values,
    "by_token": lambda m, t, c: analysis.faithfulness_by_token(m, half(m), t, c, min_count=1).values,
    "faithfulness_to": lambda m, t, c: analysis.faithfulness_to(half(m), t, c)(m),
    "explain": lambda m, t, c: [path.value for path in bc.explain(m, half(m), "abc").paths],
    "atlas": lambda m, t, c: [one.value for one in bc.atlas(m, half(m), c, tokens=2).explanations],
    "predicted_effects": lambda m, t, c: analysis.predicted_effects(m, half(m), c, tokens=2, neurons=3).values,
    "neuron_map": lambda m, t, c: analysis.neuron_map(m, half(m), c, tokens=4, neurons=4).values,
    "neurons_used": lambda m, t, c: analysis.neurons_used(m, half(m), c, tokens=2).values,
    "unit_effects": lambda m, t, c: analysis.unit_effects(m, half(m), t, c, most=3).values,
    "observable": lambda m, t, c: bc.observable(m, (70, 80)).weights,
    "pulled_back": lambda m, t, c: analysis.pulled_back(m, 70, half(m), c, through=["L0H1", "L1.mlp"]).vector,
    "norm_effect": lambda m, t, c: analysis.norm_effect(m, 70, half(m), c, through="L0H1").values,
    "why_weight": lambda m, t, c: analysis.why_weight(m, 2, half(m), t, c, draws=3).scores.values,
    "head_scores": lambda m, t, c: analysis.head_scores(m, half(m), prompts=2, period=4).values,
    "retrieval_scores": lambda m, t, c: analysis.retrieval_scores(m, half(m), prompts=2, pairs=2).values,
    "feature_tokens": lambda m, t, c: analysis.feature_tokens(m, latents(m)).logits,
    "measure_task": lambda m, t, c: analysis.measure_task(m, rows(m), half(m)).values,
    "TaskTarget": lambda m, t, c: bc.evaluate(
        m, half(m), bc.TaskTarget(rows(m), "kl", model=m), rows(m).tokens, controls=False
    ).to_json(),
    "ability": lambda m, t, c: analysis.ability(m, analysis.repeated_random_tokens(m, prompts=2, period=4)),
}


@pytest.fixture(scope="module")
def usual(model, target, corpus):
    return {name: use(model, target, corpus) for name, use in USES.items()}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    return repr(a) == repr(b)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "training": contextlib.nullcontext,  # see `test_no_result_depends_on_them`
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
}


@contextlib.contextmanager
def states(names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(STATES[name]())
        yield


@pytest.mark.parametrize(
    "names",
    [["training", "no_grad", "float64"], ["inference", "bfloat16"], ["meta", "autocast", "deterministic"]],
    ids=" ".join,
)
def test_no_result_depends_on_them(model, target, corpus, usual, names):
    model.train("training" in names)
    before = [module.training for module in model.modules()], torch.get_default_dtype()
    try:
        with states(names):
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
            for use, of in USES.items():
                assert same(of(model, target, corpus), usual[use]), use
            assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
        assert before == ([module.training for module in model.modules()], torch.get_default_dtype())
        assert model.original_model.training == ("training" in names)
    finally:
        model.eval()


@pytest.mark.parametrize("names", [["inference", "float64"], ["bfloat16", "meta"]], ids=" ".join)
def test_a_model_and_a_target_made_under_them_are_the_same(folder, corpus, usual, names):
    with states(names):
        model = bc.load_model(folder, device="cpu")
        target = bc.count_ngrams(TEXT, d_vocab=D_VOCAB)
    for use in ("evaluate", "find_subnetwork", "logit_lens", "ablate"):
        assert same(USES[use](model, target, corpus), usual[use]), use


def test_each_module_gets_back_its_own_mode(model, target, corpus):
    parts = list(model.blocks[0].modules())
    for part in parts:
        part.training = True
    try:
        with pytest.raises(ValueError, match="at least 1 seed"):
            bc.evaluate(model, half(model), target, corpus.held_out, seeds=0)
        assert all(part.training for part in parts)
        assert not model.training
        assert not model.blocks[1].training
    finally:
        model.eval()


def test_every_public_function_of_a_model_is_here():
    """A function that takes a model runs it in the usual state, or is named here with the reason."""
    import inspect

    elsewhere = {
        "activation_points", "weight_sites", "huggingface_layout",  # they compute nothing with it
        "masked", "gated", "spliced",  # the user's own forward passes
        "export_huggingface", "export_masks", "import_published", "load_published", "pull_subnetwork",
        "import_eap", "export_eap",
        "with_random_blocks",
        "with_shuffled_blocks",
        "analyze", "falsify", "rivals", "stricter_tests", "sparsity_path", "find_path", "find_ladder",
        "soft_hard_gap", "study",  # made of those above
        "Subnetwork", "layer_by_layer", *analysis.TASKS, "earlier_value", "greater_than", "indirect_object",
        "ordered_sequences", "repeated_random_tokens", "subnetworks_over_training", "trajectory", "fit_affine_lens",
        "refine_affine_lens",
        "successor_scores",  # needs a tokenizer of whole words
    }  # fmt: skip
    text = inspect.getsource(inspect.getmodule(test_each_module_gets_back_its_own_mode))
    for of in (bc, analysis):
        for name in of.__all__ if of is analysis else dir(of):
            one = getattr(of, name, None)
            if not callable(one) or name.startswith("_") or name in elsewhere:
                continue
            with contextlib.suppress(ValueError, TypeError):
                if "model" in inspect.signature(one).parameters and not name[0].isupper():
                    assert f"{name}(" in text, name


# --- compatibility mode ---


def test_processed_weights_are_refused_everywhere(folder, target, corpus):
    other = bc.load_model(folder, device="cpu")
    kept = half(other)
    other.enable_compatibility_mode(disable_warnings=True)
    assert bc.activation_points(other)
    uses = USES | {
        "full": lambda m, t, c: bc.Subnetwork.full(m),
        "masked": lambda m, t, c: bc.masked(m, kept).__enter__(),
        "weight_sites": lambda m, t, c: bc.weight_sites(m),
        "export": lambda m, t, c: bc.export_huggingface(m, kept, "never-written"),
        "import": lambda m, t, c: bc.Subnetwork.from_huggingface({}, m),
        "analyze": lambda m, t, c: bc.analyze(m, kept, t, c),
        "falsify": lambda m, t, c: bc.falsify(m, t, c, found=kept),
        "rivals": lambda m, t, c: bc.rivals(m, t, c, first=kept),
        "over_seeds": lambda m, t, c: bc.over_seeds(m, t, c),
    }
    for name, use in uses.items():
        if name == "ngrams":
            continue
        with pytest.raises(ValueError, match="masks apply to raw weights, but this model is in compatibility mode"):
            use(other, target, corpus)


# --- caches ---


def test_a_changed_weight_is_seen_at_once(folder, corpus, target):
    model = bc.load_model(folder, device="cpu")
    own, kept = bc.ModelTarget(model), half(model)
    before = own.log_probs(torch.from_numpy(TEXT[:2])), own.fingerprint
    first = bc.evaluate(model, kept, own, TEXT, controls=False).subnetwork
    site = bc.weight_sites(model)[0]
    for _ in range(2):
        site.original.data.mul_(1.5)
        after = own.log_probs(torch.from_numpy(TEXT[:2]))
        assert not torch.equal(after, before[0])
        assert torch.equal(after, bc.ModelTarget(model).log_probs(torch.from_numpy(TEXT[:2])))
        assert own.fingerprint == bc.ModelTarget(model).fingerprint != before[1]
        before = after, own.fingerprint
    again = bc.evaluate(model, kept, own, TEXT, controls=False).subnetwork
    assert again == bc.evaluate(model, kept, bc.ModelTarget(model), TEXT, controls=False).subnetwork != first


def test_within_one_call_the_full_model_runs_once_for_each_batch(model):
    passes = []
    handle = model.original_model.register_forward_pre_hook(lambda *_: passes.append(1), with_kwargs=False)
    try:
        bc.evaluate(model, half(model), bc.ModelTarget(model), TEXT, controls=False)
    finally:
        handle.remove()
    assert len(passes) == 2  # masked, and full
    assert state.memo() is None


# --- threads ---


def in_threads(count, work):
    results, errors = [[] for _ in range(count)], []

    def run(place):
        try:
            results[place] = work(place)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results, errors


def test_three_threads_get_the_results_of_one(model, target, corpus):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = [half(model).random_like(seed=seed) for seed in range(3)]
    tokens = torch.from_numpy(TEXT[:2])

    def work(place):
        found = []
        for _ in range(10):
            found.append(bc.evaluate(model, kept[place], target, TEXT[:2], controls=False).subnetwork)
            with bc.masked(model, kept[place]), torch.no_grad():
                found.append(model(tokens).sum().item())
        return found

    alone = [work(place) for place in range(3)]
    together, errors = in_threads(3, work)
    assert not errors
    assert together == alone  # 60 results
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())


def test_a_block_held_open_by_another_thread_is_refused_in_one_line(model, target, monkeypatch):
    monkeypatch.setattr(state, "_PATIENCE", 0.05)
    kept = half(model)
    with bc.masked(model, kept):
        _, errors = in_threads(1, lambda _: bc.evaluate(model, kept, target, TEXT, controls=False))
        with pytest.raises(ValueError, match="masked already"):  # the same thread
            bc.evaluate(model, kept, target, TEXT, controls=False)
    (error,) = errors
    assert isinstance(error, RuntimeError)
    assert "in use in another thread ('MainThread'), inside `with masked(...)`" in str(error)
    assert "\n" not in str(error)
    bc.evaluate(model, kept, target, TEXT, controls=False)


def test_a_generator_may_be_closed_by_another_thread(model, target):
    def generate():
        with bc.masked(model, half(model)):
            yield 1

    generator = generate()
    next(generator)
    in_threads(1, lambda _: generator.close())
    _, errors = in_threads(1, lambda _: bc.evaluate(model, half(model), target, TEXT, controls=False))
    assert not errors


def test_two_models_do_not_wait_for_each_other(model, folder, target, monkeypatch):
    monkeypatch.setattr(state, "_PATIENCE", 0.05)
    other = bc.load_model(folder, device="cpu")
    with bc.masked(model, half(model)):
        _, errors = in_threads(1, lambda _: bc.evaluate(other, half(other), target, TEXT, controls=False))
    assert not errors


def test_a_lock_does_not_keep_a_model_alive(folder):
    other = bc.load_model(folder, device="cpu")
    with bc.masked(other, half(other)):
        pass
    wrapped = weakref.ref(other.original_model)
    del other
    import gc

    gc.collect()
    assert wrapped() is None


def test_the_default_precision_survives_threads(model, target):
    with default_dtype(torch.float64):
        in_threads(3, lambda _: bc.evaluate(model, half(model), target, TEXT[:2], controls=False))
        assert torch.get_default_dtype() == torch.float64


# --- length ---


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])  # learned positions, and rotary ones
def test_texts_longer_than_the_context_are_refused_before_anything(tiny_folders, architecture, tmp_path):
    model = bc.load_model(tiny_folders[architecture], device="cpu")
    long = np.random.default_rng(0).integers(1, D_VOCAB, (4, 65))
    corpus, target = bc.Corpus.from_tokens(long, long), bc.NextTokenTarget()
    kept = half(model)
    for use in (
        lambda: bc.find_subnetwork(model, target, corpus, CONFIG, run_dir=tmp_path / "run"),
        lambda: bc.forecast_memory(model, target, corpus, CONFIG),
        lambda: bc.check_inputs(model, target, corpus, CONFIG),
        lambda: bc.sparsity_path(model, target, corpus, CONFIG, [1, 2], run_dir=None),
        lambda: bc.InducedTarget(model, long),
        lambda: bc.ModelTarget(model).log_probs(torch.from_numpy(long)),
        lambda: bc.evaluate(model, kept, target, long),
        lambda: bc.analyze(model, kept, target, corpus),
        lambda: analysis.layer_by_layer(model, kept, target, corpus),
        lambda: analysis.passages(model, kept, target, long),
    ):
        with pytest.raises(ValueError, match="sequences of 65 tokens are longer than this model's context of 64"):
            use()
    assert not (tmp_path / "run").exists()
