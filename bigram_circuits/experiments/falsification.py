"""Attempts to refute a finding: run the recipe where it should fail, and repeat it where it should agree.

A good subnetwork proves little if the same recipe finds one that is as good in an untrained model, or for a meaningless
target: then the computation is in the mask, not in the model. And which weights are kept is only a finding if another
seed keeps them too. (Whether the model needs the weights is a separate question: `evaluate` compares the loss without
them with the loss without random ones.) So the recipe is run again

- on the same model with re-initialised blocks; embeddings, final norm and unembedding stay as trained (compare the
  supermasks that Zhou et al. 2019 and Ramanujan et al. 2020 found in random networks);
- for a nonsense target: the same distribution under a random permutation s of the vocabulary,
  P'(y | x) = P(s(y) | s(x));
- for the same target with other seeds, which change the data order and the random numbers of the masking method.

Each run is scored by the share of the context's information about the next token that it recovers, for its own target:
1 - KL / KL0, where KL0 is the KL of the best constant prediction, the target's mean distribution over the text. (KL0
is the mutual information of context and next token under the target.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.evaluation import Evaluation, evaluate
from bigram_circuits.learning.training import SparsifyConfig, find_subnetwork
from bigram_circuits.measures.quantities import (
    CROSS_ENTROPY,
    FRACTION,
    KL,
    MEAN_SURPRISAL,
    SURPRISAL_CORRELATION,
    TOP1_AGREEMENT,
    Quantity,
)
from bigram_circuits.measures.results import Effects, load_result_and_origin
from bigram_circuits.measures.statistics import holm
from bigram_circuits.models.layouts import huggingface_layout
from bigram_circuits.models.loading import fresh_huggingface, hooked
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.runs import Run, run_id
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import check_no_link
from bigram_circuits.subnetwork import Subnetwork, SubnetworkLike, as_subnetwork
from bigram_circuits.targets.base import Target, as_target
from bigram_circuits.text.corpus import Corpus, in_order

_QUANTITIES = (
    SURPRISAL_CORRELATION, KL, CROSS_ENTROPY, MEAN_SURPRISAL, TOP1_AGREEMENT, FRACTION,
    Quantity("context_told", "share", "1 - KL / KL of the best constant: 1 at the target, 0 if the context is unused."),
)  # fmt: skip
_FOUND, _RANDOM_BLOCKS, _NONSENSE = "found", "re-initialised blocks", "nonsense target"
_FORMER_NAMES = {"blocks initialised anew": _RANDOM_BLOCKS}  # in results and run folders of version 0.1.0
_AS_GOOD = 0.95  # a control that recovers this share of what the subnetwork recovers refutes the finding,
_AS_SMALL = 2.0  # if it keeps at most this many times its weights;
_HALF = 0.5  # one that recovers this share weakens the finding, whatever its size
_SURPRISING = 0.05  # a p-value below this is significant
_LITTLE = 1e-4  # nats: below this, the context counts as uninformative
_AT_ONCE = 1 << 25  # probabilities of a target held at once: 128 MiB


class RenamedTarget(Target):
    """A target under a permutation s of the vocabulary, P'(y | x) = P(s(y) | s(x)): same shape, no meaning."""

    def __init__(self, target: Any, d_vocab: int, seed: int = 0) -> None:
        """Permute a target's vocabulary; `seed` draws the permutation s.

        Raises:
            ValueError: If `target` is not a target, or has another vocabulary.
        """
        self.target = as_target(target, d_vocab)
        self.d_vocab = d_vocab
        self.positions = self.target.positions
        self.name_of = torch.from_numpy(np.random.default_rng(seed).permutation(d_vocab))
        identity = {"kind": self.target.kind, "fingerprint": self.target.fingerprint}
        self.fingerprint = f"renamed {seed} {identity}"

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch n"]:
        """CE from the permuted distribution to softmax(logits)."""
        return self.target.cross_entropy(logits[..., self._token_of(logits.device)], self._renamed(tokens))

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """-log P'(actual next token)."""
        return self.target.surprisal(self._renamed(tokens))

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch n"] | None:
        """Entropy of the target at the renamed tokens."""
        return self.target.entropy(self._renamed(tokens))

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch n"] | None:
        """The most likely tokens of the permuted target."""
        found = self.target.top1(self._renamed(tokens))
        return None if found is None else self._token_of(tokens.device)[found]

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"] | None:
        """Log probabilities of the permuted target."""
        found = self.target.log_probs(self._renamed(tokens))
        return None if found is None else found[..., self.name_of.to(tokens.device)]

    def _renamed(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        return self.name_of.to(tokens.device)[tokens.long()]

    def _token_of(self, device: torch.device) -> Integer[Tensor, " d_vocab"]:
        """The inverse of the renaming."""
        return self.name_of.argsort().to(device)


@uses_model
def with_random_blocks(model: Model, seed: int = 0) -> Model:
    """Copy a model and re-initialise its blocks as Hugging Face does; everything else stays as trained.

    Returns:
        A new hooked model in eval mode, on the device and in the precision of `model`, which is left unchanged.

    Raises:
        OSError: If the model's files no longer exist.
    """
    plain, _ = fresh_huggingface(model)
    trained = dict(plain.state_dict())
    place = next(iter(huggingface_layout(model).places.values())).parameter
    blocks = place[: place.index(next(part for part in place.split(".") if part.isdigit()))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = type(plain)(plain.config).to(plain.dtype)
    kept = {name: value for name, value in trained.items() if not name.startswith(blocks)}
    untrained.load_state_dict(kept, strict=False)
    if hasattr(untrained, "tie_weights"):
        untrained.tie_weights()
    other = hooked(untrained.eval(), like=model)
    other.cfg.model_name = f"{model.cfg.model_name} with {_RANDOM_BLOCKS} (seed {seed})"
    return other.to(model.cfg.device).eval()


@dataclass(frozen=True)
class Falsification:
    """The outcome of the attempts to refute a finding."""

    controls: Effects
    """A row for the subnetwork found and for every attempt: r, KL, cross-entropy, loss, agreement and share kept."""
    seeds: Effects
    """Overlap of each pair of seeds' subnetworks, overall and by component, with the exact null."""
    spread: Effects
    """Every number across seeds, the original included: mean, standard deviation, minimum, maximum."""
    of: Origin | None = None
    """The subnetwork and the text that were tried, and the run if there is one."""

    @property
    def refuted(self) -> tuple[str, ...]:
        """Names of the controls that refute the finding; empty if none does."""
        return tuple(one.control for one in self._judged() if one.finding == "refuted")

    @property
    def says(self) -> tuple[str, ...]:
        """What each control shows, in a sentence or two."""
        return tuple(one.says for one in self._judged())

    @property
    def verdict(self) -> str:
        """Which controls refute the finding and which weaken it, as a sentence."""
        judged = self._judged()
        parts = [
            f"{word} by: {', '.join(names)}."
            for word, finding in (("REFUTED", "refuted"), ("Weakened", "weakened"))
            if (names := [one.control for one in judged if one.finding == finding])
        ]
        return " ".join(parts) or "No control refutes or weakens the finding."

    def _judged(self) -> list[_Judged]:
        return [*_judge_controls(self.controls), _judge_seeds(self.controls, self.seeds)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the results to a folder as JSON files."""
        for name in _PARTS:
            getattr(self, name).save(Path(folder) / f"{name}.json", self.of)

    def __str__(self) -> str:
        return "\n".join([f"{self.controls}", "", *self.says, self.verdict])


@dataclass(frozen=True)
class _Judged:
    control: str
    says: str
    finding: str
    """`refuted`, `weakened` or `stands`."""


_PARTS = ("controls", "seeds", "spread")


def load_falsification(folder: str | os.PathLike[str], run: Run | None = None) -> Falsification | None:
    """Read what `Falsification.save` wrote; None if the folder holds none.

    Args:
        folder: The folder.
        run: The run that it must be of; None: any.

    Raises:
        ValueError: If a file is damaged, a symbolic link, or of another run.
    """
    paths = {name: Path(folder) / f"{name}.json" for name in _PARTS}
    if not all(path.is_file() for path in paths.values()):
        return None
    read = {name: load_result_and_origin(path, follow=False) for name, path in paths.items()}
    if run is not None:
        for name, (_, of) in read.items():
            run.check_origin(paths[name], of, "`find --falsify` writes it again once it is removed")
    effects = {name: part for name, (part, _) in read.items() if isinstance(part, Effects)}
    if len(effects) < len(read):
        raise ValueError(f"{str(folder)!r} holds results of another kind, not those of `falsify`")
    controls = effects["controls"]
    names = tuple(_FORMER_NAMES.get(name, name) for name in controls.names)
    return Falsification(**effects | {"controls": replace(controls, names=names)}, of=read["controls"][1])


@uses_model
def falsify(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    found: SubnetworkLike,
    seeds: int = 3,
    run_dir: str | os.PathLike[str] | None = None,
) -> Falsification:
    """Try to refute a finding: rerun the recipe on re-initialised blocks, for a nonsense target and with other seeds.

    It takes `seeds` + 2 times as long as finding the subnetwork, and memory for a second model.

    Args:
        model: From `load_model`.
        target: The target that the subnetwork was learned for.
        corpus: Masks are learned on its training part and measured on its held-out part.
        config: The recipe that found the subnetwork; `SparsifyConfig()` by default.
        found: The subnetwork to be tested.
        seeds: Number of other seeds; at least 2, to have a spread.
        run_dir: A folder for the runs and the results; runs that are already there are reused.

    Raises:
        ValueError: If `seeds` is below 2, or model, target, subnetwork and corpus do not fit together.
        OSError: If the model's files, which are read again, no longer exist.
    """
    if seeds < 2:
        raise ValueError(f"a spread needs at least 2 other seeds, not {seeds}")
    config = config or SparsifyConfig()
    found = as_subnetwork(found)
    found.check_fits(model)
    target = as_target(target, model.cfg.d_vocab)
    folder = None if run_dir is None else Path(run_dir)
    if folder is not None:
        check_no_link(folder)

    def learn(name: str, of: Any, wanted: Any, recipe: SparsifyConfig) -> tuple[Subnetwork, Evaluation]:
        to = None if folder is None else _run_folder(folder, name)
        if to is not None:
            check_no_link(to)
        subnetwork = find_subnetwork(of, wanted, corpus, recipe, run_dir=to).subnetwork
        return subnetwork, evaluate(of, subnetwork, wanted, corpus.held_out, controls=False)

    measured = {_FOUND: evaluate(model, found, target, corpus.held_out, controls=False)}
    random_blocks = with_random_blocks(model, seed=config.seed)
    measured[_RANDOM_BLOCKS] = learn(_RANDOM_BLOCKS, random_blocks, target, config)[1]
    del random_blocks
    nonsense = RenamedTarget(target, model.cfg.d_vocab, seed=config.seed)
    measured[_NONSENSE] = learn(_NONSENSE, model, nonsense, config)[1]
    again = {_FOUND: found}
    for seed in range(config.seed + 1, config.seed + 1 + seeds):
        name = f"seed {seed}"
        again[name], measured[name] = learn(name, model, target, replace(config, seed=seed))
    constants = dict.fromkeys(measured, kl_of_best_constant(target, corpus.held_out))
    constants[_NONSENSE] = kl_of_best_constant(nonsense, corpus.held_out)
    of = Origin(run_id(folder.parent) if folder else None, found.checksum, corpus.fingerprint, corpus.source)
    result = Falsification(_controls(measured, constants), _overlaps(again), _spread(measured), of)
    if folder is not None:
        result.save(folder)
    return result


def _run_folder(folder: Path, name: str) -> Path:
    """The folder of an attempt's run: under its former name if an earlier version wrote it."""
    former = [folder / old.replace(" ", "-") for old, now in _FORMER_NAMES.items() if now == name]
    return next((path for path in former if path.is_dir()), folder / name.replace(" ", "-"))


def kl_of_best_constant(target: Target, tokens: Integer[np.ndarray, "sequence position"]) -> float:
    """Mean KL (nats) from a target to its own mean distribution over a text; nan if it has no `log_probs` or `entropy`.

    It is the mutual information, under the target, of the context and the next token.
    """
    total, entropies, n = torch.zeros(1, dtype=torch.float64), 0.0, 0
    for batch in in_order(tokens, max(1, _AT_ONCE // (tokens.shape[1] * (target.d_vocab or 1)))):
        log_probs, entropy = target.log_probs(batch), target.entropy(batch)
        if log_probs is None or entropy is None:
            return math.nan
        probs = log_probs.exp().flatten(0, -2)
        total = total + probs.sum(0).double().cpu()
        entropies += float(entropy.double().sum())
        n += len(probs)
    return float(torch.special.entr(total / n).sum()) - entropies / n


def _controls(measured: Mapping[str, Evaluation], constants: Mapping[str, float]) -> Effects:
    """A row for each attempt; `constants` is the KL of the best constant prediction for its target."""
    rows = []
    for name, one in measured.items():
        values = [getattr(one.subnetwork, quantity.name) for quantity in _QUANTITIES[:-1]]
        told = constants[name]
        rows.append([*values, math.nan if told < _LITTLE else 1 - one.subnetwork.kl / told])
    values = np.array(rows, dtype=float).T
    ends = np.full((2, *values.shape), np.nan)
    names = [quantity.name for quantity in _QUANTITIES]
    for at, one in enumerate(measured.values()):
        for name, pair in one.intervals["subnetwork"].items():
            if name in names:
                ends[:, names.index(name), at] = pair
    return Effects("Attempts to refute the finding", _QUANTITIES, "attempt", tuple(measured), values, ends[0], ends[1])


def _spread(measured: Mapping[str, Evaluation]) -> Effects:
    of_seeds = [one.subnetwork for name, one in measured.items() if name not in (_RANDOM_BLOCKS, _NONSENSE)]
    numbers = [quantity.name for quantity in _QUANTITIES[:-1]]
    rows = np.array([[getattr(one, name) for one in of_seeds] for name in numbers], dtype=float)
    values = np.stack([rows.mean(1), rows.std(1, ddof=1), rows.min(1), rows.max(1)])
    none = np.full_like(values, np.nan)
    quantities = tuple(
        Quantity(name, "", meaning)
        for name, meaning in (
            ("mean", "Mean over seeds."),
            ("sd", "Standard deviation over seeds."),
            ("lowest", "Minimum over seeds."),
            ("highest", "Maximum over seeds."),
        )
    )
    notes = {"seeds": len(of_seeds)}
    return Effects("Spread over seeds", quantities, "number", tuple(numbers), values, none, none, notes=notes)


def _overlaps(subnetworks: Mapping[str, Subnetwork]) -> Effects:
    """Overlap of each pair, overall and by component; empty subnetworks are left out and noted."""
    some = {name: one for name, one in subnetworks.items() if one.kept}
    pairs = {f"{a}, {b}": overlap(some[a], some[b], by="component") for a, b in combinations(some, 2)}
    names = tuple(f"{pair}: {name}" for pair, one in pairs.items() for name in one.names)
    quantities = next((one.quantities for one in pairs.values()), ())
    nothing = np.zeros((len(quantities), 0))
    values, low, high = (
        np.concatenate([nothing, *(getattr(one, key) for one in pairs.values())], axis=1)
        for key in ("values", "low", "high")
    )
    notes = {"pairs": list(pairs), "kept_nothing": [name for name, one in subnetworks.items() if not one.kept]}
    return Effects("Overlap between seeds", quantities, "pair", names, values, low, high, notes=notes)


_MEANS = {
    (_RANDOM_BLOCKS, "refuted"): "Untrained blocks can be masked to do as well, "
    "so the mask is no evidence of what the trained blocks have learned.",
    (_RANDOM_BLOCKS, "weakened"): "Untrained blocks can be masked to do much of it; "
    "only the difference is evidence of what the trained blocks have learned.",
    (_RANDOM_BLOCKS, "stands"): "The result depends on trained blocks: untrained ones cannot be masked to match it.",
    (_NONSENSE, "refuted"): "Masks can make this model reproduce a meaningless target as well, "
    "so reproducing the real one is no evidence.",
    (_NONSENSE, "weakened"): "Masks can make this model reproduce much of a meaningless target.",
    (_NONSENSE, "stands"): "Masks cannot make this model reproduce an arbitrary target.",
}


def _judge_controls(controls: Effects) -> list[_Judged]:
    done = {_RANDOM_BLOCKS: "On the model with re-initialised blocks", _NONSENSE: "For a nonsense target"}
    judged = []
    for name, when in done.items():
        finding = _finding(controls, name)
        says = f"{when}, the recipe keeps {_told(controls, name)}; the subnetwork keeps {_told(controls, _FOUND)}."
        judged.append(_Judged(name, f"{says} {_MEANS[name, finding]}", finding))
    return judged


def _told(controls: Effects, name: str) -> str:
    keys = ("fraction", "context_told", "kl", "surprisal_correlation", "cross_entropy")
    kept, told, kl, r, cross_entropy = (controls.get(key)[name] for key in keys)
    how = f"recovers {100 * told:.0f}% of the context's information about the next token (KL {kl:.3f} nats)"
    if math.isnan(told):
        how = f"reaches a cross-entropy of {cross_entropy:.3f} nats"
    says = f"{100 * kept:.2f}% of the weights and {how}"
    return says if math.isnan(r) else f"{says}, r {r:.3f}"


def _finding(controls: Effects, name: str) -> str:
    """What a control does to the finding: `refuted`, `weakened` or `stands`."""
    fraction, told, cross_entropy = (controls.get(key) for key in ("fraction", "context_told", "cross_entropy"))
    own, other = told[_FOUND], told[name]
    if math.isnan(own) or math.isnan(other):  # the target has no entropy, or its context is uninformative
        own, other = 1.0, cross_entropy[_FOUND] / cross_entropy[name]
    if _is_share(_AS_GOOD, other, own) and 0 < fraction[name] <= _AS_SMALL * fraction[_FOUND]:
        return "refuted"
    return "weakened" if _is_share(_HALF, other, own) and fraction[name] > 0 else "stands"


def _is_share(share: float, other: float, own: float) -> bool:
    """Whether `other` is at least this share of `own`, or, where `own` is not positive, at least `own`."""
    return other >= (share * own if own > 0 else own)


def _judge_seeds(controls: Effects, seeds: Effects) -> _Judged:
    names = [name for name in controls.names if name not in (_RANDOM_BLOCKS, _NONSENSE)]
    r, kept = (np.array([controls.get(key)[name] for name in names]) for key in ("surprisal_correlation", "fraction"))
    spread = f"Across {len(names)} seeds, {100 * kept.min():.2f}% to {100 * kept.max():.2f}% of the weights are kept"
    if not np.isnan(r).all():
        spread += f", with r from {np.nanmin(r):.3f} to {np.nanmax(r):.3f}"
    empty = seeds.notes["kept_nothing"]
    if empty:
        return _Judged("other seeds", f"{spread}; seeds that keep nothing: {', '.join(empty)}.", "refuted")
    whole = [f"{pair}: all" for pair in seeds.notes["pairs"]]
    logs = holm([seeds.get("log10_p")[pair] * math.log(10) for pair in whole])
    times = np.array([seeds.get("intersection")[pair] / seeds.get("expected")[pair] for pair in whole])
    jaccard = np.array([seeds.get("jaccard")[pair] for pair in whole])
    refutes = not max(logs) < math.log(_SURPRISING)
    verdict = (
        "not significantly more for every pair: which weights are kept is an accident of the seed."
        if refutes
        else "significant for every pair (p < 0.05, exact null, Holm)."
    )
    return _Judged(
        "other seeds",
        f"{spread}. Overlap of pairs of seeds: Jaccard {100 * jaccard.min():.0f}% to {100 * jaccard.max():.0f}%, "
        f"{times.min():.1f} to {times.max():.1f} times chance, {verdict}",
        "refuted" if refutes else "stands",
    )
