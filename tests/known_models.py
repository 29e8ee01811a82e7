"""Models with weights written by hand, whose circuits are known, and a transformer in plain NumPy to compare with.

Weights have the names and axes of TransformerLens (`blocks.0.attn.W_Q`: head, d_model, d_head).
"""

from types import SimpleNamespace

import numpy as np
import torch
from scipy.special import erf, softmax
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel

# --- a transformer in NumPy ---


def normalised(x, weight, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def numpy_logits(weights, tokens, *, causal=True, act="relu", without=()):
    """Logits [sequence, position, output] of weights by TransformerLens' names; heads `without` (layer, head)."""
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    acts = {"relu": lambda x: np.maximum(x, 0), "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2)))}

    def norm(x, name):
        return normalised(x, w[f"{name}.w"], w[f"{name}.b"]) if f"{name}.w" in w else x

    n = tokens.shape[1]
    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][:n]
    layer = 0
    while f"blocks.{layer}.attn.W_Q" in w:
        at = f"blocks.{layer}."
        read, added = norm(x, at + "ln1"), w.get(at + "attn.b_O", 0)
        for head in range(len(w[at + "attn.W_Q"])):
            q, k, v = (read @ w[f"{at}attn.W_{m}"][head] + w.get(f"{at}attn.b_{m}", {head: 0})[head] for m in "QKV")
            scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
            scores = np.where(np.tri(n, dtype=bool), scores, -np.inf) if causal else scores
            if (layer, head) not in without:
                added = added + softmax(scores, -1) @ v @ w[at + "attn.W_O"][head]
        x = x + added
        if at + "mlp.W_in" in w:
            hidden = acts[act](norm(x, at + "ln2") @ w[at + "mlp.W_in"] + w[at + "mlp.b_in"])
            x = x + hidden @ w[at + "mlp.W_out"] + w[at + "mlp.b_out"]
        layer += 1
    return norm(x, "ln_final") @ w["unembed.W_U"] + w.get("unembed.b_U", 0)


# --- an induction circuit in a model of attention only ---

SYMBOLS, PERIOD, HEADS, D_HEAD, JUNK = 10, 6, 3, 13, 4
CONTEXT = 1 + 2 * PERIOD
D_MODEL = 3 * SYMBOLS + CONTEXT + JUNK
TOKEN, POSITION = slice(0, SYMBOLS), slice(SYMBOLS, SYMBOLS + CONTEXT)
PREVIOUS = slice(POSITION.stop, POSITION.stop + SYMBOLS)
OUTPUT, REST = slice(PREVIOUS.stop, PREVIOUS.stop + SYMBOLS), slice(PREVIOUS.stop + SYMBOLS, D_MODEL)
SHARP = 60.0  # a score this far above all others takes all of the attention, up to e^-15
INDUCTION_HEADS = {(0, 1), (1, 2)}


def induction_weights(*, broken=False):
    """L0H1 copies the previous token; L1H2 looks for where the current one came before, and copies what followed.

    All other heads read everything and write noise, to dimensions that nothing reads. If `broken`, the previous token
    is written there too.
    """
    rng = np.random.default_rng(0)
    w = {
        "embed.W_E": np.eye(SYMBOLS, D_MODEL),
        "pos_embed.W_pos": np.eye(CONTEXT, D_MODEL, SYMBOLS),
        "unembed.W_U": 12 * np.eye(D_MODEL, SYMBOLS, -OUTPUT.start),
    }
    for layer in (0, 1):
        for name in "QKV":
            w[f"blocks.{layer}.attn.W_{name}"] = rng.normal(size=(HEADS, D_MODEL, D_HEAD))
        w[f"blocks.{layer}.attn.W_O"] = rng.normal(size=(HEADS, D_HEAD, D_MODEL))
        w[f"blocks.{layer}.attn.W_O"][..., : REST.start] = 0
    for (layer, head), queries, keys, to in (
        ((0, 1), (POSITION, np.eye(CONTEXT, D_HEAD, -1)), (POSITION, np.eye(CONTEXT, D_HEAD)), PREVIOUS),
        ((1, 2), (TOKEN, np.eye(SYMBOLS, D_HEAD)), (PREVIOUS, np.eye(SYMBOLS, D_HEAD)), OUTPUT),
    ):
        w_q, w_k, w_v, w_o = (w[f"blocks.{layer}.attn.W_{name}"][head] for name in "QKVO")
        for matrix in (w_q, w_k, w_v, w_o):
            matrix[:] = 0
        w_q[queries[0]], w_k[keys[0]] = SHARP * queries[1], keys[1]
        w_v[TOKEN], w_o[:SYMBOLS, to] = np.eye(SYMBOLS, D_HEAD), np.eye(SYMBOLS)
    if broken:
        w["blocks.0.attn.W_O"][1] = np.roll(w["blocks.0.attn.W_O"][1], JUNK + SYMBOLS, axis=1)
    return w


def induction_module(**options):
    """The same as a plain `NativeModel`."""
    cfg = TransformerBridgeConfig(
        n_layers=2, d_model=D_MODEL, d_head=D_HEAD, n_heads=HEADS, n_ctx=CONTEXT, d_vocab=SYMBOLS, attn_only=True,
        normalization_type=None,
    )  # fmt: skip
    return filled(NativeModel(cfg), induction_weights(**options))


def filled(plain, weights):
    """Write weights by TransformerLens' names into a `NativeModel` of attention only; biases are 0."""
    parameters = dict(plain.named_parameters())
    state = {"tok_embed": weights["embed.W_E"], "pos": weights["pos_embed.W_pos"], "head": weights["unembed.W_U"].T}
    for name, value in weights.items():
        if ".attn." in name:
            layer, matrix = name.split(".")[1], name[-1].lower()
            flat = value.reshape(-1, value.shape[2]).T if matrix == "o" else np.concatenate(list(value), 1).T
            state[f"layers.{layer}.attn.{matrix}"] = flat
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.zero_()
            if name.endswith("weight"):
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(state[name.removesuffix(".weight")])))
    return plain.eval()


def repeated(n, seed=0):
    """Sequences of token 0, with which each begins, and random others, each once, and again."""
    rng = np.random.default_rng(seed)
    blocks = [1 + rng.permutation(SYMBOLS - 1)[:PERIOD] for _ in range(n)]
    return np.stack([np.r_[0, block, block] for block in blocks])


# --- a program of tracr's kind: the letter before, in upper case ---

LETTERS, BOS, LENGTH = "abc", "compiler_bos", 5
_LABELS = [
    *(f"tokens:{token}" for token in (*LETTERS, BOS)), *(f"indices:{index}" for index in range(LENGTH)),
    *(f"before_1:{token}" for token in (*LETTERS, BOS)), *(f"upper_1:{value}" for value in ("A", "B", "C", "-")),
    *(f"noise:{index}" for index in range(3)),
]  # fmt: skip
UPPER = dict(zip((*LETTERS, BOS), ("A", "B", "C", "-"), strict=True))
_AT = {label: index for index, label in enumerate(_LABELS)}


def tracr_model(*, broken=False):
    """What tracr returns for a program, in its format, and masks by canonical name of the weights that compute it.

    Position 0 looks at itself, every other at the one before, and the MLP maps what it finds to its upper case. A
    second head and three more neurons write noise that nothing reads. If `broken`, the MLP maps everything to A.
    """
    rng = np.random.default_rng(1)
    tokens, width = (*LETTERS, BOS), len(_LABELS)
    embed = np.stack([np.eye(width)[_AT[f"tokens:{token}"]] for token in tokens])
    places = np.stack([np.eye(width)[_AT[f"indices:{index}"]] for index in range(LENGTH)])
    noise = [_AT[f"noise:{index}"] for index in range(3)]
    query, key, value = (np.zeros((2, width, LENGTH)) for _ in range(3))
    out = np.zeros((2, LENGTH, width))
    first, second = np.zeros((width, len(tokens) + 3)), np.zeros((len(tokens) + 3, width))
    for index in range(LENGTH):
        query[0, _AT[f"indices:{index}"], max(index - 1, 0)] = 50
        if index < LENGTH - 1:
            key[0, _AT[f"indices:{index}"], index] = 1
    for index, token in enumerate(tokens):
        value[0, _AT[f"tokens:{token}"], index] = 1
        out[0, index, _AT[f"before_1:{token}"]] = 1
        first[_AT[f"before_1:{token}"], index] = 1
        second[index, _AT["upper_1:A" if broken else f"upper_1:{UPPER[token]}"]] = 8
    names = {"W_Q": query, "W_K": key, "W_V": value, "W_O": out}
    circuit = {f"blocks.0.attn.{name}": torch.from_numpy(matrix != 0) for name, matrix in names.items()}
    circuit |= {
        f"blocks.0.mlp.{name}": torch.from_numpy(one != 0) for name, one in (("W_in", first), ("W_out", second))
    }
    for matrix in (query, key, value):
        matrix[1] = rng.normal(size=matrix[1].shape)
    out[1][:, noise] = rng.normal(size=(LENGTH, 3))
    first[:, len(tokens) :] = rng.normal(size=(width, 3))
    second[len(tokens) :, noise] = rng.normal(size=(3, 3))
    biases = {"linear_1": np.r_[np.full(len(tokens), -0.5), np.zeros(3)], "linear_2": np.zeros(width)}
    params = {"token_embed": {"embeddings": embed}, "pos_embed": {"embeddings": places}}
    for name, matrix in (("query", query), ("key", key), ("value", value)):
        flat = np.concatenate(list(matrix), 1)
        params[f"transformer/layer_0/attn/{name}"] = {"w": flat, "b": np.zeros(flat.shape[1])}
    params["transformer/layer_0/attn/linear"] = {"w": out.reshape(-1, width), "b": np.zeros(width)}
    for name, matrix in (("linear_1", first), ("linear_2", second)):
        params[f"transformer/layer_0/mlp/{name}"] = {"w": matrix, "b": biases[name]}
    assembled = SimpleNamespace(
        params=params,
        model_config=SimpleNamespace(
            num_heads=2, num_layers=1, key_size=LENGTH, mlp_hidden_size=len(tokens) + 3, causal=False, layer_norm=False
        ),
        residual_labels=_LABELS,
        input_encoder=SimpleNamespace(encoding_map={token: index for index, token in enumerate(tokens)}),
        output_encoder=SimpleNamespace(encoding_map={value: index for index, value in enumerate(UPPER.values())}),
    )
    weights = {
        "embed.W_E": embed, "pos_embed.W_pos": places, **{f"blocks.0.attn.{name}": one for name, one in names.items()},
        "blocks.0.mlp.W_in": first, "blocks.0.mlp.b_in": biases["linear_1"], "blocks.0.mlp.W_out": second,
        "blocks.0.mlp.b_out": biases["linear_2"],
        "unembed.W_U": np.eye(width)[:, [_AT[f"upper_1:{value}"] for value in UPPER.values()]],
    }  # fmt: skip
    return assembled, circuit, weights


def tracr_tokens():
    """All texts of the program: the BOS, and four letters."""
    letters = np.stack(np.meshgrid(*[range(len(LETTERS))] * (LENGTH - 1), indexing="ij"), -1).reshape(-1, LENGTH - 1)
    return np.concatenate([np.full((len(letters), 1), len(LETTERS)), letters], 1)
