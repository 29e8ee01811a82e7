"""Finish a mask: drop and re-admit single weights as long as the measured loss says that it pays.

Gates that are learned by gradient descent end in a mask that is nearly, but not exactly, where the loss wants it: some
gates were left open by noise, others closed before their weight could be of use. `polish` goes on from there with hard
masks. A quadratic model of the loss proposes moves; each is made only if the loss measured with it is lower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from bigram_circuits.masking.apply import switched
from bigram_circuits.models.activations import batch_size_for, check_tokens, lean_forward
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.progress import progress
from bigram_circuits.runs import PolishRecord
from bigram_circuits.subnetwork import Subnetwork, SubnetworkLike, as_subnetwork
from bigram_circuits.targets.base import Target, logits_at, target_of
from bigram_circuits.text.corpus import Corpus, batch_of

_PARTS = 16  # parts of the text, whose gradients give the curvature
_TRIED = 16  # weights of each kind whose loss is measured one by one
_PATIENCE = 40  # proposals refused in a row after which the others are not looked at
_PROPOSED = 1 << 14  # most weights proposed at once
_HOLDS = 0.5  # share of what was expected of a move that it must bring

Places = Int[Tensor, " place"]


@dataclass(frozen=True)
class Polished:
    """The result of `polish`.

    Example:
        >>> polished = bc.polish(model, found, target, corpus, passes=1, most=10, sequences=4)
        >>> print(polished.dropped.kept, polished.readmitted.kept, polished.before - polished.after)
    """

    subnetwork: Subnetwork
    """What is kept now."""
    dropped: Subnetwork
    """The weights that were kept before and are not any more."""
    readmitted: Subnetwork
    """The weights that were not kept before and are now."""
    before: float
    """Cross-entropy of the subnetwork given, on the text that was used, nats per position."""
    after: float
    """Cross-entropy of the subnetwork returned, on the same text."""
    passes: int
    """Number of passes over the weights; if there were fewer than allowed, the last one changed nothing."""
    measured: int
    """Number of masks whose loss was measured."""

    @property
    def record(self) -> PolishRecord:
        """What a run's folder keeps of it."""
        return PolishRecord(
            self.dropped.kept, self.readmitted.kept, self.before, self.after, self.passes, self.measured
        )


@uses_model
def polish(
    model: Model,
    subnetwork: SubnetworkLike,
    target: Any,
    corpus: Corpus,
    *,
    sparsity_weight: float | int = 10.0,
    same_size: bool = False,
    within: SubnetworkLike | None = None,
    passes: int = 5,
    most: int = 2000,
    sequences: int = 64,
    seed: int = 0,
) -> Polished:
    """Drop and re-admit single weights of a subnetwork as long as that lowers the objective on a fixed text.

    The objective is that of learning, with a hard mask: cross-entropy + `sparsity_weight` * kept / total. So a weight
    has the price `sparsity_weight` / total nats: it is dropped if the loss rises by less, and re-admitted if the loss
    falls by more. With `same_size` the objective is the cross-entropy alone, among masks of as many weights.

    Each pass proposes weights by a quadratic model of the loss in the gates, all at once: the gradient (weight x
    gradient) and half the diagonal of the Fisher information, estimated from labels that the masked model draws itself
    (LeCun, Denker, Solla 1990; Theis et al. 2018, arXiv 1801.05787). Weights to re-admit are then measured one by one,
    the most promising first. Weights to drop are measured in groups: a group that does not bring half of what was
    predicted is halved. The result depends on nothing but the arguments.

    Args:
        model: From `load_model`. Left bit-identical.
        subnetwork: What to start from.
        target: An `NGramTable`, or any object with `cross_entropy` and `surprisal`.
        corpus: The loss is measured on its training part; use the held-out part to judge the result.
        sparsity_weight: The penalty of the recipe, in nats per unit of the share kept.
        same_size: Keep exactly as many weights as `subnetwork` does.
        within: Re-admit no weight outside this subnetwork.
        passes: Most passes over the weights.
        most: About how many masks to measure at most; the time taken is proportional to it.
        sequences: Number of training sequences on which the loss is measured.
        seed: Seed of the choice of these sequences, and of the labels drawn.

    Raises:
        ValueError: If an argument is out of range, target and model do not fit together, or the loss is not finite.

    Example:
        >>> polished = bc.polish(model, found, target, corpus, passes=1, most=10, sequences=4)
        >>> print(polished.subnetwork)
    """
    kept, among = as_subnetwork(subnetwork), None if within is None else as_subnetwork(within)
    _check(sparsity_weight, passes=passes, most=most, sequences=sequences)
    target = target_of(target, model)
    for one in filter(None, (kept, among)):
        one.check_fits(model)
    if len(corpus.train) == 0:
        raise ValueError("the training part of the corpus is empty")
    check_tokens(model, corpus.train)
    tokens = batch_of(corpus.train, min(sequences, len(corpus.train)), step=0, seed=seed)
    names, price = set(kept), sparsity_weight / kept.total
    return polish_on(model, kept, target, tokens, names, price, same_size, among, passes, most, seed, lambda: None)


def _check(sparsity_weight: float | int, **counts: int) -> None:
    if not 0 <= sparsity_weight < math.inf:
        raise ValueError(f"sparsity_weight must be a number of at least 0, not {sparsity_weight!r}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def polish_on(
    model: Model, kept: Subnetwork, target: Target, tokens: Integer[Tensor, "sequence pos"], names: Collection[str],
    price: float, same_size: bool, within: Subnetwork | None, passes: int, most: int, seed: int,
    before_each: Callable[[], None],
) -> Polished:  # fmt: skip
    """Polish the named weight matrices on a text, at a price per weight in nats; see `polish`.

    `before_each` is called before every measurement.
    """
    with progress(total=most, desc="polishing", unit="mask") as bar:

        def measuring() -> None:
            before_each()
            bar.update()

        search = _Search(model, kept, target, tokens, names, within, most, seed, measuring)
        with switched(model, search.switches | search.fixed), lean_forward(model):
            before = search.loss = search.measure()
            descend = search.descend_at_size if same_size else search.descend
            made = descend(price, passes)
    now = search.subnetwork(kept)
    return Polished(now, kept - now, now - kept, before, search.loss, made, search.measured)


class _Search:
    """A mask that is being changed: its loss, what a quadratic model predicts of every weight, and the moves."""

    def __init__(
        self, model: Model, kept: Subnetwork, target: Target, tokens: Integer[Tensor, "sequence pos"],
        names: Collection[str], within: Subnetwork | None, most: int, seed: int, before_each: Callable[[], None],
    ) -> None:  # fmt: skip
        self.model, self.target, self.most, self.before_each = model, target, most, before_each
        self.sites = [site for site in weight_sites(model) if site.name in names]
        device = self.sites[0].original.device
        self.tokens = tokens.to(device)

        def flat(masks: Subnetwork) -> Bool[Tensor, " weight"]:
            return torch.cat([site.to_stored(masks[site.name]).flatten() for site in self.sites]).to(device)

        self.open: Float[Tensor, " weight"] = flat(kept).float()
        """1 where a weight is kept, else 0; the switches of the weight matrices are views of it."""
        self.possible = torch.cat([(site.original != 0).flatten() for site in self.sites])
        """The weights that may be kept: those of `within`, except zeros, and those kept at the start."""
        if within is not None:
            self.possible &= flat(within)
        self.possible |= self.open > 0
        parts = self.open.split([site.size for site in self.sites])
        self.switches = {
            site.name: part.view(site.original.shape).detach().requires_grad_()
            for site, part in zip(self.sites, parts, strict=True)
        }
        self.fixed = {
            site.name: site.to_stored(kept[site.name]).to(device, torch.float32)
            for site in weight_sites(model)
            if site.name not in names
        }
        """The masks of the other weight matrices, which stay as they are."""
        self.loss, self.measured, self.moves = math.nan, 0, 0
        self.labels = torch.Generator().manual_seed(seed)

    @property
    def spent(self) -> bool:
        """Whether as many masks were measured as allowed."""
        return self.measured >= self.most

    def measure(self) -> float:
        """The mask's mean cross-entropy on the text, in nats per position."""
        self.before_each()
        self.measured += 1
        total, positions = 0.0, 0
        with torch.no_grad():
            for part in self.tokens.split(batch_size_for(self.model, self.tokens.shape[1])):
                found = self.target.cross_entropy(self.model(part), part).double()
                total, positions = total + found.sum().item(), positions + found.numel()
        if not math.isfinite(total):
            raise ValueError("the cross-entropy of the masked model is not finite (NaN or infinity in its logits)")
        return total / positions

    def predict(self) -> tuple[Float[Tensor, " weight"], Float[Tensor, " weight"]]:
        """The predicted rise in loss if a weight is dropped, and if it is re-admitted.

        With g the gradient of the loss in a gate and F the diagonal of the Fisher information, the loss changes by
        -g + F/2 as the gate goes from 1 to 0, and by g + F/2 as it goes from 0 to 1.
        """
        switches = list(self.switches.values())
        gradient, squares, positions = torch.zeros_like(self.open), torch.zeros_like(self.open), 0
        for part in self.tokens.split(-(-len(self.tokens) // _PARTS)):
            logits = self.model(part)
            loss = self.target.cross_entropy(logits, part)
            surprisal = self._of_own_labels(logits_at(self.target, logits, part).float().log_softmax(-1))
            own = torch.autograd.grad(surprisal, switches, retain_graph=True)
            gradient += _joined(torch.autograd.grad(loss.sum(), switches))
            squares += _joined(own).square()
            positions += loss.numel()
        gradient, half = gradient / positions, squares / (2 * positions)
        return half - gradient, half + gradient

    def _of_own_labels(self, log_probs: Float[Tensor, "place d_vocab"]) -> Float[Tensor, ""]:
        """The summed surprisal of labels drawn from the distributions themselves."""
        drawn = torch.rand(log_probs.shape[:-1], generator=self.labels, dtype=torch.float32).to(log_probs.device)
        upto = log_probs.detach().exp().cumsum(-1)
        labels = (upto < drawn[..., None]).sum(-1).clamp(max=log_probs.shape[-1] - 1)
        return -log_probs.gather(-1, labels[..., None]).sum()

    def lowest(self, rise: Float[Tensor, " weight"], among: Bool[Tensor, " weight"], most: int) -> Places:
        """The places of the lowest predicted rises, ascending."""
        places = among.nonzero().flatten()
        return places[rise[places].argsort(stable=True)[:most]]

    @torch.no_grad()
    def flip(self, places: Places | Sequence[int]) -> int:
        """Drop the kept ones of these weights, re-admit the others; returns by how many the mask grew."""
        at = torch.as_tensor(places, device=self.open.device)
        self.open[at] = 1 - self.open[at]
        return int((2 * self.open[at] - 1).sum())

    def try_to(self, places: Places | Sequence[int], price: float, expected: float = 0.0) -> bool:
        """Flip weights if that lowers the objective by more than `expected`, which is at least 0."""
        grown = self.flip(places)
        found = self.measure()
        if self.loss - found - price * grown > max(expected, 0.0):
            self.loss, self.moves = found, self.moves + 1
            return True
        self.flip(places)
        return False

    # --- passes ---

    def descend(self, price: float, passes: int) -> int:
        """Re-admit and drop weights until neither pays; returns the number of passes."""
        for made in range(1, passes + 1):
            moves = self.moves
            self.readmit(price)
            self.drop(price)
            if self.moves == moves or self.spent:
                return made
        return passes

    def descend_at_size(self, price: float, passes: int) -> int:
        """Look for a mask of the same size and a lower loss: at a price first, then brought to that size again."""
        first, loss, size = self.open.clone(), self.loss, int(self.open.sum())
        made = self.descend(price, passes)
        self.resize(size)
        self.exchange()
        if self.loss >= loss:
            self.open.copy_(first)
            self.loss = loss
            self.exchange()
        return made

    def readmit(self, price: float) -> None:
        """Re-admit weights one by one, until none of the most promising ones pays or half of what is left is spent."""
        until = (self.measured + self.most) // 2
        while self.measured < until:
            _, rise = self.predict()
            places = self.lowest(rise, (self.open == 0) & self.possible, _TRIED)
            gains = [gain - price for gain in self.gains(places)]
            if not self.make([([place], gain) for place, gain in zip(places.tolist(), gains, strict=True)], price):
                return

    def drop(self, price: float) -> None:
        """Drop weights in groups, the doubtful ones one by one, until `_PATIENCE` proposals in a row were refused."""
        rise, _ = self.predict()
        places = self.lowest(rise, self.open > 0, _PROPOSED)
        predicted = (price - rise[places]).double().tolist()
        sure = sum(gain > 0 for gain in predicted)
        waiting = [(at, at + 1) for at in reversed(range(sure, len(places)))]
        if sure:
            waiting.append((0, sure))
        refused = 0
        while waiting and refused < _PATIENCE and not self.spent:
            start, end = waiting.pop()
            alone = end - start == 1
            if self.try_to(places[start:end], price, 0.0 if alone else _HOLDS * sum(predicted[start:end])):
                refused = 0
                continue
            refused += 1
            if not alone:
                middle = (start + end) // 2
                waiting += [(middle, end), (start, middle)]

    def exchange(self) -> None:
        """Exchange kept weights for others, pair by pair, until none of the most promising pairs lowers the loss."""
        while not self.spent:
            dropped, readmitted = self.predict()
            out = self.lowest(dropped, self.open > 0, _TRIED)
            into = self.lowest(readmitted, (self.open == 0) & self.possible, _TRIED)
            pairs = zip(_best_first(out, self.gains(out)), _best_first(into, self.gains(into)), strict=False)
            if not self.make([([old, new], lost + gained) for (lost, old), (gained, new) in pairs], 0.0):
                return

    def resize(self, size: int) -> None:
        """Bring the mask to a size: drop the weights that matter least, or re-admit those that help most."""
        while missing := size - int(self.open.sum()):
            dropped, readmitted = self.predict()
            rise, among = (readmitted, (self.open == 0) & self.possible) if missing > 0 else (dropped, self.open > 0)
            if self.spent or abs(missing) > _TRIED:
                self.flip(self.lowest(rise, among, -(-abs(missing) // (1 if self.spent else 2))))
            else:
                places = self.lowest(rise, among, _TRIED)
                best = _best_first(places, self.gains(places))[: max(1, abs(missing) // 2)]
                self.flip([place for _, place in best])
        self.loss = self.measure()

    def gains(self, places: Places) -> list[float]:
        """By how much the loss falls if each of these weights alone is flipped."""
        found = []
        for place in places.tolist():
            self.flip([place])
            found.append(self.loss - self.measure())
            self.flip([place])
        return found

    def make(self, moves: list[tuple[list[int], float]], price: float) -> int:
        """Make moves, given with what each gains alone, best first, as long as half of that is left; returns how many.

        Moves that gain in the same way, such as two weights of which one is needed, are thus not both made.
        """
        paying = sorted((move for move in moves if move[1] > 0), key=lambda move: -move[1])
        return sum(self.try_to(places, price, _HOLDS * gain) for places, gain in paying)

    def subnetwork(self, like: Subnetwork) -> Subnetwork:
        """The mask, with the weights of `like` in matrices without switches."""
        masks = {site.name: site.from_stored(self.switches[site.name].detach() > 0) for site in self.sites}
        return Subnetwork(
            {name: masks.get(name, like[name]) for name in like},
            model_name=self.model.cfg.model_name,
            weight_hash=weight_hash(self.model),
            lineage=f"polished ({like.lineage})",
        )  # fmt: skip


def _joined(gradients: Sequence[Tensor]) -> Float[Tensor, " weight"]:
    return torch.cat([gradient.flatten() for gradient in gradients])


def _best_first(places: Places, gains: Sequence[float]) -> list[tuple[float, int]]:
    return sorted(zip(gains, places.tolist(), strict=True), key=lambda pair: -pair[0])
