"""Take parts of a model away and see what its predictions lose.

What is taken away is said in a small language:

    head 2.3            one attention head (layer 2, head 3)
    neurons 0.[1,5,7]   MLP neurons of a layer; neurons 0.5 for one
    attn 1, mlp 0       a block's whole attention, or whole MLP
    layer 2             both
    head 1.2 + mlp 0    several at once
    heads, attns, mlps, layers              each of them in turn
    subnetwork, complement, random          the weights of a subnetwork, all others, a matched random set

or is a `Subnetwork`, whose weights are taken away. How: activations are replaced by hooks, or weights set to 0.

- `zero`: the activation is 0.
- `mean`: it is its own mean over all sequences and positions of the text, in the model as it was before.
- `resample`: it is that of another sequence of the same batch at the same position, paired at random with a seed
  (where a task's prompts differ in length, the other one may have ended by then).
- `weights`: all weights of the part are 0: those of `Subnetwork.drop_head`, `drop_neurons` and so on.

A head's activation is its mixed values before W_O, a neuron's is what W_out reads, attention's and the MLP's are what
they add to the residual stream, biases included. Biases are no part of a head or a neuron and stay.

Every rise in loss stands beside that of a matched random ablation: as many random coordinates of the same
activations, or as many random weights in the same matrices; there is none where the part is all there is. Intervals
are paired bootstraps over sequences (Efron 1979): both models are resampled with the same sequences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from bigram_circuits import metrics
from bigram_circuits.analysis.conditions import reduced_to
from bigram_circuits.analysis.results import Curves, Effects, Quantity
from bigram_circuits.analysis.tasks import Hooks, Task, as_task, measure, per_place
from bigram_circuits.sites import weight_sites
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets import check_target

WAYS = ("zero", "mean", "resample", "weights")
"""Values of `by`."""

_COMPONENT = re.compile(r"(head)\s+(\d+)\.(\d+)|(neurons)\s+(\d+)\.(\d+|\[[\d,\s]*\])|(attn|mlp|layer)\s+(\d+)")
_SWEEPS = ("heads", "attns", "mlps", "layers")
_OF_SUBNETWORK = ("subnetwork", "complement", "random")
_ALLOWED = (
    "say 'head 2.3', 'neurons 0.[1,5,7]', 'attn 1', 'mlp 0' or 'layer 2', several joined by ' + ', 'heads', 'attns', "
    "'mlps' or 'layers' for each in turn, 'subnetwork', 'complement' or 'random', or give a Subnetwork"
)
_DRAWS = 1000

Kept = Subnetwork | None
"""The weights of a model that are kept, or None for all of them."""


@dataclass(frozen=True)
class Component:
    """A part of a model."""

    kind: str
    """`head`, `neurons`, `attn` or `mlp`."""
    layer: int
    """Index of the block."""
    indices: tuple[int, ...] = ()
    """The head, or the neurons; empty for `attn` and `mlp`, which are whole."""

    def weights(self, empty: Subnetwork, *, shared: bool) -> Subnetwork:
        """Its weights; `shared`: with W_K and W_V of a head that others of its group read too."""
        if self.kind == "head":
            if shared:
                return empty.keep_head(self.layer, self.indices[0])
            return ~(~empty).drop_head(self.layer, self.indices[0])
        if self.kind == "neurons":
            return empty.keep_neurons(self.layer, self.indices)
        own = f"blocks.{self.layer}.{self.kind}."
        return Subnetwork(
            {name: torch.full(shape, name.startswith(own)) for name, shape in empty.shapes.items()},
            model_name=empty.model_name,
            weight_hash=empty.weight_hash,
        )


@dataclass(frozen=True)
class Part:
    """Something that can be taken away from a model, or added to a subnetwork."""

    name: str
    """As it was said, for example `head 1.2 + mlp 0`."""
    components: tuple[Component, ...] = ()
    """Components of the model."""
    subnetworks: tuple[Subnetwork, ...] = ()
    """Sets of weights; then there are only weights, no activations, to ablate."""

    def weights(self, model: Any, *, shared: bool = False) -> Subnetwork:
        """All its weights, under its name; `shared`: with W_K and W_V that a head shares with its group."""
        chosen = empty = Subnetwork.empty(model)
        for component in self.components:
            chosen |= component.weights(empty, shared=shared)
        for subnetwork in self.subnetworks:
            chosen |= subnetwork
        return chosen.named(self.name)


# --- the language ---


def parse(what: Any, model: Any, subnetwork: Subnetwork | None = None) -> tuple[Part, ...]:
    """The parts that `what` names: a string, a `Subnetwork`, a sequence of these, or a mapping of names to them.

    Raises:
        ValueError: If a string cannot be read, a layer, head or neuron does not exist, a subnetwork is not the model's
            or is asked for by name without there being one, or two parts have one name.
    """
    sizes = _sizes(model)
    if isinstance(what, Subnetwork) or not isinstance(what, Mapping):
        items: Iterable[Any] = [what] if isinstance(what, str | Subnetwork) else what
        if not isinstance(items, Sequence):
            raise ValueError(f"cannot read a part of a model from a {type(what).__name__}: {_ALLOWED}")
        parts = [part for item in items for part in _read(item, sizes, model, subnetwork)]
    else:
        parts = []
        for name, item in what.items():
            found = _read(item, sizes, model, subnetwork)
            if len(found) != 1:
                raise ValueError(f"{name!r} should be one part of a model, but {item!r} stands for {len(found)}")
            parts.append(Part(str(name), found[0].components, found[0].subnetworks))
    if not parts:
        raise ValueError(f"no part of the model is named: {_ALLOWED}")
    names = [part.name for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two parts are called {twice!r}: give a part once, and name subnetworks with .named(...)")
    return tuple(parts)


@dataclass(frozen=True)
class _Sizes:
    """By layer: the number of heads, and of neurons."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]

    def check(self, what: str, layer: int, kind: str, indices: Iterable[int]) -> None:
        if layer >= len(self.heads):
            raise ValueError(f"{what!r}: there is no layer {layer}: layers are 0 to {len(self.heads) - 1}")
        count = self.heads[layer] if kind == "head" else self.neurons[layer]
        wrong = next((index for index in indices if index >= count), None)
        if wrong is not None:
            one, many = kind.removesuffix("s"), kind.removesuffix("s") + "s"
            raise ValueError(f"{what!r}: there is no {one} {wrong} in layer {layer}: it has {many} 0 to {count - 1}")


def _sizes(model: Any) -> _Sizes:
    first = {matrix: {} for matrix in ("W_Q", "W_out")}
    for site in weight_sites(model):
        if (matrix := site.name.rsplit(".", 1)[1]) in first:
            first[matrix][site.layer] = site.shape[0]
    layers = range(len(first["W_Q"]))
    return _Sizes(tuple(first["W_Q"][i] for i in layers), tuple(first["W_out"][i] for i in layers))


def _read(item: Any, sizes: _Sizes, model: Any, subnetwork: Subnetwork | None) -> list[Part]:
    if isinstance(item, Subnetwork):
        item.check_fits(model)
        return [Part(item.lineage, (), (item,))]
    if not isinstance(item, str):
        raise ValueError(f"cannot read a part of a model from a {type(item).__name__}: {_ALLOWED}")
    text = " ".join(item.split())
    layers = range(len(sizes.heads))
    if text == "heads":
        return [Part(f"head {i}.{h}", (Component("head", i, (h,)),)) for i in layers for h in range(sizes.heads[i])]
    if text in ("attns", "mlps"):
        kind = text.removesuffix("s")
        return [Part(f"{kind} {i}", (Component(kind, i),)) for i in layers]
    if text == "layers":
        return [Part(f"layer {i}", (Component("attn", i), Component("mlp", i))) for i in layers]
    components: list[Component] = []
    subnetworks: list[Subnetwork] = []
    for term in (term.strip() for term in text.split("+")):
        if term in _OF_SUBNETWORK:
            if subnetwork is None:
                raise ValueError(f"{item!r} needs to know of a subnetwork: pass subnetwork=")
            subnetwork.check_fits(model)
            sets = {"subnetwork": lambda: subnetwork, "complement": lambda: ~subnetwork}
            subnetworks.append(sets.get(term, lambda: subnetwork.random_like(seed=0))())
        else:
            components += _components(term, item, sizes)
    return [Part(text, tuple(components), tuple(subnetworks))]


def _components(term: str, whole: str, sizes: _Sizes) -> list[Component]:
    found = _COMPONENT.fullmatch(term)
    if found is None:
        problem = f"{term!r} stands for many and cannot be joined" if term in _SWEEPS else _ALLOWED
        raise ValueError(f"cannot read {whole!r} as a part of a model: {problem}")
    kind = found[1] or found[4] or found[7]
    layer = int(found[2] or found[5] or found[8])
    listed = found[3] or found[6] or ""
    indices = tuple(dict.fromkeys(int(number) for number in re.findall(r"\d+", listed)))
    if kind == "neurons" and not indices:
        raise ValueError(f"cannot read {whole!r} as a part of a model: it names no neuron, as in 'neurons 0.[1,5,7]'")
    sizes.check(whole, layer, kind, indices)
    return [Component(one, layer, indices) for one in (("attn", "mlp") if kind == "layer" else (kind,))]


# --- what is replaced ---

Coordinates = Mapping[str, Bool[Tensor, " _"]]
"""By hook point: which coordinates of an activation are replaced."""


def coordinates(model: Any, part: Part) -> dict[str, Bool[Tensor, " _"]]:
    """The activations of a part: for every hook point, which of its coordinates (heads flattened) belong to it.

    Raises:
        ValueError: If it is a set of weights, which has no activations.
    """
    if part.subnetworks:
        raise ValueError(f"{part.name!r} is a set of weights, with no activation of its own: ablate it by='weights'")
    shapes = {site.name: site.shape for site in weight_sites(model)}
    found: dict[str, Tensor] = {}
    for component in part.components:
        block = f"blocks.{component.layer}"
        heads, d_head, d_model = shapes[f"{block}.attn.W_O"]
        if component.kind == "head":
            name, mask = f"{block}.attn.hook_z", torch.zeros(heads, d_head, dtype=torch.bool)
            mask[list(component.indices)] = True
        elif component.kind == "neurons":
            name, mask = f"{block}.mlp.hook_post", torch.zeros(shapes[f"{block}.mlp.W_out"][0], dtype=torch.bool)
            mask[list(component.indices)] = True
        else:
            name, mask = f"{block}.hook_{component.kind}_out", torch.ones(d_model, dtype=torch.bool)
        found[name] = mask.flatten() | found.get(name, torch.zeros(mask.numel(), dtype=torch.bool))
    return found


def random_coordinates(chosen: Coordinates, seed: int) -> dict[str, Bool[Tensor, " _"]] | None:
    """As many random coordinates of the same activations; None if one of them is chosen whole."""
    if any(bool(mask.all()) for mask in chosen.values()):
        return None
    drawn = {}
    for name, mask in chosen.items():
        rng = np.random.default_rng((seed, int(name.split(".")[1]), name.endswith("post")))
        drawn[name] = torch.zeros(mask.shape, dtype=torch.bool)
        drawn[name][torch.from_numpy(rng.choice(mask.numel(), int(mask.sum()), replace=False))] = True
    return drawn


def random_within(pool: Subnetwork, counts: Mapping[str, int], seed: int = 0) -> Subnetwork:
    """Weights drawn uniformly from a subnetwork: `counts[name]` of those it keeps in every matrix (0 if not named).

    Raises:
        ValueError: If there are fewer in the pool than that.
    """
    masks = {}
    for index, (name, (kept, _)) in enumerate(pool.by_weight().items()):
        count = counts.get(name, 0)
        if not 0 <= count <= kept:
            raise ValueError(f"cannot draw {count} weights of {name} from {kept}")
        mask = torch.zeros(pool.shapes[name], dtype=torch.bool)
        if count:
            there = np.flatnonzero(pool[name].numpy())
            drawn = np.random.default_rng((seed, index)).choice(there, count, replace=False, shuffle=False)
            mask.view(-1)[torch.from_numpy(drawn)] = True
        masks[name] = mask
    lineage = f"random {seed} within [{pool.lineage}]"
    return Subnetwork(masks, model_name=pool.model_name, weight_hash=pool.weight_hash, lineage=lineage)


def matched_counts(chosen: Subnetwork, pool: Subnetwork) -> dict[str, int] | None:
    """Weights chosen in every matrix; None if drawing as many from the pool could only give the same ones."""
    counts = {name: count.kept for name, count in chosen.by_weight().items()}
    there = {name: count.kept for name, count in pool.by_weight().items()}
    return counts if any(0 < count < there[name] for name, count in counts.items()) else None


@dataclass(frozen=True)
class _Replace:
    """Forward hooks that replace coordinates of activations."""

    chosen: Coordinates
    by: str
    means: Mapping[str, Tensor]
    task: Task
    seed: int

    def __call__(self, index: int, part: slice) -> list[tuple[str, Callable[..., Any]]]:
        n = part.stop - part.start
        partner = torch.arange(n)
        if self.by == "resample":
            order = np.random.default_rng((self.seed, index)).permutation(n)
            partner[torch.from_numpy(order)] = torch.from_numpy(np.roll(order, 1))
        return [(name, self._hook(name, mask, partner)) for name, mask in self.chosen.items()]

    def _hook(self, name: str, mask: Tensor, partner: Tensor) -> Callable[..., Any]:
        def replace(value: Tensor, hook: Any) -> Tensor:
            flat = value.reshape(*value.shape[:2], -1)
            if self.by == "zero":
                new = torch.zeros_like(flat)
            elif self.by == "mean":
                new = self.means[name].to(flat).expand_as(flat)
            else:
                new = flat[partner.to(flat.device)]
            return torch.where(mask.to(flat.device), new, flat).view(value.shape)

        return replace


def mean_activations(model: Any, task: Task, names: Iterable[str]) -> dict[str, Float[Tensor, " _"]]:
    """Means of activations over all prompts and positions, up to the last scored place of each; float64, CPU."""
    totals: dict[str, Tensor] = {}
    ends = torch.from_numpy(task.ends)

    def hooks(index: int, part: slice) -> list[tuple[str, Callable[..., Any]]]:
        inside = torch.arange(task.tokens.shape[1]) <= ends[part, None]

        def hook_for(name: str) -> Callable[..., Any]:
            def add(value: Tensor, hook: Any) -> None:
                flat = value.reshape(*value.shape[:2], -1)
                total = flat[inside.to(flat.device)].double().sum(0).cpu()
                totals[name] = totals[name] + total if name in totals else total

            return add

        return [(name, hook_for(name)) for name in names]

    names = list(dict.fromkeys(names))
    measure(model, task, hooks=hooks)
    return {name: total / int((task.ends + 1).sum()) for name, total in totals.items()}


# --- several conditions on the same prompts ---

Statistic = Callable[[Float[np.ndarray, "... column"]], Float[np.ndarray, "..."]]


class Table:
    """Sums of several conditions on the same prompts, and paired bootstrap draws of them."""

    def __init__(
        self, sums: Float[np.ndarray, "condition prompt column"], places: Mapping[tuple[str, str, int | None], int]
    ) -> None:
        """`places` tells where the condition (base, part or "" for none, random draw or None) is."""
        self.sums = sums
        self.places = places
        columns = sums.shape[2]
        together = np.moveaxis(sums, 0, 1).reshape(sums.shape[1], -1)
        self._draws = metrics.bootstrap(together, draws=_DRAWS).reshape(_DRAWS, len(sums), columns)
        self._whole = sums.sum(1)

    def prompts(self, base: str, name: str) -> Float[np.ndarray, "prompt column"]:
        """The sums of every prompt."""
        return self.sums[self.places[base, name, None]]

    def randoms(self, base: str, name: str) -> list[int]:
        """The random draws there are for a part."""
        return [r for b, n, r in self.places if b == base and n == name and r is not None]

    def point(self, base: str, name: str, statistic: Statistic, random: int | None = None) -> float:
        """A statistic over all prompts."""
        return float(statistic(self._whole[self.places[base, name, random]]))

    def draws(
        self, base: str, name: str, statistic: Statistic, random: int | None = None
    ) -> Float[np.ndarray, " draw"]:
        """A statistic in every bootstrap draw."""
        return np.asarray(statistic(self._draws[:, self.places[base, name, random]]))

    def change(self, base: str, name: str, statistic: Statistic) -> tuple[float, float, float]:
        """How much higher a statistic is with the part changed than in the base, and its 95% interval."""
        draws = self.draws(base, name, statistic) - self.draws(base, "", statistic)
        return (self.point(base, name, statistic) - self.point(base, "", statistic), *metrics.interval(draws))

    def random_change(self, base: str, name: str, statistic: Statistic) -> float:
        """The mean of that over the matched random ones; nan if there are none."""
        points = [self.point(base, name, statistic, random) for random in self.randoms(base, name)]
        return float(np.mean(points)) - self.point(base, "", statistic) if points else math.nan

    def excess(self, base: str, name: str, statistic: Statistic) -> tuple[float, float, float]:
        """How much higher a statistic is than the mean of the matched random ones, and its 95% interval."""
        randoms = self.randoms(base, name)
        if not randoms:
            return (math.nan, math.nan, math.nan)
        point = self.point(base, name, statistic) - np.mean([self.point(base, name, statistic, r) for r in randoms])
        others = np.mean([self.draws(base, name, statistic, r) for r in randoms], axis=0)
        return (float(point), *metrics.interval(self.draws(base, name, statistic) - others))


def mean_loss(sums: Float[np.ndarray, "... column"]) -> Float[np.ndarray, "..."]:
    """Loss per scored place, nats."""
    return per_place(sums, "surprisal")


def mean_log_odds(sums: Float[np.ndarray, "... column"]) -> Float[np.ndarray, "..."]:
    """Log odds of right against wrong per scored place, nats."""
    return per_place(sums, "log_odds")


@dataclass(frozen=True)
class Job:
    """One pass over the text: a base, a base with a part changed, or with a matched random one in its place."""

    base: str
    """Its name, for example `full`."""
    name: str
    """The part's name; empty for the base itself."""
    kept: Kept
    """The weights that the model is reduced to."""
    hooks: Callable[[], Hooks | None] = lambda: None
    """Makes the forward hooks, when it is time."""
    key: Any = None
    """Equal keys give equal sums, so they are measured once; None: the base's own."""
    random: int | None = None
    """Which random draw; None for the part itself."""


class Runs:
    """Sums of every job, measured once for every key."""

    def __init__(self, model: Any, task: Task, target: Any = None) -> None:
        self.model, self.task, self.target = model, task, target
        self._by_key: dict[Any, int] = {}
        self._sums: list[Float[np.ndarray, "prompt column"]] = []
        self._places: dict[tuple[str, str, int | None], int] = {}

    def run(self, job: Job, bar: Any) -> None:
        """Measure a job, unless an equal one has been; move the bar on."""
        key = (job.base, "") if job.key is None else job.key
        if key not in self._by_key:
            hooks = job.hooks()
            with reduced_to(self.model, job.kept):
                sums = measure(self.model, self.task, target=self.target, hooks=hooks, smallest=2)
            self._by_key[key] = len(self._sums)
            self._sums.append(sums)
        bar.update(len(self.task))
        self._places[job.base, job.name, job.random] = self._by_key[key]

    def table(self) -> Table:
        """All that was measured."""
        return Table(np.stack(self._sums), self._places)


# --- ablate ---


def ablate(
    model: Any,
    what: Any,
    tokens: Any,
    subnetwork: Subnetwork | None = None,
    *,
    by: str | None = None,
    target: Any = None,
    seeds: int = 3,
    seed: int = 0,
) -> Effects:
    """Take parts of a model away, one after the other, and measure what its predictions lose.

    Args:
        model: From `load_model`.
        what: The parts, in the language above: a string, a `Subnetwork`, or a list of them.
        tokens: Text to measure on (an array, or a corpus: its held-out part), or a `Task`.
        subnetwork: Also ablate within the model reduced to this subnetwork; those quantities end in `_in_subnetwork`.
        by: `zero`, `mean`, `resample` or `weights`; if not given, `zero` for components and `weights` for
            subnetworks, which can be ablated in no other way.
        target: If given, also the change of the correlation of surprisals with this target's.
        seeds: Number of matched random ablations, of which the mean is taken; 0 for none.
        seed: Of the resampled activations.

    Returns:
        For every part, of the full model and if there is one of the subnetwork: `rise_in_loss` and its `excess` over
        the matched random ablations' `random_rise`, with 95% paired intervals; the `loss` afterwards; with a target
        `change_in_r`; for a task with wrong tokens `change_in_log_odds`. All losses in nats per scored place.

    Raises:
        ValueError: If an argument is wrong, `by` does not go with a part, resampling has only one sequence, or a
            surprisal is not finite.
    """
    if by is not None and by not in WAYS:
        raise ValueError(f"by must be one of {', '.join(WAYS)}, not {by!r}")
    if seeds < 0:
        raise ValueError(f"seeds must be 0 or more, not {seeds}")
    if target is not None:
        check_target(target, model.cfg.d_vocab)
    task = as_task(tokens, model.cfg.d_vocab)
    parts = parse(what, model, subnetwork)
    ways = {part.name: by or ("weights" if part.subnetworks else "zero") for part in parts}
    if "resample" in ways.values() and len(task) < 2:
        raise ValueError("resampling takes activations from another sequence, but there is only one")
    chosen = {part.name: coordinates(model, part) for part in parts if ways[part.name] != "weights"}
    dropped = {part.name: part.weights(model) for part in parts if ways[part.name] == "weights"}
    bases: dict[str, Kept] = {"full": None} | ({} if subnetwork is None else {"subnetwork": subnetwork})
    runs = Runs(model, task, target)
    jobs: list[Job] = []
    for base, kept in bases.items():
        jobs.append(Job(base, "", kept))
        means = _BaseMeans(model, task, kept, {name for masks in chosen.values() for name in masks})
        for part in parts:
            if part.name in chosen:
                jobs += _activation_jobs(part.name, base, kept, chosen[part.name], ways, means, task, seeds, seed)
            else:
                jobs += _weight_jobs(part, base, kept, dropped[part.name], seeds)
    with tqdm(total=len(jobs) * len(task), desc="ablating", unit="sequence", delay=2, leave=False) as bar:
        for job in jobs:
            runs.run(job, bar)
    table = runs.table()
    names = tuple(part.name for part in parts)
    return Effects(
        title=f"Ablation on {task.name}",
        quantities=_quantities(list(bases), target is not None, task.wrong is not None),
        subject="ablation",
        names=names,
        **_effects(table, list(bases), names, task, target is not None),
        notes={
            "by": ways,
            "prompts": len(task),
            "scored_places": int(task.scored.sum()),
            "random_ablations": seeds,
            "loss_before": {base: table.point(base, "", mean_loss) for base in bases},
            "interval": "95%, paired bootstrap over sequences",
        }
        | ({"correlations": "scored places where the target's probability is above 0"} if target is not None else {}),
    )


class _BaseMeans:
    """Mean activations of a base, taken when they are first needed."""

    def __init__(self, model: Any, task: Task, kept: Kept, names: set[str]) -> None:
        self._arguments = (model, task, sorted(names))
        self._kept = kept
        self._means: dict[str, Tensor] | None = None

    def __call__(self) -> dict[str, Tensor]:
        if self._means is None:
            with reduced_to(self._arguments[0], self._kept):
                self._means = mean_activations(*self._arguments)
        return self._means


def _activation_jobs(
    name: str,
    base: str,
    kept: Kept,
    chosen: Coordinates,
    ways: Mapping[str, str],
    means: _BaseMeans,
    task: Task,
    seeds: int,
    seed: int,
) -> Iterable[Job]:
    by = ways[name]

    def job(masks: Coordinates, random: int | None) -> Job:
        key = (base, by, *((point, mask.numpy().tobytes()) for point, mask in sorted(masks.items())))
        return Job(
            base, name, kept, lambda: _Replace(masks, by, means() if by == "mean" else {}, task, seed), key, random
        )

    yield job(chosen, None)
    for random in range(seeds):
        masks = random_coordinates(chosen, random)
        if masks is not None:
            yield job(masks, random)


def _weight_jobs(part: Part, base: str, kept: Kept, dropped: Subnetwork, seeds: int) -> Iterable[Job]:
    pool = ~(dropped - dropped) if kept is None else kept  # all weights, or the base's
    here = dropped & pool
    yield Job(base, part.name, pool - here, key=(base, "weights", (pool - here).checksum))
    counts = matched_counts(here, pool)
    if counts is None or part.name == "random":
        return
    for random in range(seeds):
        rest = pool - random_within(pool, counts, random)
        yield Job(base, part.name, rest, key=(base, "weights", rest.checksum), random=random)


def _quantities(bases: Sequence[str], with_target: bool, with_odds: bool) -> tuple[Quantity, ...]:
    listed = []
    for base in bases:
        end = "" if base == "full" else f"_in_{base}"
        where = "the full model" if base == "full" else f"the model reduced to the {base}"
        listed += [
            Quantity(f"rise_in_loss{end}", "nats", f"How much the loss of {where} rises without the part."),
            Quantity(f"excess{end}", "nats", "That, less what matched random ablations raise it by."),
            Quantity(f"random_rise{end}", "nats", "What matched random ablations raise it by, mean over draws."),
            Quantity(f"loss{end}", "nats", f"The loss of {where} without the part."),
        ]
        if with_target:
            listed.append(Quantity(f"change_in_r{end}", "", "Change of the correlation with the target's surprisals."))
        if with_odds:
            listed.append(
                Quantity(f"change_in_log_odds{end}", "nats", "Change of the log odds of right against wrong.")
            )
    return tuple(listed)


def _effects(
    table: Table, bases: Sequence[str], names: Sequence[str], task: Task, with_target: bool
) -> dict[str, Float[np.ndarray, "quantity thing"]]:
    """The values and intervals, in the order of `_quantities`."""
    nan = math.nan
    rows: list[list[tuple[float, float, float]]] = []
    for base in bases:
        rows.append([table.change(base, name, mean_loss) for name in names])
        rows.append([table.excess(base, name, mean_loss) for name in names])
        rows.append([(table.random_change(base, name, mean_loss), nan, nan) for name in names])
        rows.append([(table.point(base, name, mean_loss), nan, nan) for name in names])
        if with_target:
            rows.append([table.change(base, name, metrics.correlation) for name in names])
        if task.wrong is not None:
            rows.append([table.change(base, name, mean_log_odds) for name in names])
    numbers = np.array(rows, dtype=float)
    return {"values": numbers[:, :, 0], "low": numbers[:, :, 1], "high": numbers[:, :, 2]}


# --- removing the rest at random ---


def stochastic_ablation(
    model: Any,
    subnetwork: Subnetwork,
    target: Any,
    tokens: Any,
    *,
    shares: Sequence[float | int] = (0, 0.25, 0.5, 0.75, 1),
    draws: int = 5,
    seed: int = 0,
) -> Curves:
    """Remove more and more of the weights outside a subnetwork, chosen at random, on the way from the full model to it.

    That a subnetwork alone does something shows what it does when everything else is gone at once; the removed rest may
    have been holding it back, or the masked model may be a state that the full one never comes near. This is the
    stricter test: at every share of the complement removed, several random choices are made, in every matrix the same
    share. If the subnetwork carries the behaviour in the full model, the correlation with the target rises (or holds)
    along the whole way, and above that of a matched random subnetwork in its place, whose complement is thinned alike.

    Args:
        model: From `load_model`.
        subnetwork: What is always kept.
        target: Whose surprisals are correlated with the model's.
        tokens: Text (an array, or a corpus: its held-out part), or a `Task`.
        shares: Shares of the complement's weights to remove, 0 (the full model) to 1 (the subnetwork alone).
        draws: Random choices at each share; each comes with a matched random subnetwork of its own.
        seed: Of the first draw.

    Returns:
        `surprisal_correlation` and `loss` against the share removed, for `subnetwork` and `random`: means over draws,
        with the lowest and the highest draw as the interval.

    Raises:
        ValueError: If a share is not 0 to 1, there is no share or draw, or shapes or vocabularies do not agree.
    """
    if not len(shares) or any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"shares must be numbers from 0 to 1, not {tuple(shares)}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    check_target(target, model.cfg.d_vocab)
    subnetwork.check_fits(model)
    task = as_task(tokens, model.cfg.d_vocab)
    numbers = np.full((2, 2, len(shares), draws), math.nan)
    seen: dict[str, tuple[float, float]] = {}
    with tqdm(total=2 * len(shares) * draws * len(task), desc="removing", unit="sequence", delay=2, leave=False) as bar:
        for draw in range(draws):
            for row, core in enumerate((subnetwork, subnetwork.random_like(seed=seed + draw))):
                for point, share in enumerate(shares):
                    kept = core | _thinned(~core, 1 - share, seed + draw)
                    if (key := kept.checksum) not in seen:
                        with reduced_to(model, kept):
                            whole = measure(model, task, target=target).sum(0)
                        seen[key] = (float(metrics.correlation(whole)), float(mean_loss(whole)))
                    numbers[:, row, point, draw] = seen[key]
                    bar.update(len(task))
    return Curves(
        title="The rest removed at random",
        quantities=(
            Quantity("surprisal_correlation", "", "Correlation of the model's surprisals with the target's."),
            Quantity("loss", "nats", "The model's own next-token loss."),
        ),
        axis="share_removed",
        points=tuple(shares),
        conditions=("subnetwork", "random"),
        values=numbers.mean(-1),
        low=numbers.min(-1),
        high=numbers.max(-1),
        notes={
            "draws": draws,
            "seed": seed,
            "prompts": len(task),
            "interval": "lowest to highest draw",
            "correlations": "scored places where the target's probability is above 0",
        },
    )


def _thinned(subnetwork: Subnetwork, share: float | int, seed: int) -> Subnetwork:
    """A random share of its weights, the same in every matrix (to the nearest weight)."""
    counts = {name: round(share * count.kept) for name, count in subnetwork.by_weight().items()}
    return random_within(subnetwork, counts, seed)
