"""The numbers of papers that `reproduce` measures again: theirs, by model and quantity.

Those of T. A. Chang and B. K. Bergen, "Bigram Subnetworks: Mapping to Next Tokens in Transformer Language Models"
(NeurIPS 2025, arXiv 2504.15471) are from its Figure 1, its Tables 1 to 3 (lambda 0: Table 2) and its text. What it only
draws has no number here. The lambdas of optimal pruning are those of the code that its authors released.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bigram_circuits.measures.quantities import Quantity

LAMBDA, WEIGHTS, SHARE, TIMES, DEGREES = "lambda", "weights", "share", "times", "degrees"
"""The units that have their own format in the table; an empty unit is a correlation or a cosine."""

_SPARSE = (
    Quantity("sparse_lambda", LAMBDA, "sparse subnetwork: lambda"),
    Quantity("sparse_kept", WEIGHTS, "sparse subnetwork: weights kept"),
    Quantity("maskable", WEIGHTS, "maskable weights"),
    Quantity("sparse_share", SHARE, "sparse subnetwork: share kept"),
    Quantity("sparse_r", "", "sparse subnetwork: r"),
)


def _rotation(of: str) -> tuple[Quantity, ...]:
    return tuple(
        Quantity(f"{of}_{to}_{when}", DEGREES, f"{of.replace('_', ' ')}: map to the {to}, {when} the first block")
        for to in ("input", "output")
        for when in ("before", "after")
    )


ROWS: Mapping[str, tuple[Quantity, ...]] = {
    "sweep": (
        Quantity("best_r", "", "best r of a subnetwork"),
        Quantity("full_r", "", "r of the full model"),
        *_SPARSE,
    ),
    "baselines": (
        Quantity("trained_r", "", "lambda 0: trained model"),
        Quantity("random_model_r", "", "lambda 0: everything re-initialised"),
        Quantity("random_blocks_r", "", "lambda 0: re-initialised blocks, trained embeddings"),
        Quantity("embeddings_r", "", "embeddings alone, no mask"),
        Quantity("linear_map_r", "", "embeddings and one linear map, no mask"),
    ),
    "overlap": (
        Quantity("overlap_times", TIMES, "overlap with optimal pruning, times chance"),
        Quantity("overlap_share", SHARE, "share of the bigram weights inside optimal pruning"),
    ),
    "components": (
        Quantity("mlp_share", SHARE, "kept weights: in MLPs"),
        Quantity("attention_share", SHARE, "kept weights: in attention"),
        Quantity("value_output_share", SHARE, "kept weights: in W_V and W_O"),
        Quantity("query_key_share", SHARE, "kept weights: in W_Q and W_K"),
    ),
    "rotations": (*_rotation("full_model"), *_rotation("subnetwork")),
    "covariance": tuple(
        Quantity(f"{of}_{place}", "", f"{of.replace('_', ' ')}: cosine of covariances {words}")
        for of in ("full_model", "subnetwork")
        for place, words in (("first_block", "across the first block"), ("later_blocks", "across a later block, mean"))
    ),
    "released": _SPARSE,
}
"""The quantities of each row. `reproduce` measures `released` only if it is asked to."""


@dataclass(frozen=True)
class PaperModel:
    """A model of a paper, with the numbers reported of it."""

    name: str
    """Its name in the paper."""
    hub: tuple[str, ...]
    """Its names on the hub, the first one to load it by; empty if it has none that we know."""
    numbers: Mapping[str, float | int]
    """What the paper reports, by the name of the quantity. Shares are from 0 to 1, rotations in degrees."""
    pruning_lambda: float | int | None = None
    """The lambda of optimal pruning; None: that of the sparse bigram subnetwork."""


@dataclass(frozen=True)
class Paper:
    """A paper whose numbers can be measured again."""

    name: str
    """Its name on the command line."""
    title: str
    """Authors and year."""
    models: tuple[PaperModel, ...]
    """Its models."""
    sparsity_weights: tuple[float | int, ...]
    """The sweep of lambda."""
    margin: float
    """The sparse subnetwork is the smallest whose r is at most this much below that of lambda 0."""

    def model_named(self, name: str) -> PaperModel | None:
        """The model of this name in the paper (upper case, spaces and dashes do not matter) or on the hub, or None."""
        return next((one for one in self.models if _key(name) == _key(one.name) or name in one.hub), None)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.casefold())


def _sparse(weight: int, kept: int, total: int, share: float, r: float) -> dict[str, float | int]:
    return dict(zip((one.name for one in _SPARSE), (weight, kept, total, share, r), strict=True))


_CHANG_BERGEN = Paper(
    name="chang-bergen-2025",
    title="Chang and Bergen 2025",
    models=(
        PaperModel("Pythia-70M", ("EleutherAI/pythia-70m",), {"best_r": 0.961, "full_r": 0.737}),
        PaperModel(
            "Pythia-160M",
            ("EleutherAI/pythia-160m",),
            {"best_r": 0.964, "full_r": 0.690}
            | _sparse(10, 7_238_986, 84_934_656, 0.0852, 0.953)
            | {"trained_r": 0.964, "random_model_r": 0.787, "random_blocks_r": 0.965}
            | {"embeddings_r": 0.305, "linear_map_r": 0.615}
            | {"overlap_times": 3.81, "overlap_share": 0.614}
            | {"subnetwork_input_before": 0.0, "subnetwork_input_after": 47.0}
            | {"subnetwork_output_before": 68.5, "subnetwork_output_after": 34.5},
            pruning_lambda=10,
        ),
        PaperModel("Pythia-410M", ("EleutherAI/pythia-410m",), {"best_r": 0.983, "full_r": 0.650}),
        PaperModel(
            "Pythia-1B",
            ("EleutherAI/pythia-1b",),
            {"best_r": 0.987, "full_r": 0.632}
            | _sparse(100, 1_378_087, 805_306_368, 0.00171, 0.959)
            | {"trained_r": 0.987, "random_model_r": 0.896, "random_blocks_r": 0.986}
            | {"embeddings_r": 0.628, "linear_map_r": 0.936}
            | {"overlap_times": 15.27, "overlap_share": 0.380}
            | {"mlp_share": 0.821, "attention_share": 0.179, "value_output_share": 0.116, "query_key_share": 0.063},
            pruning_lambda=100,
        ),
        PaperModel(
            "GPT-2 small, replication",
            (),
            {"best_r": 0.987, "full_r": 0.680}
            | _sparse(10, 924_639, 84_934_656, 0.0109, 0.962)
            | {"trained_r": 0.987, "random_model_r": 0.759, "random_blocks_r": 0.974}
            | {"embeddings_r": 0.680, "linear_map_r": 0.921}
            | {"overlap_times": 7.03, "overlap_share": 0.221},
            pruning_lambda=50,
        ),
        PaperModel(
            "GPT-2 small",
            ("openai-community/gpt2", "gpt2"),
            {"best_r": 0.979, "full_r": 0.624}
            | _sparse(10, 904_866, 84_934_656, 0.0107, 0.952)
            | {"overlap_times": 7.27, "overlap_share": 0.143},
            pruning_lambda=50,
        ),
        PaperModel(
            "GPT-2 medium",
            ("openai-community/gpt2-medium", "gpt2-medium"),
            {"best_r": 0.985, "full_r": 0.582},
        ),
        PaperModel(
            "GPT-2 large",
            ("openai-community/gpt2-large", "gpt2-large"),
            {"best_r": 0.986, "full_r": 0.583}
            | _sparse(100, 727_556, 707_788_800, 0.00103, 0.946)
            | {"overlap_times": 12.70, "overlap_share": 0.325}
            | {"full_model_input_before": 0.0, "full_model_input_after": 56.2}
            | {"full_model_output_before": 70.5, "full_model_output_after": 46.3},
            pruning_lambda=100,
        ),
    ),
    sparsity_weights=(0, 1, 5, 10, 50, 100, 500, 1000),
    margin=0.04,
)

PAPERS: Mapping[str, Paper] = {_CHANG_BERGEN.name: _CHANG_BERGEN}
"""The papers by name."""
