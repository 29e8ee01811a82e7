"""Train the reference model: `python -m bigram_circuits.reference.train --out FOLDER`.

A byte-level BPE tokenizer and a GPT-NeoX language model (Pythia's architecture) are trained from nothing on the
running interpreter's documentation, and written as an ordinary Hugging Face folder with a model card. The data
order is seeded; the result is the same up to floating point on the machine and the Python version.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import trange
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from bigram_circuits.corpus import Corpus, document_position, load_corpus
from bigram_circuits.reference.documents import reference_documents

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.05


def train_tokenizer(texts: list[str], d_vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (no unknown tokens) with one special token, the end of a text."""
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


def train_model(
    corpus: Corpus, args: argparse.Namespace, d_vocab: int
) -> tuple[GPTNeoXForCausalLM, float]:
    """Minimise the next-token loss with AdamW, a warm-up and a cosine decay; return the model and the last loss."""
    torch.manual_seed(args.seed)
    config = GPTNeoXConfig(
        vocab_size=d_vocab,
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
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    stream = corpus.train.reshape(-1)
    steps = round(args.epochs * stream.size / (args.batch * args.context_length))
    rng = np.random.default_rng(args.seed)
    window = np.arange(args.context_length)
    progress = trange(steps, desc="training")
    loss = torch.tensor(math.nan)
    for step in progress:
        scale = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        starts = rng.integers(0, stream.size - args.context_length + 1, size=args.batch)
        tokens = torch.from_numpy(stream[starts[:, None] + window].astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
            logits = model(tokens).logits
        loss = next_token_losses(logits, tokens).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 500 == 499:
            print(step + 1, f"loss {loss.item():.3f} held-out {held_out_loss(model.eval(), corpus.held_out):.4f}", flush=True)
            model.train()
    return model.eval(), loss.item()


def next_token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Surprisal of each actual next token, nats [batch, position-1]."""
    batch, position, d_vocab = logits.shape
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, d_vocab), tokens[:, 1:].reshape(-1), reduction="none"
    )
    return flat.view(batch, position - 1)


@torch.inference_mode()
def held_out_loss(model, sequences) -> float:
    losses = []
    for start in range(0, len(sequences), 32):
        tokens = torch.from_numpy(sequences[start : start + 32].astype(np.int64))
        losses.append(next_token_losses(model(tokens).logits, tokens))
    return torch.cat(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--d-vocab", type=int, default=1024)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true")
    args = parser.parse_args()
    start = time.time()
    texts = [text for name, text in reference_documents() if document_position(name) >= HELD_OUT]
    tokenizer = train_tokenizer(texts, args.d_vocab)
    corpus = load_corpus("reference", tokenizer=tokenizer, held_out=HELD_OUT, context_length=args.context_length)
    print(corpus)
    model, _ = train_model(corpus, args, args.d_vocab)
    model = model.half().float()
    print("held-out", held_out_loss(model, corpus.held_out), time.time() - start)
    model.config.hidden_dropout = 0.0
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
