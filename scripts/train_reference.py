"""Train the reference model: `python scripts/train_reference.py --out FOLDER`.

A byte-level BPE tokenizer and a GPT-NeoX language model (Pythia's architecture) are trained from scratch on the
running interpreter's documentation, and written as an ordinary Hugging Face folder with a model card. The shipped model
was trained with the defaults. The data order is seeded, so another run on the same Python version gives the same model
up to floating-point error (other versions word some of their documentation differently).

`--measure FOLDER` measures a trained folder again and rewrites its model card.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm, trange
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from bigram_circuits.measures.statistics import surprisals
from bigram_circuits.models.loading import load_model
from bigram_circuits.storage.files import write_text
from bigram_circuits.tasks.builtin import repeated_random_tokens
from bigram_circuits.tasks.task import Ability, ability
from bigram_circuits.text.corpus import Corpus, document_position, in_order, load_corpus
from bigram_circuits.text.counting import count_ngrams
from bigram_circuits.text.reference import reference_documents

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.05


def train_tokenizer(texts: list[str], d_vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (no unknown tokens) with one special token, end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def train_model(corpus: Corpus, args: argparse.Namespace) -> GPTNeoXForCausalLM:
    """Minimise the next-token loss with AdamW on randomly placed windows, with warm-up and cosine decay.

    Some rows of every batch are repeating sequences (`_repeated`). Their loss counts only where the next token follows
    from the repetition, so that the model learns induction from them and nothing else.
    """
    torch.manual_seed(args.seed)
    config = GPTNeoXConfig(
        vocab_size=args.d_vocab,
        hidden_size=args.d_model,
        num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 32,
        intermediate_size=4 * args.d_model,
        max_position_embeddings=args.context_length,
        hidden_dropout=args.dropout,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    stream = corpus.train.reshape(-1)
    n_text = args.batch - args.repeats
    steps = math.ceil(args.epochs * stream.size / (n_text * args.context_length))
    rng = np.random.default_rng(args.seed)
    window = np.arange(args.context_length)
    for step in (bar := trange(steps, desc="training")):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 100) * decay
        starts = rng.integers(0, stream.size - args.context_length + 1, size=n_text)
        repeated, counts = _repeated(rng, stream, args.repeats, args.context_length, args.d_vocab)
        tokens = torch.from_numpy(np.concatenate([stream[starts[:, None] + window], repeated]).astype(np.int64))
        weight = torch.from_numpy(np.concatenate([np.ones((n_text, args.context_length - 1)), counts])).float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
            logits = model(tokens).logits
        losses = surprisals(logits, tokens)
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            seen = weight[n_text:].bool()
            bar.set_postfix(
                text=f"{losses[:n_text].mean().item():.3f}", repeats=f"{losses[n_text:][seen].mean().item():.3f}"
            )
    model.config.hidden_dropout = 0.0
    return model.eval()


def _repeated(
    rng: np.random.Generator, stream: Integer[np.ndarray, " token"], rows: int, length: int, d_vocab: int
) -> tuple[Integer[np.ndarray, "row position"], Bool[np.ndarray, "row position_minus_1"]]:
    """Make sequences that repeat with a random period, and a mask of where the next token follows from the repetition.

    The rows alternate between a passage of the text, tokens of the text in random order, and uniformly random tokens.
    The goal is induction on random tokens, but from those alone the model does not learn it in this many steps.
    """
    period = int(rng.integers(4, length // 2 + 1))
    passages = stream[rng.integers(0, stream.size - period, size=rows)[:, None] + np.arange(period)]
    jumbled = stream[rng.integers(0, stream.size, size=(rows, period))]
    uniform = rng.integers(1, d_vocab, size=(rows, period))
    kind = np.arange(rows)[:, None] % 3
    once = np.where(kind == 0, passages, np.where(kind == 1, jumbled, uniform))
    tokens = np.tile(once, (1, -(-length // period)))[:, :length]
    known = np.broadcast_to(np.arange(1, length) > period, (rows, length - 1))
    return tokens, known


@dataclass(frozen=True)
class Losses:
    """The losses stated in the model card, in nats per token on held-out text."""

    model: float
    """The model's next-token loss at all positions."""
    model_where_seen: float
    """The model's loss where the bigram table gives the actual next token a probability above 0."""
    bigram_where_seen: float
    """The bigram table's loss at those positions (elsewhere it is infinite)."""
    bigram_mixed: float
    """Loss at all positions of the bigram table mixed with unigrams and the uniform distribution, with the mixture
    weights fitted to this same text: a lower bound on such a mixture's loss."""
    share_seen: float
    """Share of positions where the bigram probability is above 0."""
    repeats: Ability
    """How well it continues repeated random tokens."""


def measure(folder: Path) -> tuple[Any, Corpus, Losses]:
    """Load a trained model and measure its losses and the bigram table's on the held-out documents."""
    model = load_model(folder, device="cpu")
    corpus = load_corpus("reference", tokenizer=model.tokenizer, held_out=HELD_OUT, context_length=model.cfg.n_ctx)
    bigram = count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab)
    unigram = count_ngrams(corpus.train, 1, d_vocab=model.cfg.d_vocab)
    ours = []
    with torch.inference_mode():
        for tokens in tqdm(in_order(corpus.held_out, 32), total=-(-len(corpus.held_out) // 32), desc="measuring"):
            ours.append(surprisals(model(tokens), tokens))
    own = torch.cat(ours)
    theirs = bigram.surprisal(corpus.held_out)
    seen = theirs.isfinite()
    return (
        model,
        corpus,
        Losses(
            model=own.mean().item(),
            model_where_seen=own[seen].mean().item(),
            bigram_where_seen=theirs[seen].mean().item(),
            bigram_mixed=_best_mixture(theirs, unigram.surprisal(corpus.held_out), model.cfg.d_vocab),
            share_seen=seen.double().mean().item(),
            repeats=ability(model, repeated_random_tokens(model, prompts=256)),
        ),
    )


def _best_mixture(bigram: Float[Tensor, "a b"], unigram: Float[Tensor, "a b"], d_vocab: int) -> float:
    """Minimise the loss of a * bigram + b * unigram + (1 - a - b) / d_vocab over the weights a and b, by EM."""
    parts = torch.stack([(-bigram).exp(), (-unigram).exp(), torch.full_like(unigram, 1 / d_vocab)]).double()
    weights = torch.full((3, 1, 1), 1 / 3, dtype=torch.float64)
    for _ in range(100):
        shares = weights * parts
        weights = (shares / shares.sum(0)).mean((1, 2), keepdim=True)
    return -(weights * parts).sum(0).log().mean().item()


def write_model_card(folder: Path, args: argparse.Namespace) -> Losses:
    """Measure a trained model and write its model card."""
    model, corpus, losses = measure(folder)
    cfg = model.cfg
    size = (folder / "model.safetensors").stat().st_size
    with safe_open(folder / "model.safetensors", framework="np") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    command = f"python scripts/train_reference.py --out FOLDER --epochs {args.epochs:g} --seed {args.seed}"
    write_text(
        folder / "README.md",
        f"""# The reference model of bigram_circuits

A small language model of Python's documentation, for trying and testing methods where no model hub can be reached.

| | |
|---|---|
| architecture | GPT-NeoX (Pythia's): {cfg.n_layers} blocks, d_model {cfg.d_model}, {cfg.n_heads} heads, d_mlp {cfg.d_mlp}, \
context {cfg.n_ctx}, untied unembedding |
| size | {parameters:,} parameters in float16, {size / 1e6:.1f} MB |
| tokenizer | byte-level BPE, {cfg.d_vocab:,} tokens, trained on the training documents |
| text | the documentation topics and standard-library docstrings of Python 3.11: {corpus.train.size:,} training tokens in \
{corpus.documents[0]} documents, {corpus.held_out.size:,} held-out tokens in {corpus.documents[1]} others |
| training | {args.epochs:g} epochs of AdamW at {args.learning_rate:g}, batches of {args.batch} x {args.context_length} \
tokens, dropout {args.dropout:g}, weight decay {args.weight_decay:g}; {args.repeats} of {args.batch} rows are sequences that \
repeat; about 20 minutes on 2 cores |
| made by | `{command}` |

## Loss on the held-out documents, nats per token

| | this model | bigram table of the training text |
|---|---|---|
| positions whose bigram occurs in the training text ({100 * losses.share_seen:.1f}%) | {losses.model_where_seen:.3f} | \
{losses.bigram_where_seen:.3f} |
| all positions | {losses.model:.3f} | infinite; {losses.bigram_mixed:.3f} mixed with unigrams and uniform, at the weights \
best for this text |

Documents are held out by name, so the same ones are held out under every Python version. The last row's mixture is fitted
on the held-out text itself, in the bigram table's favour.

It can look back (induction): on random tokens that repeat after 24, its loss is {losses.repeats.loss:.3f} nats per token
where the repetition tells the token (95%: {losses.repeats.interval[0]:.3f} to {losses.repeats.interval[1]:.3f}); guessing
would be {losses.repeats.chance:.3f}. It learned that from rows of passages, of shuffled text and of random tokens that
repeat, whose loss counted only where the repetition tells the next token.

## Licence

The weights and tokenizer are under this project's MIT licence. The text they were trained on is not part of the
project: it is installed with Python, and is covered by the PSF License Agreement (examples in it also by the
Zero-Clause BSD licence).

## Limits

It has seen nothing but documentation of Python, in English, and states nothing reliably. It is meant for studying
methods.
""",
    )
    return losses


def _held_in(documents: Any) -> list[str]:
    return [text for name, text in documents if document_position(name) >= HELD_OUT]


def main() -> None:
    """Train, save and measure a model, or only measure one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder to write the trained model to")
    where.add_argument("--measure", type=Path, help="folder of a trained model, to measure again")
    parser.add_argument("--d-vocab", type=int, default=1024)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=6, help="rows of a batch that are sequences which repeat")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16")
    args = parser.parse_args()
    started = time.monotonic()
    if args.out:
        tokenizer = train_tokenizer(_held_in(reference_documents()), args.d_vocab)
        corpus = load_corpus("reference", tokenizer=tokenizer, held_out=HELD_OUT, context_length=args.context_length)
        train_model(corpus, args).half().save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    print(write_model_card(args.out or args.measure, args))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
