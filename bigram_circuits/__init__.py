"""Find and understand subnetworks of transformer language models.

Load a model and a text, count the n-gram target, find the weights that reproduce it, and check what was found:

    model  = bc.load_model("reference")
    corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
    target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
    found  = bc.find_subnetwork(model, target, corpus)
    print(bc.evaluate(model, found.subnetwork, target, corpus.held_out))

Names are loaded when first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigram_circuits.analysis import (
        ablate,
        affine_lens,
        analyze,
        cosine_to_unembedding,
        covariance_similarity,
        layer_rotations,
        load_result,
        logit_lens,
        overlap,
        sufficiency,
    )
    from bigram_circuits.corpus import Corpus, load_corpus
    from bigram_circuits.evaluation import Evaluation, SoftHardGap, evaluate, soft_hard_gap
    from bigram_circuits.falsification import (
        Falsification,
        RenamedTarget,
        falsify,
        load_falsification,
        with_random_blocks,
    )
    from bigram_circuits.layouts import Layout, huggingface_layout
    from bigram_circuits.masking import gated, masked
    from bigram_circuits.memory import MemoryForecast
    from bigram_circuits.metrics import Faithfulness
    from bigram_circuits.models import ActivationPoint, activation_points, checkpoints, load_model
    from bigram_circuits.ngrams import NGramCounter, NGramTable, count_ngrams
    from bigram_circuits.paths import SubnetworkPath, find_path
    from bigram_circuits.planted import Planted, plant_bigram
    from bigram_circuits.published import import_published, load_published
    from bigram_circuits.report.comparison import write_comparison
    from bigram_circuits.report.page import write_report
    from bigram_circuits.runs import Run, load_run
    from bigram_circuits.sharing import export_huggingface, export_masks, pull_subnetwork, push_subnetwork
    from bigram_circuits.sites import WeightSite, weight_hash, weight_sites
    from bigram_circuits.subnetwork import Count, Subnetwork
    from bigram_circuits.targets import InducedTarget, ModelTarget, NextTokenTarget, Target
    from bigram_circuits.training import FoundSubnetwork, SparsifyConfig, find_subnetwork, forecast_memory

__version__ = "0.1.0"

_HOMES = {
    "analysis": (
        "ablate",
        "affine_lens",
        "analyze",
        "cosine_to_unembedding",
        "covariance_similarity",
        "layer_rotations",
        "load_result",
        "logit_lens",
        "overlap",
        "sufficiency",
    ),
    "corpus": ("Corpus", "load_corpus"),
    "evaluation": ("Evaluation", "SoftHardGap", "evaluate", "soft_hard_gap"),
    "falsification": ("Falsification", "RenamedTarget", "falsify", "load_falsification", "with_random_blocks"),
    "layouts": ("Layout", "huggingface_layout"),
    "masking": ("gated", "masked"),
    "memory": ("MemoryForecast",),
    "metrics": ("Faithfulness",),
    "models": ("ActivationPoint", "activation_points", "checkpoints", "load_model"),
    "ngrams": ("NGramCounter", "NGramTable", "count_ngrams"),
    "paths": ("SubnetworkPath", "find_path"),
    "planted": ("Planted", "plant_bigram"),
    "published": ("import_published", "load_published"),
    "report.comparison": ("write_comparison",),
    "report.page": ("write_report",),
    "runs": ("Run", "load_run"),
    "sharing": ("export_huggingface", "export_masks", "pull_subnetwork", "push_subnetwork"),
    "sites": ("WeightSite", "weight_hash", "weight_sites"),
    "subnetwork": ("Count", "Subnetwork"),
    "targets": ("InducedTarget", "ModelTarget", "NextTokenTarget", "Target"),
    "training": ("FoundSubnetwork", "SparsifyConfig", "find_subnetwork", "forecast_memory"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return import_module(f"{__name__}.analysis")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
