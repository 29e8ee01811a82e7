"""Two small models for comparing recipes, with other architectures and texts than the reference model.

Each is trained once, in a few minutes on one core, and saved with its tokenizer by `save_pretrained`.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import trange
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import bigram_circuits as bc
from bigram_circuits.measures.statistics import surprisals
from bigram_circuits.text.corpus import in_order

D_VOCAB = 512
CONTEXT_LENGTH = 64
HELD_OUT = 0.1
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 4000, 32, 5e-3, 0.1


def gpt2() -> PreTrainedModel:
    """Build a GPT-2: learned positions, tied embeddings."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=D_VOCAB, n_positions=CONTEXT_LENGTH, n_embd=64, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def llama() -> PreTrainedModel:
    """Build a Llama: gated MLP, grouped queries, RMSNorm, rotary positions."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=D_VOCAB, max_position_embeddings=CONTEXT_LENGTH, hidden_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=176, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


MODELS = {
    "gpt2": (gpt2, ("tinyshakespeare/input.txt",)),
    "llama": (llama, ("wikitext-2/valid.txt", "wikitext-2/test.txt")),
}
"""Architecture and text of each model."""

OUTSIDE = {"stories260K": "stories260K-text.jsonl"}
"""Models trained by others, and their texts, in the folder `models` beside that of the texts."""


@dataclass(frozen=True)
class Subject:
    """A trained model and its text, for learning masks."""

    name: str
    model: Any
    corpus: bc.Corpus
    target: bc.NGramTable


def load(name: str, models: Path, data: Path) -> Subject:
    """Load one of `MODELS`, trained first if its folder does not exist, one of `OUTSIDE`, or the reference model."""
    if name in OUTSIDE:
        folder = data.parent / "models"
        model = bc.load_model(folder / name)
        corpus = bc.load_corpus(folder / OUTSIDE[name], tokenizer=model.tokenizer, context_length=128)
    elif name == "reference":
        model = bc.load_model(device="cpu")
        corpus = bc.load_corpus("reference", tokenizer=model.tokenizer, context_length=model.cfg.n_ctx)
    else:
        if not (models / name).exists():
            make(name, models / name, data)
        model = bc.load_model(models / name, device="cpu")
        corpus = read_corpus(name, data, model.tokenizer)
    return Subject(name, model, corpus, bc.count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab))


def read_corpus(name: str, data: Path, tokenizer: Any) -> bc.Corpus:
    """Load the model's text, with a tenth of the passages (about 2,000 characters each) held out by their hash."""
    paths = [data / path for path in MODELS[name][1]]
    return bc.load_corpus(paths, tokenizer=tokenizer, context_length=CONTEXT_LENGTH, held_out=HELD_OUT)


def make(name: str, folder: Path, data: Path) -> None:
    """Train and save tokenizer and model, with the held-out losses; only the tokenizer has seen held-out text."""
    build, paths = MODELS[name]
    sys.path.append(str(Path(__file__).parents[1] / "scripts"))
    from train_reference import train_tokenizer

    tokenizer = train_tokenizer([(data / path).read_text(encoding="utf-8") for path in paths], D_VOCAB)
    corpus = read_corpus(name, data, tokenizer)
    torch.manual_seed(0)
    model = train(build(), corpus)
    losses = held_out_losses(model, corpus)
    print(name, json.dumps(losses), flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "losses.json").write_text(json.dumps(losses, indent=1))
    partial.rename(folder)


def train(model: PreTrainedModel, corpus: bc.Corpus) -> PreTrainedModel:
    """Minimise the next-token loss with AdamW on randomly placed windows, with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    stream = corpus.train.reshape(-1)
    window = np.arange(CONTEXT_LENGTH)
    rng = np.random.default_rng(0)
    model.train()
    for step in (bar := trange(STEPS, desc="training", mininterval=10)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        starts = rng.integers(0, stream.size - CONTEXT_LENGTH + 1, size=BATCH)
        tokens = torch.from_numpy(stream[starts[:, None] + window].astype(np.int64))
        loss = surprisals(model(tokens).logits, tokens).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.inference_mode()
def held_out_losses(model: PreTrainedModel, corpus: bc.Corpus) -> dict[str, float]:
    """Measure held-out losses in nats per token: the model's everywhere, and both where the bigram table's is finite.

    The table's loss is infinite wherever the bigram is not in the training text, so this comparison favours the table.
    """
    own = torch.cat([surprisals(model(tokens).logits, tokens) for tokens in in_order(corpus.held_out, BATCH)])
    table = bc.count_ngrams(corpus.train, 2, d_vocab=D_VOCAB).surprisal(corpus.held_out)
    seen = table.isfinite()
    return {
        "model": own.mean().item(),
        "model_where_seen": own[seen].mean().item(),
        "bigram_where_seen": table[seen].mean().item(),
        "share_seen": seen.double().mean().item(),
    }
