"""What may be wrong with model, text and target, found before learning: in seconds, and in words.

None of it is an error, since a deliberately small text or an untrained model may be what is studied. `study` checks,
warns, and records what it found with the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer

from bigram_circuits.evaluation import OWN_BEHAVIOUR, measure
from bigram_circuits.measures.statistics import surprisals
from bigram_circuits.measures.words import listed, percent
from bigram_circuits.models.activations import batch_size_for, check_tokens, lean_forward, predicts_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs import InputCheck
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import kl_of_best_constant, target_of
from bigram_circuits.tasks.target import TaskTarget
from bigram_circuits.tasks.task import ability
from bigram_circuits.text.corpus import Corpus, hash_of_tokenizer, in_order, spread
from bigram_circuits.text.coverage import ContextCoverage, context_coverage, count_tokens
from bigram_circuits.text.ngrams import NGramTable
from bigram_circuits.text.tokenizers import joined_pieces, pieces_of_characters, shown_tokens, unknown_token

MOST_INEXPRESSIBLE = 0.1
"""Share of tokens that stand for text the model has no tokens for, from which it is said. Common corpora with `<unk>`
have 3% to 5% of them, and texts in the languages of a tokenizer hardly any pieces of characters."""
MOST_RARE = 0.25
"""Share of held-out positions whose context the training text has at most once, from which it is said: there the target
is a shorter n-gram, or a single observation."""
LEAST_USED = 0.5
"""Share of held-out positions that the zero-probability rule must leave, for r to describe more than it leaves out."""
FEWEST_SEQUENCES = 10
"""Held-out sequences below which a bootstrap over sequences has too few to draw from."""
MOST_FREQUENT = 0.5
"""Share of one token from which it is said. The most frequent word or subword of a text has 3% to 10%, and of single
bytes, the space less than 20%."""
_SEQUENCES = 16  # held-out sequences that the model's loss is measured on: forward passes of one step of learning
_TOKENS = 1 << 18  # tokens at most that an example is looked for in, or target probabilities are looked up of
_EXAMPLE = 24  # tokens of an example
_NGRAMS = {1: "unigram", 2: "bigram", 3: "trigram"}


class InputWarning(UserWarning):
    """Model, text and target may not fit together, or the text may be too small.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", bc.InputWarning)  # stop a study of inputs that do not fit
    """


@uses_model
def check_inputs(model: Model, target: Any, corpus: Corpus, config: SparsifyConfig | None = None) -> InputCheck:
    """Look for what would make learning a waste: a text that does not fit the model, or is too small for its target.

    `study` and `bigram-circuits find` do this before learning; call it yourself before `find_subnetwork`. It costs a
    pass over the text, and forward passes over at most 16 held-out sequences.

    Args:
        model: As for `find_subnetwork`.
        target: As for `find_subnetwork`; an `NGramTable` is compared with the text.
        corpus: As for `find_subnetwork`.
        config: As for `find_subnetwork`.

    Returns:
        What was measured, and a sentence about everything that may be wrong; nothing is printed.

    Raises:
        ValueError: If model, text and target do not fit together at all.

    Example:
        >>> for warning in bc.check_inputs(model, target, corpus).warnings:
        ...     print(warning)
    """
    config, target = config or SparsifyConfig(), target_of(target, model)
    for part in (corpus.train, corpus.held_out):
        if len(part):
            check_tokens(model, part)
    if isinstance(target, TaskTarget):
        return _of_task(model, target, corpus, config)
    counts = count_tokens(corpus.train, model.cfg.d_vocab)
    ids = _inexpressible_ids(model.tokenizer, corpus)
    table = target if isinstance(target, NGramTable) else None
    found = InputCheck(
        inexpressible=None if ids is None else int(counts[ids].sum()) / int(counts.sum()),
        contexts=table and _contexts(table, corpus),
        used=table and _used(table, corpus),
        losses=_losses(model, corpus, counts),
    )
    says = [
        *_about_attention(model),
        *_about_tokens(found, model.tokenizer, corpus, ids),
        *_about_loss(found),
        *_about_frequency(model.tokenizer, counts),
        *_about_contexts(found, table, corpus),
        *_about_size(corpus, config),
        *_about_worst_case(model, target, corpus, config),
    ]
    return replace(found, warnings=tuple(says))


def _of_task(model: Model, target: TaskTarget, corpus: Corpus, config: SparsifyConfig) -> InputCheck:
    """What may be wrong with a task: the full model cannot do it, or there are few rows."""
    able = ability(model, target.task)
    says = [*_about_tokenizer(model.tokenizer, corpus), *_about_rows(corpus, config)]
    return InputCheck(ability=able, warnings=tuple(says if able.able else [str(able), *says]))


def warn_of(check: InputCheck) -> None:
    """Emit each warning of a check as an `InputWarning`."""
    for line in check.warnings:
        warnings.warn(line, InputWarning, stacklevel=3)


# --- does the model predict the next token? ---


def _about_attention(model: Model) -> Iterator[str]:
    if predicts_tokens(model) and getattr(model.cfg, "attention_dir", "causal") != "causal":
        yield (
            "the model attends to later tokens (attention_dir), so it can read the next token instead of predicting "
            "it: its surprisals say nothing of prediction"
        )


# --- has the model tokens for the text? ---


def _inexpressible_ids(tokenizer: Any, corpus: Corpus) -> Integer[np.ndarray, " token"] | None:
    """The tokens that stand for text without tokens of its own; None if the corpus is not of this tokenizer."""
    if tokenizer is None or corpus.tokenizer_hash != hash_of_tokenizer(tokenizer):
        return None
    unknown = unknown_token(tokenizer)
    ids = pieces_of_characters(tokenizer) | (set() if unknown is None else {unknown})
    return np.array(sorted(ids), dtype=np.int64)


def _about_tokens(
    found: InputCheck, tokenizer: Any, corpus: Corpus, ids: Integer[np.ndarray, " token"] | None
) -> Iterator[str]:
    yield from _about_tokenizer(tokenizer, corpus)
    if ids is not None and (found.inexpressible or 0.0) >= MOST_INEXPRESSIBLE:
        yield (
            f"{percent(found.inexpressible)} of the text's tokens stand for what the model's tokenizer has no tokens "
            f"for, for example {_example(tokenizer, corpus, ids)}: give a text in the language, script and format "
            "that the model was made for"
        )


def _about_tokenizer(tokenizer: Any, corpus: Corpus) -> Iterator[str]:
    if tokenizer is not None and corpus.tokenizer_hash not in ("none", hash_of_tokenizer(tokenizer)):
        yield (
            "the text was tokenised by another tokenizer than the model's, so its tokens mean something else to the "
            "model: load it with tokenizer=model.tokenizer"
        )


def _example(tokenizer: Any, corpus: Corpus, ids: Integer[np.ndarray, " token"]) -> str:
    """Words, or a few characters, that a tokenizer has no tokens for."""
    if corpus.without_token:
        return listed([repr(word) for word in corpus.without_token])
    rows = spread(corpus.train, _TOKENS)
    is_one = np.isin(rows, ids)
    row = int(is_one.sum(1).argmax())
    first = int(is_one[row].argmax())
    return repr(joined_pieces(tokenizer, rows[row, first : first + _EXAMPLE].tolist()))


# --- does the model know anything of the text? ---


def _losses(model: Model, corpus: Corpus, counts: Integer[np.ndarray, " d_vocab"]) -> tuple[float, float] | None:
    """Next-token loss of the model and of the training text's unigram distribution, on the same held-out positions.

    These are the positions of at most 16 sequences whose next token is in the training text. None if there are none, or
    the model's loss is not finite, which learning reports.
    """
    if not len(corpus.held_out) or corpus.context_length < 2 or not predicts_tokens(model):
        return None
    tokens = spread(corpus.held_out, _SEQUENCES * corpus.context_length)
    following = tokens[:, 1:]
    known = counts[following] > 0
    with torch.no_grad(), lean_forward(model):
        batches = [batch.to(model.cfg.device) for batch in in_order(tokens, batch_size_for(model, tokens.shape[1]))]
        own = np.concatenate([surprisals(model(batch), batch).double().cpu().numpy() for batch in batches])[known]
    if not own.size or not np.isfinite(own).all():
        return None
    unigram = np.log(counts.sum()) - np.log(counts[following][known])
    return float(own.mean()), float(unigram.mean())


def _about_loss(found: InputCheck) -> Iterator[str]:
    if found.losses is not None and found.losses[0] > found.losses[1]:
        own, unigram = found.losses
        yield (
            f"the model knows nothing of this text: its next-token loss is {own:.2f} nats on held-out text, that of "
            f"the training text's token frequencies alone {unigram:.2f}; give a text of the kind that the model was "
            "trained on, and look at the start of its sequences (--bos) and at its weights"
        )


def _about_worst_case(model: Model, target: Any, corpus: Corpus, config: SparsifyConfig) -> Iterator[str]:
    """Whether masks shall withstand the full model's own parts although it does something else than the target.

    It does if its KL from the target is above 10% of that of the best constant prediction: it then recovers less than
    90% of what the context tells. Nothing is said of targets without a distribution.
    """
    if not config.worst_case or not len(corpus.held_out):
        return
    tokens = spread(corpus.held_out, _SEQUENCES * corpus.context_length)
    full = measure(model, Subnetwork.full(model), target, tokens).faithfulness.kl
    constant = kl_of_best_constant(target, tokens)
    if full > (1 - OWN_BEHAVIOUR) * constant:
        yield (
            f"the full model does something else than the target: its KL is {full:.2f} nats on held-out text, that of "
            f"the best constant {constant:.2f}; masks that withstand whatever becomes of the rest (--worst-case) "
            "cannot be learned for it: leave that out, or take a target that the model reproduces (--target model)"
        )


# --- is there enough text? ---


def _about_frequency(tokenizer: Any, counts: Integer[np.ndarray, " d_vocab"]) -> Iterator[str]:
    most = int(counts.argmax())
    share = int(counts[most]) / int(counts.sum())
    if share >= MOST_FREQUENT:
        token = f"token {most}" if tokenizer is None else f"token {most}, {shown_tokens(tokenizer, [most])[0]!r}"
        yield (
            f"{percent(share)} of the training text is a single {token}: if it is padding, give the attention mask "
            "(Corpus.from_tokens(..., mask=)), or else look at what was read (--text-column)"
        )


def _contexts(table: NGramTable, corpus: Corpus) -> ContextCoverage | None:
    """How often the table's contexts occur; None if it has none, or other ones than this training text."""
    if table.order == 1:
        return None
    found = context_coverage(corpus.train, corpus.held_out, table.order, d_vocab=table.d_vocab)
    return found if found and found.contexts == len(table.levels[-1].contexts) else None


def _used(table: NGramTable, corpus: Corpus) -> float | None:
    """Share of held-out positions where the table gives the next token a probability above 0."""
    if not len(corpus.held_out) or corpus.context_length < 2:
        return None
    tokens = spread(corpus.held_out, _TOKENS)
    return float(np.isfinite(table.surprisal(tokens).cpu().numpy()).mean())


def _about_contexts(found: InputCheck, table: NGramTable | None, corpus: Corpus) -> Iterator[str]:
    if table is None:
        return
    name = _NGRAMS[table.order]
    if table.order > corpus.context_length:
        yield (
            f"the target is a {name}, but sequences have {corpus.context_length} tokens, so that every position gets a "
            f"shorter n-gram: use longer sequences (--context-length), or a lower order (--order)"
        )
    contexts = found.contexts
    if contexts and contexts.held_out_unseen + contexts.held_out_once >= MOST_RARE:
        lower = f", or a lower order (--order {table.order - 1})" if table.order > 2 else ""
        yield (
            f"the training text is small for a {name}: {percent(contexts.held_out_unseen)} of the held-out positions "
            f"have a context that it does not have, {percent(contexts.held_out_once)} one that it has once "
            f"({contexts.once:,} of {contexts.contexts:,} contexts); give more text{lower}"
        )
    if found.used is not None and found.used < LEAST_USED:
        yield (
            f"the {name} gives the next token a probability above 0 at only {percent(found.used)} of the held-out "
            "positions, and r describes no others: give more text, or one whose parts are more alike"
        )


def _about_rows(corpus: Corpus, config: SparsifyConfig) -> Iterator[str]:
    n_train, n_held_out = len(corpus.train), len(corpus.held_out)
    if n_held_out < FEWEST_SEQUENCES:
        yield (
            f"the held-out part of the task has {n_held_out} rows, too few for intervals (a bootstrap over rows): give "
            "more rows, or a larger share (--held-out)"
        )
    if n_train < config.batch_size:
        yield (
            f"the training part of the task has {n_train} rows, fewer than a batch of {config.batch_size}, so that all "
            "steps see the same ones: give more rows, or use smaller batches (--batch-size)"
        )


def _about_size(corpus: Corpus, config: SparsifyConfig) -> Iterator[str]:
    n_train, n_held_out = len(corpus.train), len(corpus.held_out)
    if n_held_out < FEWEST_SEQUENCES:
        yield (
            f"the held-out part has {n_held_out} sequences of {corpus.context_length} tokens, too few for intervals "
            "(a bootstrap over sequences): give more text, a larger share (--held-out), or shorter sequences "
            "(--context-length)"
        )
    if n_train < config.batch_size:
        yield (
            f"the training part has {n_train} sequences, fewer than a batch of {config.batch_size}, so that all steps "
            "see the same ones: give more text, or use smaller batches (--batch-size)"
        )
