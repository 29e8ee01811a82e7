"""Which components write a prediction, and where heads attend, in the full model and in masked ones.

Direct logit attribution (Elhage et al. 2021, Wang et al. 2022, arXiv 2211.00593): the residual stream is the sum of
the embedding and the outputs of every attention and MLP, and the final norm is linear once its scale is frozen at the
value it takes on this prompt. So a logit is a sum of contributions, one for each component c,

    norm'(c) . W_U[:, answer],   norm'(c) = (c - mean(c)) w / scale  (LayerNorm),   c w / scale  (RMSNorm),

and a constant, `bias` (the norm's bias through W_U, and b_U). It is computed on the raw weights that masks apply to,
not on folded ones, and the sum is checked against the logit: a model without such a decomposition is refused. Logits
are those of the unembedding, before any soft cap or scale that the model applies. Contributions to a single logit
depend on a constant to which softmax is invariant; differences of two logits do not.

By head, the output of an attention is split into every head's z times its slice of W_O as used in the forward pass
(masked), and the output bias, `L0.attn bias`. If a norm follows the attention (Gemma 2, OLMo 2), its scale is frozen
too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import check_arguments, conditions, reduced_to
from bigram_circuits.analysis.prompts import Prompt, position_of, prompt_tokens, token_id, token_word, token_words
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import MaskLike
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Maps
from bigram_circuits.models.activations import (
    NotShownError,
    check_has_readout,
    check_predicts_tokens,
    readout,
    record,
)
from bigram_circuits.models.model import Model
from bigram_circuits.models.norms import frozen_norm
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import COMPONENTS, PartName, WeightName, head_label, in_block

_TOLERANCE = 1e-3  # of the largest term in the sum, in float32


@usual_order
@uses_model
def logit_attribution(
    model: Model,
    subnetwork: MaskLike | None = None,
    prompt: Prompt = "",
    *,
    answer: str | int | None = None,
    wrong: str | int | None = None,
    by: str = "component",
    position: int = -1,
    seed: int = 0,
) -> Maps:
    """The contribution of every component to the logit of an answer, in the full model and in the masked ones.

    Args:
        model: From `load_model`, on its raw weights (not in compatibility mode).
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        prompt: One text, or token ids [pos] or [1, pos]. A text begins with the BOS that the tokenizer puts there.
        answer: The token whose logit is decomposed, as text or id; by default the full model's prediction.
        wrong: A token to compare with: adds columns for its logit and for the difference.
        by: `component` (every attention and MLP), or `head` (every attention head instead of every attention).
        position: The position whose prediction is decomposed; negative counts from the end.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Maps` [contribution, condition, component, token]. Rows are components (`embed`, `L0.attn`, `L0.mlp`, `L0H1`),
        then `bias`; columns are tokens. `notes` has the logits themselves, which are the column sums.

    Raises:
        ValueError: If a token or position does not exist, the model is in compatibility mode, or its logit is not the
            sum of its components' contributions.

    Example:
        >>> written = analysis.logit_attribution(model, found, "import os", by="head")
        >>> written.to_dataframe()  # what every head and MLP adds to the logit of the prediction
    """
    if by not in ("component", "head"):
        raise ValueError(f"by must be one of component, head, not {by!r}")
    tokens = prompt_tokens(model, prompt)
    subnetwork, _ = check_arguments(model, subnetwork, seed=seed)
    place = position_of(position, tokens.shape[1])
    with torch.inference_mode():
        best = int(model(tokens)[0, place].argmax()) if answer is None else token_id(model, answer)
    word = token_word(model, best)
    named = {word: best}
    if wrong is not None:
        other = token_id(model, wrong)
        if other == best:
            raise ValueError(f"answer and wrong are the same token, {token_word(model, best)!r}")
        other_word = token_word(model, other)
        named = {word: best, other_word: other}
    terms: dict[str, dict[str, Tensor]] = {}
    logits: dict[str, list[float]] = {}
    for name, condition in conditions(subnetwork, seed=seed).items():
        with torch.inference_mode(), reduced_to(model, condition):
            terms[name], logits[name] = _contributions(model, tokens, place, list(named.values()), by)
    rows = list(terms["full"])
    values = np.array([[condition[row].tolist() for row in rows] for condition in terms.values()])
    columns = list(named)
    if wrong is not None:
        values = np.concatenate([values, values[:, :, :1] - values[:, :, 1:]], axis=2)
        columns.append(f"{columns[0]} minus {columns[1]}")
    words = token_words(model, tokens[0].tolist())
    return Maps(
        title=f"Direct logit attribution after {words[place]!r}",
        quantities=(Quantity("contribution", "logits", "Contribution of a component to the logit of the token."),),
        row_axis="component",
        rows=tuple(rows),
        column_axis="token",
        columns=tuple(columns),
        conditions=tuple(terms),
        values=values[None],
        notes={
            "prompt": words,
            "position": place,
            "logits": {name: dict(zip(named, of, strict=True)) for name, of in logits.items()},
            "seed": seed,
        },
    )


@usual_order
@uses_model
def attention_patterns(
    model: Model,
    subnetwork: MaskLike | None = None,
    prompt: Prompt = "",
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
) -> Maps:
    """Attention patterns on a prompt: attention from every position (rows) to every position up to it (columns).

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        prompt: One text, or token ids [pos] or [1, pos].
        heads: (layer, head) pairs; by default all heads of the model.
        seed: Seed of the matched random subnetwork.

    Returns:
        A panel for every condition and head, named like `full L0H1`; panels of the same head are adjacent.

    Raises:
        ValueError: If a head does not exist, or the model does not show its attention patterns.

    Example:
        >>> analysis.attention_patterns(model, found, "import os, sys", heads=[(0, 1)]).plot()
    """
    tokens = prompt_tokens(model, prompt)
    subnetwork, _ = check_arguments(model, subnetwork, seed=seed)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    chosen = [(layer, head) for layer in range(n_layers) for head in range(n_heads)] if heads is None else list(heads)
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in chosen):
        raise ValueError(f"heads must be (layer, head) pairs, not {chosen!r}")
    chosen = [(int(layer), int(head)) for layer, head in chosen]
    for layer, head in chosen:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"there is no head {head} in layer {layer}: layers are 0 to {n_layers - 1}, heads 0 to {n_heads - 1}"
            )
    if not chosen:
        raise ValueError("attention patterns need at least one head")
    points = {layer: in_block(layer, "attn.hook_pattern") for layer in sorted({layer for layer, _ in chosen})}
    patterns: dict[str, dict[int, Tensor]] = {}
    for name, condition in conditions(subnetwork, seed=seed).items():
        with torch.inference_mode(), reduced_to(model, condition):
            seen, _ = record(model, tokens, list(points.values()))
        patterns[name] = {layer: seen[point][0].float().cpu() for layer, point in points.items()}
        for layer, pattern in patterns[name].items():
            if pattern.shape != (n_heads, tokens.shape[1], tokens.shape[1]):
                raise NotShownError(
                    f"the attention pattern of layer {layer} has shape {tuple(pattern.shape)} per sequence"
                )
    panels = {
        f"{name} {head_label(layer, head)}": of[layer][head].numpy()
        for layer, head in chosen
        for name, of in patterns.items()
    }
    names = tuple(f"{i}: {word}" for i, word in enumerate(token_words(model, tokens[0].tolist())))
    return Maps(
        title="Attention patterns",
        quantities=(Quantity("attention", "share", "Attention from the row position to the column position."),),
        row_axis="from",
        rows=names,
        column_axis="to",
        columns=names,
        conditions=tuple(panels),
        values=np.stack(list(panels.values()))[None].astype(float),
        notes={"heads": [list(pair) for pair in chosen], "seed": seed},
    )


def _contributions(
    model: Model, tokens: Integer[Tensor, "1 pos"], place: int, ids: list[int], by: str
) -> tuple[dict[str, Float[Tensor, " token"]], list[float]]:
    """The contributions of every component to the logits of some tokens at one position, and these logits."""
    check_predicts_tokens(model)
    parts, final, logits = _components(model, tokens, place, by)
    check_has_readout(model, len(final))
    directions = model.W_U[:, ids].float()
    norm = frozen_norm(model, model.ln_final, final)
    terms = {name: norm.of(part) @ directions for name, part in parts.items()}
    constant = model.b_U[ids].float()
    terms["bias"] = constant if norm.bias is None else norm.bias @ directions + constant
    raw = model.unembed(model.ln_final(final[None, None].to(model.W_U.dtype)))[0, 0].float()
    total = torch.stack(list(terms.values())).sum(0)
    scale = float(torch.stack(list(terms.values())).abs().max())
    tolerance = max(_TOLERANCE, 16 * torch.finfo(model.W_U.dtype).eps)
    error = float((total - raw[ids]).abs().max())
    shown = readout(model, final[None].to(model.W_U.dtype))[0].float()
    error = max(error, float((shown - logits).abs().max()))
    if not error <= tolerance * max(scale, 1.0):
        raise NotShownError(
            f"the logits of this model are not the sum of its components' contributions: they differ by {error:.3g}"
        )
    return terms, raw[ids].tolist()


def _components(
    model: Model, tokens: Integer[Tensor, "1 pos"], place: int, by: str
) -> tuple[dict[str, Float[Tensor, " d_model"]], Float[Tensor, " d_model"], Float[Tensor, " d_vocab"]]:
    """What each component adds to the residual stream at one position, the final residual stream, and the logits."""
    blocks = range(model.cfg.n_layers)
    names = [in_block(0, "hook_resid_pre"), in_block(blocks[-1], "hook_resid_post")]
    there = {weight.part for weight in map(WeightName.parse, (site.name for site in weight_sites(model)))}
    written = [part for layer in blocks for kind in COMPONENTS if (part := PartName(kind, layer)) in there]
    names += [_output(part) for part in written]
    post_norms = [layer for layer in blocks if hasattr(model.blocks[layer], "ln1_post")]
    if by == "head":
        names += [in_block(part.layer, "attn.hook_z") for part in written if part.kind == "attn"]
        names += [in_block(layer, "ln1_post.hook_in") for layer in post_norms]
    embeddings = [name for name in ("embed.hook_out", "pos_embed.hook_out") if name in model.hook_dict]
    seen, logits = record(model, tokens, [*names, *embeddings])
    at = {name: value[0, place].float() for name, value in seen.items()}
    start = at[in_block(0, "hook_resid_pre")]
    parts = {"embed": start}
    both = [at[name] for name in embeddings if at[name].shape == start.shape]
    rounding = max(1e-5, 2 * torch.finfo(model.W_U.dtype).eps * float(start.abs().max()))
    if len(both) == 2 and torch.allclose(both[0] + both[1], start, atol=rounding):
        parts = {name.partition(".")[0]: at[name] for name in embeddings}
    for part in written:
        if by == "head" and part.kind == "attn":
            before_norm = at.get(in_block(part.layer, "ln1_post.hook_in"))
            parts |= _heads(model, part.layer, at[in_block(part.layer, "attn.hook_z")], before_norm)
        else:
            parts[part.label] = at[_output(part)]
    return parts, at[in_block(blocks[-1], "hook_resid_post")], logits[0, place].float()


def _output(part: PartName) -> str:
    """The hook point at which an attention or MLP writes to the residual stream."""
    return in_block(part.layer, f"hook_{part.kind}_out")


def _heads(
    model: Model, layer: int, z: Float[Tensor, "..."], before_norm: Float[Tensor, " d_model"] | None
) -> dict[str, Float[Tensor, " d_model"]]:
    """What each head of a block adds to the residual stream, and the output bias."""
    site = next(site for site in weight_sites(model) if site.name == str(WeightName(layer, "attn", "W_O")))
    W_O = site.from_stored(site.leaf.weight).float()  # type: ignore[arg-type] # masked, if there is a mask
    heads = torch.einsum("hd,hdm->hm", z.reshape(W_O.shape[:2]), W_O)
    bias_name = f"{PartName('attn', layer).label} bias"
    parts = {head_label(layer, head): out for head, out in enumerate(heads)}
    if (bias := getattr(site.leaf, "bias", None)) is not None:
        parts[bias_name] = bias.float()
    if before_norm is None:
        return parts
    norm = frozen_norm(model, model.blocks[layer].ln1_post, before_norm)
    parts = {name: norm.of(part) for name, part in parts.items()}
    if norm.bias is not None:
        parts[bias_name] = parts.get(bias_name, torch.zeros_like(before_norm)) + norm.bias
    return parts


# --- steps of `analyze` ---

_HEADS_SHOWN = 6


@in_suite("attribution")
def _(subject: Subject) -> Maps:
    return logit_attribution(subject.model, subject.subnetwork, subject.prompt, seed=subject.seed)


def _most_kept_heads(subject: Subject) -> list[tuple[int, int]]:
    """The heads with the most kept weights; of a circuit, the kept ones with the largest effects."""
    if isinstance(subject.subnetwork, Circuit):
        named = [PartName.parse(label) for label in subject.kept_nodes("head", _HEADS_SHOWN)]
        return sorted((name.layer, name.indices[0]) for name in named if name is not None)
    counts = {head: count.fraction for head, count in subject.subnetwork.by_head().items() if count.kept}
    return sorted(sorted(counts, key=lambda head: -counts[head])[:_HEADS_SHOWN])


@in_suite("attention")
def _(subject: Subject) -> Maps:
    """Attention patterns of the heads that keep most, from the first layer to the last."""
    heads = _most_kept_heads(subject)
    if not heads:
        raise NotShownError("nothing of any head is kept")
    return attention_patterns(subject.model, subject.subnetwork, subject.prompt, heads=heads, seed=subject.seed)
