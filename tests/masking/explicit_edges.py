"""Plain Hugging Face models computed edge by edge: every head on its own, every input a sum that is written out."""

import torch
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama


class _GPT2:
    parallel = False

    def __init__(self, plain):
        self.body, self.blocks = plain.transformer, plain.transformer.h
        self.norm, self.unembed = self.body.ln_f, plain.lm_head
        self.heads = self.key_values = plain.config.n_head

    def embed(self, tokens):
        return self.body.wte(tokens) + self.body.wpe(torch.arange(tokens.shape[1]))

    def norms(self, block):
        return block.ln_1, block.ln_2

    def project(self, block, kind, head, x):
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
        size = len(weight) // self.heads
        start = "qkv".index(kind) * len(weight) + head * size
        return x @ weight[:, start : start + size] + bias[start : start + size]

    def rotate(self, x):
        return x

    def output(self, block, head):
        weight = block.attn.c_proj.weight
        size = len(weight) // self.heads
        return weight[head * size : (head + 1) * size]

    def bias(self, block):
        return block.attn.c_proj.bias


class _Neox:
    parallel, module = True, modeling_gpt_neox

    def __init__(self, plain):
        self.body, self.blocks = plain.gpt_neox, plain.gpt_neox.layers
        self.norm, self.unembed = self.body.final_layer_norm, plain.lm_head
        self.heads = self.key_values = plain.config.num_attention_heads

    def embed(self, tokens):
        return self.body.embed_in(tokens)

    def norms(self, block):
        return block.input_layernorm, block.post_attention_layernorm

    def project(self, block, kind, head, x):
        layer = block.attention.query_key_value
        size = len(layer.weight) // (3 * self.heads)
        start = (3 * head + "qkv".index(kind)) * size
        return x @ layer.weight[start : start + size].T + layer.bias[start : start + size]

    def rotate(self, x):
        cos, sin = self.body.rotary_emb(x, torch.arange(x.shape[1])[None])
        return self.module.apply_rotary_pos_emb(x[:, None], x[:, None], cos, sin)[0][:, 0]

    def output(self, block, head):
        weight = block.attention.dense.weight.T
        size = len(weight) // self.heads
        return weight[head * size : (head + 1) * size]

    def bias(self, block):
        return block.attention.dense.bias


class _Llama(_Neox):
    parallel, module = False, modeling_llama

    def __init__(self, plain):
        self.body, self.blocks = plain.model, plain.model.layers
        self.norm, self.unembed = self.body.norm, plain.lm_head
        self.heads, self.key_values = plain.config.num_attention_heads, plain.config.num_key_value_heads

    def embed(self, tokens):
        return self.body.embed_tokens(tokens)

    def project(self, block, kind, head, x):
        weight = getattr(block.self_attn, f"{kind}_proj").weight
        size = len(weight) // (self.heads if kind == "q" else self.key_values)
        return x @ weight[head * size : (head + 1) * size].T

    def output(self, block, head):
        weight = block.self_attn.o_proj.weight.T
        size = len(weight) // self.heads
        return weight[head * size : (head + 1) * size]

    def bias(self, block):
        return 0


_KINDS = {"GPT2LMHeadModel": _GPT2, "GPTNeoXForCausalLM": _Neox, "LlamaForCausalLM": _Llama}


def explicit(plain, tokens, gate=lambda label: 1.0, others=None):
    """Return logits, and what every writer writes; `gate` is of a label, `others` are replacements by writer."""
    model, others = _KINDS[type(plain).__name__](plain), others or {}
    written = {"embed": model.embed(tokens)}
    bias = 0

    def read(reader, readable, bias):
        parts = ((gate(f"{writer}->{reader}"), out, others.get(writer, 0 * out)) for writer, out in readable.items())
        return sum(g * out + (1 - g) * other for g, out, other in parts) + bias

    causal = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
    for layer, block in enumerate(model.blocks):
        norm1, norm2 = model.norms(block)
        before, bias_before = dict(written), bias
        made = {}
        for head in range(model.heads):
            shared = head * model.key_values // model.heads
            reader = f"L{layer}KV{shared}" if model.key_values != model.heads else f"L{layer}H{head}"
            readers = {"q": f"L{layer}H{head}.q", "k": f"{reader}.k", "v": f"{reader}.v"}
            q, k, v = (
                model.project(block, kind, head if kind == "q" else shared, norm1(read(readers[kind], before, bias)))
                for kind in "qkv"
            )
            scores = model.rotate(q) @ model.rotate(k).mT / q.shape[-1] ** 0.5 + causal
            made[f"L{layer}H{head}"] = scores.softmax(-1) @ v @ model.output(block, head)
        bias = bias + model.bias(block)
        readable = (before, bias_before) if model.parallel else (before | made, bias)
        mlp = block.mlp(norm2(read(f"L{layer}.mlp", *readable)))
        written |= made | {f"L{layer}.mlp": mlp}
    return model.unembed(model.norm(read("logits", written, bias))), written
