"""Runs made up for pages: every result there is, with markup in all names, and what a page's HTML holds."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import torch

from bigram_circuits.evaluation import Evaluation
from bigram_circuits.experiments.rivals import Rivals
from bigram_circuits.experiments.same_function import ELSEWHERE, HELD_OUT, SameFunction
from bigram_circuits.experiments.stricter import FOLDER, StricterTests
from bigram_circuits.experiments.worst_case import QUANTITIES, SHUFFLED, SIGNS, WORST
from bigram_circuits.explanations.explanation import UnitTokens
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Effects, Maps, Scatter
from bigram_circuits.recipe import Inputs, SparsifyConfig
from bigram_circuits.report.document import _circuitsvis
from bigram_circuits.runs import (
    CorpusIdentity,
    ModelIdentity,
    Outcome,
    RunFolder,
    RunSettings,
    StepRecord,
    TargetIdentity,
    load_run,
)
from bigram_circuits.subnetwork import Subnetwork
from tests.explanations.examples import atlas as some_atlas

HOSTILE = "</script><script>alert('\"x\"')</script><img src=x onerror=alert(1)>"
CONDITIONS = ("full", "subnetwork", "complement", "random")
RNG = np.random.default_rng(0)


def quantities(*names):
    return tuple(Quantity(name, "", f"what {name} is") for name in names)


def curves(*names, points=("embed", "0", "1"), axis="layer", conditions=CONDITIONS, **notes):
    values = RNG.random((len(names), len(conditions), len(points)))
    return Curves(
        f"Of {names[0]}", quantities(*names), axis, points, conditions, values, values - 0.1, values + 0.1, notes=notes
    )


def maps(*names, rows=("0", "1"), columns=("0", "1"), axes=("layer", "head"), conditions=CONDITIONS, text=None):
    values = RNG.random((len(names), len(conditions), len(rows), len(columns)))
    words = None if text is None else tuple(tuple(tuple(text for _ in columns) for _ in rows) for _ in conditions)
    return Maps(f"Of {names[0]}", quantities(*names), axes[0], rows, axes[1], columns, conditions, values, words)


def effects(*names, things=("head 0.0", "head 0.1"), **notes):
    values = RNG.random((len(names), len(things)))
    return Effects(
        f"Of {names[0]}", quantities(*names), "thing", things, values, values - 0.1, values + 0.1, notes=notes
    )


def results():
    """One of everything that `analyze` gives, and one that the report knows nothing of."""
    cosines = ("current_embedding", "target_unembedding")
    losses = {"loss_of_base": 11.5, "loss_of_full": 0.25, "loss_of_guessing": 6.75}
    mapped = maps("flow", rows=("L0N1", "L0N2"), columns=("a", HOSTILE), axes=("neuron", "token"))
    serves = {"drives": [[HOSTILE, 1.0]], "promotes": [["a", 2.0]], "suppresses": []}
    passage = {"columns": ("0: a", f"1: {HOSTILE}"), "axes": ("layer", "position")}
    return {
        "logit_lens": curves("surprisal_correlation", "kl"),
        "affine_lens": curves("surprisal_correlation", "recall_at_1"),
        "cosine": curves(*cosines, *(f"{name}_baseline" for name in cosines)),
        "rotations": curves("output_angle"),
        "covariance": maps(
            "cka", axes=("layer", "layer"), conditions=("full", "subnetwork", "full (rows) and subnetwork")
        ),
        "prompt_lens": maps("probability", **passage, text=f"{HOSTILE}\nb"),
        "prompt_cosine": maps("current_embedding", **passage),
        "passages": maps(
            "surprisal",
            rows=("0", "1"),
            columns=("0", "1", "2"),
            axes=("passage", "position"),
            conditions=(*CONDITIONS, "target"),
            text=f"{HOSTILE}\nexpected {HOSTILE} 40%\nb 5%",
        ),
        "faithful_tokens": maps(
            "kl",
            "count",
            rows=("best", "worst"),
            columns=("1", "2"),
            axes=("tokens", "rank"),
            conditions=(*CONDITIONS, "target"),
            text=f"{HOSTILE}\nnext {HOSTILE} 30%",
        ),
        "attention": maps(
            "attention",
            rows=("0: a", f"1: {HOSTILE}", "2: b"),
            columns=("0: a", f"1: {HOSTILE}", "2: b"),
            axes=("from", "to"),
            conditions=("full L0H0", "subnetwork L0H0", "full L1H2", "subnetwork L1H2"),
        ),
        "attribution": maps("contribution", axes=("component", "token"), columns=(HOSTILE,)),
        "by_layer": maps("density", "share_of_kept", columns=("attn", "mlp"), conditions=("subnetwork",)),
        "by_head": maps("density", "share_of_kept", conditions=("subnetwork", "random")),
        "concentration": curves(
            "share_of_kept", points=(0.0, 0.1, 1.0), axis="share_of_neurons", conditions=("subnetwork", "random")
        ),
        "whole_neurons": effects("density", things=("L0N1", "L0N2")),
        "max_activating_tokens": maps("mean_activation", rows=("L0N1", "L0N2"), axes=("neuron", "rank"), text=HOSTILE),
        "ablation_components": effects("rise_in_loss", "rise_in_loss_in_subnetwork", things=("attn 0", "mlp 0")),
        "ablation_heads": effects("rise_in_loss", "excess", things=tuple(f"head 0.{n}" for n in range(30))),
        "stochastic_ablation": curves(
            "surprisal_correlation", points=(0, 0.5, 1), axis="share_removed", conditions=("subnetwork", "random")
        ),
        "overlap_magnitude": effects("intersection", "kept_a", "share_of_a_in_b", "expected", things=("all", "x")),
        "task": effects("loss", "accuracy", things=CONDITIONS, rows=12, loss_of_guessing=1.5),
        "induction": effects("fall_in_loss", **losses),
        "induction_pairs": effects("fall_in_loss", things=("head 0.0 + head 0.1",), **losses),
        "neuron_map": replace(mapped, notes={"share_shown": 0.5}),
        "unit_effects": effects("rise", "lost", things=("L0N1", "L0H0"), kept_units=9, units={"L0N1": serves}),
        "predicted_effects": predicted(0.93),
        "of_tomorrow": effects("surprise", things=(HOSTILE,)),
    }


def predicted(r):
    """What explanations say that neurons add, against what their removal does."""
    fit = {"r": r, "slope": 1.0, "r_interval": [0.1, 0.9], "slope_interval": [0.9, 1.1]}
    notes = {"direct": fit, "flow": fit, "pairs": 10, "tokens": 2}
    return Scatter(
        "Predicted", quantities("direct", "flow", "measured"), "neuron", ("a", "b"), *np.ones((3, 3, 2)),
        against="measured", notes=notes,
    )  # fmt: skip


def worst_case(shares=(0.9, 0.8, 0.75), budgets=(0, 4, 20), forced=False):
    """Curves in which these shares of the context are told; the baselines lose nothing."""
    values = np.full((len(QUANTITIES), 3, len(budgets)), 0.5)
    values[0], values[0, 0] = shares[0], shares
    notes = {"cross_entropy": {"full": 1.0, "empty": 3.0, "mask": 1.5}, "replace": "zero", "forced": forced}
    of = (QUANTITIES, "steps", budgets, (WORST, SIGNS, SHUFFLED), values, values - 0.01, values + 0.01)
    return Curves("Worst-case ablation", *of, notes=notes)


def some_rivals(mask, recovered=(1.0, 0.98, 0.5)):
    """A mask, and two others that recover these shares."""
    masks = (mask, *(mask.random_like(seed=seed) for seed in range(len(recovered) - 1)))
    weight = f"weight {HOSTILE}"
    keys = (
        "recovered", "jaccard", "times_chance", "log10_p", "most_jaccard", "surprisal_correlation", "kl",
        "cross_entropy", "context_told",
    )  # fmt: skip
    names = ("first", *(f"{weight}: rival {at}" for at in range(1, len(masks))))
    measured = effects(*keys, things=names, noun=mask.noun, masks=[one.checksum for one in masks])
    values = np.array(measured.values)
    values[0], values[1], values[4] = recovered, [1.0, 0.125, 0.25][: len(masks)], 0.3
    values[4, 0] = 1.0
    measured = replace(measured, values=values, low=values - 0.01, high=values + 0.01)
    conditions = (*(f"{weight}: {name}" for name in ("core alone", "without the core", "without all of them")), "full")
    keys = ("kept", "share_of_first", "recovered", "surprisal_correlation", "kl")
    return Rivals(masks, measured, effects(*keys, things=conditions))


def compared(mask, other, agreement=0.95):
    """Two masks of which each tells this share of what the other takes from the context."""
    keys = ("agreement", "agreement_back", "kl", "kl_back", "top1_agreement")
    behaviour = effects(*keys, things=(HELD_OUT, ELSEWHERE), units="weights", masks=[mask.checksum, other.checksum])
    behaviour = replace(behaviour, values=np.full_like(behaviour.values, agreement))
    splices = effects("kept_in_a", "without_in_a", "kept_in_b", "without_in_b", things=("L0.attn", HOSTILE))
    shared = effects("intersection", "expected", "jaccard", things=("all", HOSTILE))
    shared = replace(shared, values=np.full_like(shared.values, 0.5))
    return SameFunction(shared, behaviour, splices, curves("cka", "cosine", conditions=("both",)))


def stricter(mask):
    """One of each of the stricter tests."""
    found = some_rivals(mask)
    same = {"<b>seed-1": compared(mask, found.masks[1]), "rival-1": compared(mask, found.masks[2], 0.5)}
    return StricterTests(worst_case(), found, same)


def save_stricter(folder, tests):
    """Write stricter tests to a run's folder; returns the run."""
    run = load_run(folder)
    of = RunFolder(folder).origin(run.settings.corpus)
    same = {name: replace(one, of=of) for name, one in tests.same.items()}
    replace(tests, rivals=tests.rivals and replace(tests.rivals, of=of), same=same).save(folder / FOLDER, of)
    return run


def hostile_atlas():
    """An atlas in whose tokens and titles there is markup."""
    made = some_atlas((" of", HOSTILE), neurons=(9, 6, 4, 3), listed=12, most_edges=20, n_paths=4)
    units = {label: UnitTokens(((HOSTILE, 1.0),), ((HOSTILE, 1.0),)) for label in made.units}
    return replace(made, title=f"Of {HOSTILE}", units=units, notes={HOSTILE: HOSTILE})


def numbers(r):
    measured = ("surprisal_correlation", "cross_entropy", "kl", "mean_surprisal", "top1_agreement")
    return {name: r + place / 7 for place, name in enumerate(measured)} | {"kept": 2, "total": 14, "fraction": 1 / 7}


def measured():
    groups = {
        name: {
            "mean": numbers(0.125),
            "std": numbers(0.01),
            "seeds": [{"seed": seed, **numbers(0.11 + seed / 100)} for seed in range(2)],
        }
        for name in ("random", "full_minus_random")
    }
    return {
        "subnetwork": numbers(0.9123),
        **{name: numbers(0.3 + place / 10) for place, name in enumerate(("full", "empty", "complement", "magnitude"))},
        **groups,
        "zero_rule": {"positions": 100, "used": 90, "share": 0.9, "rule": "only where it is above 0"},
        "intervals": {"subnetwork": {"surprisal_correlation": [0.9012, 0.9234]}},
        "advantage": {"full": [0.5, 0.6], "random 0": [0.7, None]},
        "mask_capacity": {"mask_bits": 430_000.0, "table_bits": 271_611.5, "kl": 0.9123},
        "verdict": f"Verdict: it is fine {HOSTILE}.",
    }


def make_run(
    folder,
    *,
    metrics=None,
    found=None,
    name="model/x",
    rebuild=True,
    recipe=None,
    within=None,
    subnetwork=None,
    steps=(),
    target="ngram",
    stopped="decided",
    atlas=None,
):
    settings = RunSettings(
        ModelIdentity(name, weight_hash="ab12"),
        CorpusIdentity("some texts", fingerprint="cd34"),
        TargetIdentity({"ngram": "NGramTable", "model": "ModelTarget"}[target]),
        recipe or SparsifyConfig(),
        within,
    )
    inputs = Inputs(model=name, corpus="some texts", context_length=64, target=target)
    run = RunFolder.open(folder, settings, rebuild=inputs if rebuild else None)
    first = StepRecord(attempt=0, step=0, cross_entropy=5.5, fraction=0.5, undecided=1.0)
    run.begin_progress(steps or [first, replace(first, step=1, cross_entropy=4.25, fraction=0.125)])
    masks = {
        "blocks.0.attn.W_Q": torch.arange(8).view(2, 2, 2) < 1,
        "blocks.0.mlp.W_in": torch.arange(6).view(2, 3) < 1,
    }
    subnetwork = subnetwork or Subnetwork(masks, model_name=name, lineage=f"found {HOSTILE}")
    run.finish(subnetwork, Outcome(stopped, seconds=12.0))
    if metrics:
        own = {"kept": subnetwork.kept, "total": subnetwork.total, "fraction": subnetwork.fraction}
        metrics = metrics | {"subnetwork": metrics["subnetwork"] | own}
        run.write_evaluation(Evaluation.from_json(metrics), settings.corpus)
    for key, result in (found or {}).items():
        save_result(folder, key, result)
    if atlas is not None:
        save_result(folder, "atlas", atlas)
    return load_run(folder)


def save_result(folder, name, result):
    """Write a result as one of a run's analyses; returns its file."""
    run, path = load_run(folder), folder / "analysis" / f"{name}.json"
    result.save(path, RunFolder(folder).origin(run.settings.corpus))
    return path


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.values, self._within = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._within = tag
        if tag == "data":
            self.values.append(float(dict(attrs)["value"]))

    def handle_data(self, data):
        if self._within not in ("script", "style"):
            self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def without_libraries(text):
    from plotly.offline import get_plotlyjs

    for library in (get_plotlyjs(), _circuitsvis()):
        assert text.count(library) <= 1
        text = text.replace(library, "")
    return text
