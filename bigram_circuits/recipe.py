"""The options of a study, each defined once.

Three frozen dataclasses hold them: `SparsifyConfig` (how masks are learned), `Inputs` (model, text and target by
name) and `StudyOptions` (everything else). A field of one of them is an option in Python, on the command line, in a
run's `config.json`, in its identity, and in the command that the report prints: all of these are derived from the
fields here, so adding an option means adding one field. This module does not import torch.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any, get_type_hints

from bigram_circuits.registry import FolderOf
from bigram_circuits.storage.typed import Record, from_json, shown
from bigram_circuits.text.tokenizers import BOS

METHODS: FolderOf[Any] = FolderOf("masking.methods", "METHOD")
"""The masking methods by name: gate classes, one module each in `masking/methods/`."""
TARGETS: FolderOf[Any] = FolderOf("targets", "TARGET")
"""The targets that have a name on the command line, one module each in `targets/`."""
MEASURES: FolderOf[Any] = FolderOf("tasks.measures", "MEASURE")
"""What masks may be asked for at the answers of a task, one module each in `tasks/measures/`."""
UNITS = {"weight": ("attn", "mlp"), "neuron": ("mlp",), "head": ("attn",), "block": ("attn", "mlp")}
"""The units that a gate may control, and the components that have them."""
REPLACEMENTS = ("zero", "mean", "mean_by_position", "resample", "counterfactual")
"""What may take the place of a node that is dropped; see `replacement`."""
HELD_OUT = 0.05
"""Share of the documents of a text that are held out by default."""
HELD_OUT_ROWS = 0.3
"""Share of a task's rows that are held out by default: there are fewer of them."""
DTYPES = ("float32", "bfloat16", "float16")
SHORT_UNTIL = 0.6
"""The share of steps that see only the beginnings of sequences, where that is the default."""


# --- what an option is: its flags, and its values as text ---


@dataclass(frozen=True)
class Kind:
    """How the values of an option are parsed from text and written as text."""

    read: Callable[[str], Any]
    """Parse an argument of the command line; raises ArgumentTypeError."""
    metavar: str
    """Placeholder for a value in the help."""
    write: Callable[[Any], str] = str
    """Write a value as an argument of the command line."""


@dataclass(frozen=True)
class Option:
    """The command-line option of a field."""

    flags: tuple[str, ...]
    """Its spellings, the preferred one first; one without dashes is a positional argument."""
    kind: Kind | None
    """How its values are parsed; None for a switch."""
    help: str
    """What it does, in a phrase."""
    choices: Callable[[], Iterable[Any]] | None = None
    """The allowed values, if they can be listed."""
    says: str | None = None
    """The default as the help describes it, if not the field's own."""

    @property
    def flag(self) -> str:
        """The preferred spelling."""
        return self.flags[0]


def _fail(text: str, wanted: str) -> ArgumentTypeError:
    return ArgumentTypeError(f"{text!r} is not {wanted}")


def whole(least: int, metavar: str = "N") -> Kind:
    """A kind for whole numbers of at least `least`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise _fail(text, f"a whole number of at least {least}")
        return int(text)

    return Kind(read, metavar)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise _fail(text, "a number of at least 0")
    return value


def _any_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _fail(text, "a number")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    found = tuple(_number(part) for part in text.split(","))
    if len(set(found)) < 2:
        raise _fail(text, "a list of at least two different numbers, as in 1,10,100")
    return found


def _steps(text: str) -> tuple[int, ...]:
    found = tuple(whole(0).read(part) for part in text.split(","))
    if not any(found):
        raise _fail(text, "a list of numbers of steps, as in 0,1,4,20,80")
    return tuple(sorted({0, *found}))


def _granularity(text: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    return {component: unit for component, _, unit in pairs}


def _write_granularity(value: str | Mapping[str, str]) -> str:
    return value if isinstance(value, str) else ",".join(f"{component}={unit}" for component, unit in value.items())


def _write_list(values: Iterable[Any]) -> str:
    return ",".join(map(_write_number, values))


def _write_number(value: float | int) -> str:
    """The shortest text that reads back as the same number."""
    return repr(value if isinstance(value, int) else float(value)).removesuffix(".0")


NUMBER = Kind(_number, "X", _write_number)
ANY_NUMBER = Kind(_any_number, "X", _write_number)
TEXT = Kind(str, "NAME")
NUMBERS = Kind(_numbers, "X,Y,..", _write_list)
_LAYERS = Kind(lambda text: tuple(whole(0).read(part) for part in text.split(",")), "I,J,..", _write_list)
_UNITS = Kind(_granularity, "G", _write_granularity)
NAMES = Kind(lambda text: tuple(part.strip() for part in text.split(",")), "U,V,..", ",".join)
STEPS = Kind(_steps, "N,M,..", _write_list)
SHARES = Kind(lambda text: tuple(_number(part) for part in text.split(",")), "X,Y,..", _write_list)
_OPTION = "option"


def option(
    default: Any, flags: str, kind: Kind | None, help: str, *,
    choices: Callable[[], Iterable[Any]] | None = None, says: str | None = None,
) -> Any:  # fmt: skip
    """A dataclass field with this default that is also a command-line option."""
    return field(default=default, metadata={_OPTION: Option(tuple(flags.split()), kind, help, choices, says)})


def options_of(kind: type) -> dict[str, Option]:
    """The options that a dataclass defines, by field name."""
    return {one.name: one.metadata[_OPTION] for one in fields(kind) if _OPTION in one.metadata}


_YES_OR_NO = "True or False"


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _check(instance: Any, limits: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Raise ValueError, naming the field and its allowed values, for the first limit that is violated."""
    for name, (holds, wanted) in limits.items():
        value = getattr(instance, name)
        try:
            is_right = holds(value) and (not isinstance(value, bool) or wanted == _YES_OR_NO)
        except TypeError:
            is_right = False
        if not is_right:
            hint = f" (a text: give {name}={value}, without quotes)" if _is_number(value) else ""
            raise ValueError(f"{name} must be {wanted}, not {shown(value)}{hint}")


def _is_number(value: Any) -> bool:
    """Whether a value is a text that spells a number."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {shown(value)}")


def option_value(name: str, value: Any) -> Any:
    """The value of an option of `find` that a TOML or JSON file gives: lists become tuples.

    Raises:
        ValueError: If it has another type than the option.
    """
    part = next(part for part in PARTS if name in options_of(part))
    return from_json(get_type_hints(part)[name], value, name)


# --- how masks are learned ---


@dataclass(frozen=True)
class SparsifyConfig(Record):
    """How to learn a subnetwork. The defaults are ours; `SparsifyConfig.paper()` is the published recipe.

    Example:
        >>> small = bc.SparsifyConfig(target_fraction=0.01)  # exactly 1% of the weights
        >>> units = bc.SparsifyConfig(granularity={"attn": "head", "mlp": "neuron"}, layers=(0, 1))
        >>> paper = bc.SparsifyConfig.paper(sparsity_weight=1.0)
    """

    method: str = option(
        "continuous_sparsification", "--method", TEXT, "how masks are learned", choices=lambda: METHODS
    )
    """The masking method: a module of `masking/methods/`."""
    granularity: str | Mapping[str, str] = option(
        "weight", "--granularity", _UNITS, f"unit of a gate: {', '.join(UNITS)}; or attn=head,mlp=weight"
    )
    """The unit of a gate: a single `weight`, an MLP `neuron`, an attention `head`, or a `block` (a layer's attention or
    MLP). Or one for each component: `{"attn": "head", "mlp": "weight"}`. Components left out are kept whole."""
    layers: tuple[int, ...] | None = option(None, "--layers", _LAYERS, "mask only these layers", says="all")
    """The layers to mask (None: all); the others are kept whole."""
    units: tuple[str, ...] | str | None = option(
        None, "--units --unit", NAMES, "learn which nodes are needed, through hooks, instead of weights: head, "
        "neuron, attn, mlp, edge, or names of hook points; one, or several", says="weights",
    )  # fmt: skip
    """Learn which nodes are needed, instead of weights: `head`, `neuron`, `attn`, `mlp`, or names of hook points, one
    or several; or which edges between parts, `edge`. With `weight` among them, single weights or larger units as
    `granularity` says have gates too; a node then counts as the weights that it owns. None: weights alone."""
    replace: str = option(
        "zero", "--replace", TEXT, "of nodes: what takes the place of a dropped one", choices=lambda: REPLACEMENTS
    )
    """What takes the place of a dropped node: one of `REPLACEMENTS`."""
    sparsity_weight: float | int = option(10.0, "--sparsity-weight", NUMBER, "penalty on kept weights")
    """Weight of the penalty, in nats per unit of mean penalised gate; larger values keep fewer weights."""
    target_fraction: float | int | None = option(
        None, "--target-fraction", NUMBER, "keep exactly this share of the weights", says="not fixed"
    )
    """If given, this share of the maskable weights is kept: gates are open above a threshold, scheduled so that the
    open share falls to this one, and the penalty's weight (at first `sparsity_weight`) is adjusted to bring the
    threshold to 0. Exact for single weights; for larger units, as many units of highest score as do not exceed it.
    Required by `straight_through`."""
    learning_rate: float | int | None = option(
        None, "--lr --learning-rate", NUMBER, "learning rate of the scores", says="the method's own"
    )
    """The optimizer's learning rate for the scores; None: the method's own (AdamW 2e-2, with hard concrete 0.5; for
    straight-through, which uses gradient descent with momentum, it does not matter)."""
    weight_decay: float | int = option(0.0, "--weight-decay", NUMBER, "AdamW's weight decay for the scores")
    """AdamW's weight decay for the scores."""
    second_moment_decay: float | int = option(0.99, "--second-moment-decay", NUMBER, "AdamW's beta_2 for the scores")
    """AdamW's beta_2 for the scores: squared gradients are averaged over about 1 / (1 - beta_2) steps. With
    `low_memory` at most 0.99, because a bfloat16 second moment cannot change by smaller steps."""
    first_score: float | int = option(0.0, "--first-score", ANY_NUMBER, "initial value of every score")
    """Initial value of every score; 0 is a soft gate of one half."""
    beta_start: float | int = option(1.0, "--beta-start", NUMBER, "continuous sparsification: beta at step 0")
    """Continuous sparsification: beta at step 0; the soft gate is sigmoid(beta * score)."""
    beta_growth: float | int | None = option(
        None, "--beta-growth", NUMBER, "continuous sparsification: factor on beta per step", says="set by --max-steps"
    )
    """Continuous sparsification: factor on beta at every step while gates are soft. None: chosen so that beta would
    grow by a factor of 100,000 over `max_steps` (most gates are decided, and learning stops, about half way); if some
    steps are short, by that to the power of 2/3, since more of them can be taken; or, with `hard_from`, by a factor of
    5 until gates become hard."""
    hard_from: float | int = option(
        1.0, "--hard-from", NUMBER, "continuous sparsification: share of the steps after which gates are 0 or 1"
    )
    """Continuous sparsification: the share of `max_steps` after which gates are exactly 0 or 1 in the forward pass,
    with straight-through gradients and a learning rate that falls to 0. 1: never; gates then become hard only because
    beta grows, as published."""
    along_path: bool = option(
        False, "--along-path", None, "straight-through: score by integrated gradients while ever fewer gates are open"
    )
    """Straight-through: while ever fewer gates are open, multiply them by points between 0 and 1, so that scores are
    integrated gradients; see `masking/methods/straight_through.py`."""
    max_steps: int = option(400, "--max-steps --steps", whole(1), "maximum number of steps")
    """Maximum number of steps."""
    batch_size: int = option(16, "--batch-size", whole(1), "sequences per step")
    """Sequences per step."""
    short_until: float | int | None = option(
        None, "--short-until", NUMBER, "share of the steps that see only the beginnings of sequences",
        says=f"{SHORT_UNTIL} for single weights of rotary models and n-grams, else 0",
    )  # fmt: skip
    """The share of `max_steps` in which a step sees only the first `short_length` tokens of its sequences, and so takes
    a fraction of the time; the steps after that see all of them. None: 0.6 where this was found to cost nothing, else
    0; see `with_short_steps`."""
    short_length: int = option(24, "--short-length", whole(2), "how many tokens of a sequence those steps see")
    """How many tokens of a sequence the steps before `short_until` see."""
    stop_undecided: float | int = option(
        0.01, "--stop-undecided", NUMBER, "stop when undecided gates are fewer than this share of the open ones"
    )
    """Stop when there are fewer undecided gates (0.1 to 0.9) than this share of the open ones (above 0.9)."""
    recovery_steps: int = option(
        20, "--recovery-steps", whole(1), "a run whose loss jumped must recover this many steps before its end"
    )
    """A run whose CE jumped must recover at least this many steps before its end."""
    retries: int = option(3, "--retries", whole(0), "how often to retry an unstable run with another data order")
    """How often to retry an unstable run with another data order."""
    polish: int = option(
        0, "--polish", whole(0), "passes in which single weights are dropped and re-admitted as the measured loss says"
    )
    """Most passes of `polish` over the finished mask, on four batches of text: single weights are dropped and
    re-admitted as long as the measured loss says that it pays. 0: none. Only where gates govern single weights."""
    worst_case: int = option(
        0, "--worst-case", whole(0), "learn masks that withstand the worst case: ascent steps of an adversary per step"
    )
    """Ascent steps, at every step of learning, of an adversary that opens closed gates from random values to where that
    harms most: masks are learned to withstand whatever becomes of what they drop (`worst_case_ablation`). Each costs a
    forward and backward pass, so 1 about doubles the time. The recorded cross-entropies are then those under the
    adversary. 0: no adversary, as published. Only sensible where the full model itself does what the target asks."""
    low_memory: bool = option(False, "--low-memory", None, "use less memory, at some cost in time")
    """Use less memory, at some cost in time: scores and moments are stored as bfloat16, and the activations of a block
    are recomputed in the backward pass."""
    seed: int = option(0, "--seed", whole(0), "seed of the data order")
    """Seed of the data order; attempt k uses seed + k * 1,000,003."""

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        self._check_units()
        self._check_granularity()
        limits: dict[str, tuple[Callable[[Any], bool], str]] = {
            "layers": (lambda v: v is None or all(_is_whole(one, 0) for one in v), "layers, whole numbers from 0"),
            "sparsity_weight": (lambda v: 0 <= v < math.inf, "a number of at least 0"),
            "target_fraction": (lambda v: v is None or 0 < v <= 1, "above 0 and at most 1"),
            "learning_rate": (lambda v: v is None or 0 < v < math.inf, "above 0"),
            "weight_decay": (lambda v: 0 <= v < math.inf, "at least 0"),
            "first_score": (math.isfinite, "a finite number"),
            "beta_start": (lambda v: 0 < v < math.inf, "above 0"),
            "beta_growth": (lambda v: v is None or 1 <= v < 2, "from 1 to below 2"),
            "hard_from": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
            "along_path": (lambda v: isinstance(v, bool), _YES_OR_NO),
            "second_moment_decay": (lambda v: 0 < v < 1, "above 0 and below 1"),
            "max_steps": (lambda v: _is_whole(v, 1), "a whole number of at least 1"),
            "batch_size": (lambda v: _is_whole(v, 1), "a whole number of at least 1"),
            "short_until": (lambda v: v is None or 0 <= v <= 1, "from 0 to 1"),
            "short_length": (lambda v: _is_whole(v, 2), "a whole number of at least 2"),
            "stop_undecided": (lambda v: 0 <= v < 1, "from 0 to below 1"),
            "recovery_steps": (lambda v: _is_whole(v, 1), "a whole number of at least 1"),
            "retries": (lambda v: _is_whole(v, 0), "a whole number of at least 0"),
            "polish": (lambda v: _is_whole(v, 0), "a whole number of at least 0"),
            "worst_case": (lambda v: _is_whole(v, 0), "a whole number of at least 0"),
            "low_memory": (lambda v: isinstance(v, bool), _YES_OR_NO),
            "seed": (lambda v: _is_whole(v, 0), "a whole number of at least 0"),
        }
        _check(self, limits)
        if self.polish and "weight" not in self.unit_of.values():
            given = shown(self.granularity)
            raise ValueError(f"polish changes single weights, but granularity {given} has no gates of them")
        if self.polish and self.worst_case:
            raise ValueError(
                "polish weighs single weights with the rest at 0, which undoes what worst_case learns: leave one out"
            )
        METHODS[self.method].check_config(self)

    def _check_units(self) -> None:
        if isinstance(self.units, str):
            object.__setattr__(self, "units", (self.units,))
        units = self.units
        if units is not None and (
            not units or len(set(units)) < len(units) or not all(isinstance(one, str) and one for one in units)
        ):
            raise ValueError(f"units must be different names of units or hook points, not {shown(units)}")
        _check_choice("replace", self.replace, REPLACEMENTS)
        if units is None and self.replace != "zero":
            raise ValueError(f"replace={self.replace!r} is of nodes, but the recipe masks weights: give units (--unit)")
        if units is not None and "weight" not in units and self.granularity != "weight":
            raise ValueError(
                f"granularity is of weights, but units {', '.join(units)} has none: add weight to them, or leave it out"
            )
        if units is not None and self.polish:
            raise ValueError("polish changes single weights alone, but the recipe asks for nodes (units)")

    def _check_granularity(self) -> None:
        if isinstance(self.granularity, str):
            _check_choice("granularity", self.granularity, UNITS)
            return
        if not isinstance(self.granularity, Mapping):
            raise ValueError(f"granularity must be a unit, or a dict of units by component, not {self.granularity!r}")
        if not self.granularity:
            raise ValueError("granularity must name at least one component: attn or mlp")
        for component, unit in self.granularity.items():
            _check_choice("a component of granularity", component, ("attn", "mlp"))
            _check_choice(f"granularity of {component}", unit, [u for u, has in UNITS.items() if component in has])

    @property
    def unit_of(self) -> dict[str, str]:
        """The unit of a gate, by component; components left out are kept whole."""
        if isinstance(self.granularity, str):
            return dict.fromkeys(UNITS[self.granularity], self.granularity)
        return dict(self.granularity)

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Upgrade values written by version 0.2.0 or earlier: every step saw entire sequences."""
        return {"short_until": 0, **values}

    def with_short_steps(self, context_length: int | None, positions: str) -> SparsifyConfig:
        """The recipe with its share of short steps as a number, for a target and a model.

        By default there are some for single weights with gates that only beta hardens, if the target looks back a few
        tokens only, as n-grams do (a target that depends on all tokens before needs whole sequences: KL rises by up to
        45% without them), and positions are rotary (with learned embeddings of positions, those of later ones would
        not be seen).

        Args:
            context_length: The number of last tokens that the target's distributions depend on; None: all.
            positions: The model's `cfg.positional_embedding_type`.
        """
        if self.short_until is not None:
            return self
        of_weights = self.units is None and set(self.unit_of.values()) == {"weight"}
        is_soft = self.method == "continuous_sparsification" and self.soft_steps is None
        looks_back_little = context_length is not None and 4 * context_length <= self.short_length
        is_safe = of_weights and is_soft and looks_back_little and positions == "rotary"
        return replace(self, short_until=SHORT_UNTIL if is_safe else 0)

    @property
    def short_steps(self) -> int:
        """The number of steps that see only the beginnings of sequences."""
        return round((self.short_until or 0) * self.max_steps)

    @property
    def soft_steps(self) -> int | None:
        """Continuous sparsification: the number of steps with soft gates, after which they are hard; None: all."""
        # at least one: hard gates at a score of 0 are closed, all of them, and would never open
        return None if self.hard_from == 1 else max(1, round(self.hard_from * self.max_steps))

    @classmethod
    def paper(cls, **changes: Any) -> SparsifyConfig:
        """The recipe of Chang and Bergen 2025, for sequences of 128 tokens; `changes` override fields."""
        published = cls(
            learning_rate=5e-5, weight_decay=0.01, second_moment_decay=0.999, first_score=0.0,
            beta_start=1.0, beta_growth=1.001,
            max_steps=15_000, batch_size=32, short_until=0, stop_undecided=0.01, recovery_steps=100, retries=3,
        )  # fmt: skip
        return replace(published, **changes)


RECIPES: Mapping[str, Callable[..., SparsifyConfig]] = {"default": SparsifyConfig, "paper": SparsifyConfig.paper}
"""Named recipes to start from: ours, and the published one."""

EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"max_steps": 200},
    "normal": {},
    "thorough": {"max_steps": 1000, "hard_from": 0.3},
}
"""How much effort our recipe makes, as the options that differ from its defaults. `quick` takes about half as many
steps, for a first look. `thorough` takes about five times as many, most of them with hard gates, which pays where soft
gates find something that is lost when they become 0 or 1 (docs/method.md has numbers)."""


def for_nodes(target_fraction: float | int | None, units: Iterable[str]) -> dict[str, Any]:
    """The options of our recipe for nodes that differ from its defaults.

    There are far fewer nodes than weights, and most of them matter a little. AdamW moves all scores at the same speed,
    so it hardly ranks them in a few hundred steps; straight-through adds up what each contributes. Without a share to
    keep, gates are 0 or 1 from half of the steps on.

    What takes the place of edges is the mean: of a reader that reads from one writer alone, as in the first block, a
    norm would undo whatever a gate does between 0 and 1 if the rest were zero.
    """
    exact = {"method": "straight_through", "max_steps": 200, "along_path": True}
    size: dict[str, Any] = {"hard_from": 0.5} if target_fraction is None else exact
    return size | ({"replace": "mean"} if "edge" in units else {})


# --- model, text and target by name ---


@dataclass(frozen=True)
class Inputs(Record):
    """Names of model, text and target, from which they can be rebuilt."""

    model: str = option("reference", "model", TEXT, "'reference', a hub id, or a folder")
    """`reference`, a hub id, or a folder."""
    revision: str | None = option(None, "--revision", Kind(str, "R"), "revision of a hub model, for example step1000")
    """Revision of a hub model."""
    dtype: str = option("float32", "--dtype", TEXT, "precision of the model's weights", choices=lambda: DTYPES)
    """Precision of the model's weights."""
    corpus: str = option(
        "reference", "--corpus", Kind(str, "SOURCE"), "'reference', a file or folder of text, or a dataset"
    )
    """`reference`, a file or folder of text, or a dataset."""
    context_length: int | None = option(None, "--context-length", whole(2), "tokens per sequence", says="128")
    """Tokens per sequence; None: 128."""
    max_tokens: int | None = option(None, "--max-tokens", whole(1), "read at most this many tokens", says="all")
    """Read at most this many tokens of the text."""
    target: str = option(
        "ngram", "--target", TEXT,
        "what to reproduce: the n-gram table, the full model's own distribution, the next token, or the model's "
        "induced bigram", choices=lambda: map(spelled, TARGETS),
    )  # fmt: skip
    """Name of the target."""
    order: int = option(
        2, "--order", whole(1), "order of the n-gram target: 1, 2 or 3; with --index, any of at least 1"
    )
    """Order of the n-gram target."""
    index: str | None = option(
        None, "--index", Kind(str, "INDEX"), "look the n-gram target up in an index of a larger corpus instead of "
        "counting the text: files or a folder of tokengrams or infini-gram, or infini-gram:NAME, an index of its "
        "public service", says="count the text",
    )  # fmt: skip
    """An index of a corpus in which n-grams are looked up; None: they are counted in the training text."""
    task: str | None = option(
        None, "--task", Kind(str, "FILE"), "reproduce the answers of a task instead: JSON lines with prompt and answer "
        "(and, if wanted, wrong and counterfactual), which are also the text",
    )  # fmt: skip
    """A file of a task, which takes the place of text and target."""
    measure: str = option(
        "loss", "--measure", TEXT, "of a task: make its answers likely, prefer right to wrong ones, or keep the "
        "model's own distribution", choices=lambda: MEASURES,
    )  # fmt: skip
    """What masks are asked for at the answers of a task: one of `MEASURES`."""
    force: bool = option(False, "--force", None, "go on although the full model is not shown to do the task")
    """Go on although the full model is not shown to do the task better than guessing."""
    text_column: str = option("text", "--text-column", TEXT, "field or column that holds the text of a record")
    """The field that holds the text, in JSON, tables and datasets."""
    held_out: float | int | None = option(
        None, "--held-out", NUMBER, "share of the documents to hold out for evaluation",
        says=f"{HELD_OUT}, of a task's rows {HELD_OUT_ROWS}",
    )  # fmt: skip
    """Share of the documents, or of a task's rows, to hold out for evaluation; None: 0.05, of a task's rows 0.3."""
    bos: str | None = option(
        None, "--bos", TEXT,
        "where to put a BOS: at the start of every sequence and document, of every document, or nowhere; 'earlier' is "
        "as version 0.1.0 did", choices=lambda: BOS, says="as the tokenizer does: at every start, or none",
    )  # fmt: skip
    """Where a BOS is put; None: at the start of every sequence and document if the tokenizer puts one before a text."""
    unchecked: bool = option(
        False, "--unchecked", None, "go on although the hooked model computes other logits than plain Hugging Face"
    )
    """Go on although the hooked model computes other logits than the plain Hugging Face model (`check=False` of
    `load_model`)."""

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("target", self.target, tuple(map(spelled, TARGETS)))
        if self.bos is not None:
            _check_choice("bos", self.bos, BOS)
        _check(
            self,
            {
                "order": (
                    lambda v: _is_whole(v, 1) and (v <= 3 or self.index is not None),
                    "1, 2 or 3 (or more with an index)",
                ),
                "index": (lambda v: v is None or (isinstance(v, str) and bool(v)), "the path or name of an index"),
                "context_length": (lambda v: v is None or _is_whole(v, 2), "a whole number of at least 2"),
                "max_tokens": (lambda v: v is None or _is_whole(v, 1), "a whole number of at least 1"),
                "held_out": (lambda v: v is None or 0 < v < 1, "a share of the documents, above 0 and below 1"),
                "text_column": (lambda v: isinstance(v, str) and bool(v), "the name of a field"),
                "force": (lambda v: isinstance(v, bool), _YES_OR_NO),
            },
        )
        _check_choice("measure", self.measure, MEASURES)
        if self.index is not None and self.target != "ngram":
            raise ValueError(f"an index holds n-grams: leave it out with the target {self.target}")
        if self.task is None:
            if (self.measure, self.force) != ("loss", False):
                raise ValueError("measure and force belong to a task: give its file (--task)")
            return
        for name in ("corpus", "target", "order", "index", "context_length", "max_tokens", "text_column"):
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"a task brings its own text and target: leave {name} out")

    @property
    def share_held_out(self) -> float | int:
        """`held_out`, or its default."""
        if self.held_out is not None:
            return self.held_out
        return HELD_OUT if self.task is None else HELD_OUT_ROWS

    @property
    def target_words(self) -> tuple[str, str]:
        """The name of the target and a phrase that describes it."""
        if self.task is None:
            kind = TARGETS[self.target.replace("-", "_")]
            where = "" if self.index is None else f" (looked up in {name_of_file(self.index)})"
            return kind.label(self.order), f"{kind.meaning(self.order)}{where}"
        name = name_of_file(self.task)
        return name, f"{MEASURES[self.measure].meaning} the task {name}"

    @property
    def plain_target(self) -> tuple[str, str]:
        """The target without jargon: phrases that complete "enough to ..." and "predictions that agree with ..."."""
        if self.task is None:
            kind = self.kind_of_target
            return kind.does(self.order), kind.like(self.order)
        meaning = self.target_words[1]
        return f"reproduce {meaning}", meaning

    @property
    def kind_of_target(self) -> Any:
        """The entry of `TARGETS`."""
        return TARGETS[self.target.replace("-", "_")]

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Upgrade values written by version 0.1.0: it never put a BOS, and model and corpus were nested records."""
        values = {"bos": "earlier", **values}
        model, corpus = values.get("model"), values.get("corpus")
        if not isinstance(model, dict) or not isinstance(corpus, dict):
            return values
        rest = {name: value for name, value in values.items() if name not in ("model", "corpus")}
        return {
            **rest,
            **{("model" if name == "name" else name): value for name, value in model.items()},
            **{("corpus" if name == "source" else name): value for name, value in corpus.items()},
        }


def name_of_file(path: str) -> str:
    """The name of a task's file, without folder and endings."""
    return PurePath(path).name.partition(".")[0]


def spelled(name: str) -> str:
    """The command-line spelling of a module name."""
    return name.replace("_", "-")


# --- what is done besides ---

CHECKS_OF_MEMORY = ("strict", "warn", "off")


@dataclass(frozen=True)
class StudyOptions(Record):
    """What `study` does besides finding a subnetwork."""

    recipe: str = option("default", "--recipe", TEXT, "recipe whose options are the defaults", choices=lambda: RECIPES)
    """The recipe to start from: `default` (ours) or `paper` (the published one)."""
    effort: str = option("normal", "--effort", TEXT, "how many steps our recipe takes", choices=lambda: EFFORTS)
    """How much effort our recipe makes: one of `EFFORTS`. Options that are given themselves take precedence."""
    sparsity_weights: tuple[float | int, ...] | None = option(
        None, "--sparsity-weights", NUMBERS, "find nested subnetworks along these weights", says="one subnetwork"
    )
    """Find nested subnetworks along these weights of the penalty instead of a single one."""
    seeds: int = option(
        1, "--seeds", whole(1), "learn with so many seeds, and say how much they differ; one is then analysed"
    )
    """With how many seeds masks are learned, from the recipe's on. Of several, the one whose cross-entropy is the
    median is analysed, and everything is stated with its spread over them."""
    random_seeds: int = option(3, "--random-seeds", whole(1), "number of matched random controls")
    """Number of matched random controls."""
    analysis: bool = option(True, "--no-analysis", None, "stop after the evaluation")
    """Whether to analyse the subnetwork after the evaluation."""
    falsify: bool = option(
        False, "--falsify", None,
        "also try to refute it, at equal size: re-initialised weights, a nonsense target, other seeds; then rivals and "
        "the worst case (20 more rounds of learning)",
    )  # fmt: skip
    """Whether to try to refute the finding."""
    falsify_seeds: int = option(3, "--falsify-seeds", whole(2), "other seeds of --falsify, two rounds of learning each")
    """Number of other seeds with which `falsify` repeats the recipe, on the trained model and on re-initialised
    blocks."""
    check_memory: str = option(
        "warn", "--check-memory", TEXT, "if the memory forecast does not fit: refuse, warn, or make no forecast",
        choices=lambda: CHECKS_OF_MEMORY,
    )  # fmt: skip
    """What to do if the memory forecast does not fit; see `MemoryForecast.check`."""

    def __post_init__(self) -> None:
        _check_choice("recipe", self.recipe, RECIPES)
        _check_choice("effort", self.effort, EFFORTS)
        if self.recipe != "default" and self.effort != "normal":
            raise ValueError(f"effort is an option of our own recipe, not of {self.recipe!r}: leave one of the two out")
        _check_choice("check_memory", self.check_memory, CHECKS_OF_MEMORY)
        limits: dict[str, tuple[Callable[[Any], bool], str]] = {
            "seeds": (lambda v: _is_whole(v, 1), "a whole number of at least 1"),
            "random_seeds": (lambda v: _is_whole(v, 1), "a whole number of at least 1"),
            "analysis": (lambda v: isinstance(v, bool), _YES_OR_NO),
            "falsify": (lambda v: isinstance(v, bool), _YES_OR_NO),
            "falsify_seeds": (lambda v: _is_whole(v, 2), "a whole number of at least 2"),
            "sparsity_weights": (
                lambda v: v is None or (not isinstance(v, str) and all(0 <= one < math.inf for one in v)),
                "numbers of at least 0",
            ),
        }
        _check(self, limits)
        if self.sparsity_weights is not None and len(set(self.sparsity_weights)) < 2:
            raise ValueError(
                f"sparsity_weights must be at least two different numbers, not {list(self.sparsity_weights)}"
            )
        if self.sparsity_weights is not None and self.seeds > 1:
            raise ValueError(f"sparsity_weights find one path, of one seed: leave out seeds ({self.seeds})")


# --- all of it, and the command that asks for it ---


@dataclass(frozen=True)
class Request:
    """All options of a study."""

    inputs: Inputs
    """Model, text and target."""
    config: SparsifyConfig
    """How masks are learned."""
    options: StudyOptions
    """Everything else."""

    @classmethod
    def of(cls, **given: Any) -> Request:
        """Build a request from option values by field name; those not given, or None, take their defaults.

        Raises:
            ValueError: If there is no such option, or a value is not allowed.
        """
        known = {name for part in PARTS for name in options_of(part)}
        unknown = [name for name in given if name not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no option {unknown[0]!r}: there are {', '.join(sorted(known))}{meant}")
        some = {name: value for name, value in given.items() if value is not None}
        inputs = Inputs(**{name: some[name] for name in options_of(Inputs) if name in some})
        options = StudyOptions(**{name: some[name] for name in options_of(StudyOptions) if name in some})
        changes = {name: some[name] for name in options_of(SparsifyConfig) if name in some}
        if options.sparsity_weights is not None and changes.keys() & {"sparsity_weight", "target_fraction"}:
            raise ValueError("sparsity_weights cannot be combined with sparsity_weight or target_fraction")
        ours = EFFORTS[options.effort]
        if changes.get("units") and options.recipe == "default" and options.effort == "normal":
            ours = {} if "method" in changes else for_nodes(changes.get("target_fraction"), changes["units"])
        return cls(inputs, RECIPES[options.recipe](**{**ours, **changes}), options)

    def command(self) -> str:
        """The `bigram-circuits find` command for this request."""
        start, changes = self._recipe()
        options = {**_changed(replace(self.options, recipe="default", effort="normal")), **start}
        given = {**_changed(self.inputs), **changes, **options}
        words = ["bigram-circuits", "find"]
        for part in PARTS:
            for name, one in options_of(part).items():
                if name in given:
                    words += _words(one, given[name])
        return shlex.join(words)

    def _recipe(self) -> tuple[dict[str, str], dict[str, Any]]:
        """The closest named recipe or effort, as options, and the options that differ from it."""
        starts: list[tuple[dict[str, str], SparsifyConfig]] = [({}, SparsifyConfig())]
        starts += [({"recipe": name}, make()) for name, make in RECIPES.items() if name != "default"]
        starts += [({"effort": name}, SparsifyConfig(**own)) for name, own in EFFORTS.items() if own]
        found = [(start, _differences(self.config, base)) for start, base in starts]
        return min((one for one in found if None not in one[1].values()), key=lambda one: len(one[1]))


PARTS = (Inputs, SparsifyConfig, StudyOptions)
"""The dataclasses that define options, in the order in which a command lists them."""


NOT_FOR_REPRODUCE = frozenset(
    {"model", "revision", "target", "order", "index", "sparsity_weight", "target_fraction", "recipe"}
    | {"sparsity_weights"}
    | {"task", "measure", "force"}
    | {"seeds", "random_seeds", "analysis", "falsify", "falsify_seeds"}
)
"""The options of `find` that `reproduce` does not take, since a paper sets them, or takes in another form."""

NOT_FOR_LADDER = frozenset(
    {"target", "order", "index", "task", "measure", "force", "target_fraction", "sparsity_weights"}
    | {"seeds", "random_seeds", "analysis", "falsify", "falsify_seeds"}
)
"""The options of `find` that `ladder` does not take: it has targets of its own, and sizes that are not fixed."""

NOT_FOR_CURVES = frozenset(
    {"target_fraction", "sparsity_weights", "polish", "seeds", "random_seeds", "analysis", "falsify", "falsify_seeds"}
)
"""The options of `find` that `curves` does not take: it has sizes, controls and measures of its own."""


def _changed(instance: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    return {
        one.name: getattr(instance, one.name)
        for one in fields(instance)
        if one.default is not MISSING and getattr(instance, one.name) != one.default
    }


def _differences(config: SparsifyConfig, base: SparsifyConfig) -> dict[str, Any]:
    return {
        one.name: getattr(config, one.name)
        for one in fields(config)
        if getattr(config, one.name) != getattr(base, one.name)
    }


def _words(one: Option, value: Any) -> list[str]:
    """An option and its value as arguments of a command."""
    if one.kind is None:
        return [one.flag]
    text = one.kind.write(value)
    if text.startswith("-"):  # a separate argument that starts with a dash would be read as an option
        return [f"{one.flag}={text}"]
    return [text] if not one.flag.startswith("-") else [one.flag, text]
