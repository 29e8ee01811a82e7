"""Tiny configurations of many architectures, with sizes that are easy to mix up kept apart."""

import pytest
from transformers import (
    ApertusConfig,
    ArceeConfig,
    BloomConfig,
    CodeGenConfig,
    CohereConfig,
    DeepseekV3Config,
    Ernie4_5Config,
    Exaone4Config,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    MptConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
    RwkvConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    XGLMConfig,
)

D_VOCAB = 257
HEADS = {
    "vocab_size": D_VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
GROUPED = HEADS | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 8}  # 4 heads of 8 in a residual stream of 24
OLD = {"vocab_size": D_VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = HEADS | {"ffn_hidden_size": 40}
FALCON.pop("intermediate_size")

CONFIGS = {
    "gpt2": lambda: GPT2Config(**OLD, n_inner=40),
    "gpt_neox": lambda: GPTNeoXConfig(**HEADS),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=D_VOCAB, hidden_size=24, num_layers=2, num_heads=4, intermediate_size=40,
        max_position_embeddings=64, attention_types=[[["global", "local"], 1]], window_size=4,
    ),
    "gptj": lambda: GPTJConfig(**OLD, n_inner=40, rotary_dim=4),
    "opt": lambda: OPTConfig(
        vocab_size=D_VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40,
        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0, do_layer_norm_before=False,
    ),
    "llama": lambda: LlamaConfig(**WIDE, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**WIDE, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**WIDE),
    "gemma": lambda: GemmaConfig(**WIDE),
    "gemma2": lambda: Gemma2Config(**WIDE, query_pre_attn_scalar=8, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(**WIDE, query_pre_attn_scalar=8, sliding_window=4),
    "olmo": lambda: OlmoConfig(**GROUPED),
    "olmo2": lambda: Olmo2Config(**GROUPED),
    "olmo3": lambda: Olmo3Config(**GROUPED),
    "phi": lambda: PhiConfig(**HEADS | {"hidden_size": 32}),
    "phi3": lambda: Phi3Config(**GROUPED, pad_token_id=0),
    "bloom": lambda: BloomConfig(vocab_size=D_VOCAB, hidden_size=24, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(**FALCON, multi_query=True),
    "falcon_alibi": lambda: FalconConfig(**FALCON, multi_query=False, alibi=True),
    "mpt": lambda: MptConfig(vocab_size=D_VOCAB, d_model=24, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2),
    "stablelm": lambda: StableLmConfig(**GROUPED | {"hidden_size": 32}, partial_rotary_factor=0.5),
    "granite": lambda: GraniteConfig(**GROUPED),
    "starcoder2": lambda: Starcoder2Config(**GROUPED),
    "cohere": lambda: CohereConfig(**GROUPED, use_qk_norm=True),
    "xglm": lambda: XGLMConfig(
        vocab_size=D_VOCAB, d_model=24, num_layers=2, attention_heads=4, ffn_dim=40, max_position_embeddings=64
    ),
    "codegen": lambda: CodeGenConfig(**OLD | {"n_embd": 32, "n_head": 8}, n_inner=40, rotary_dim=4),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**OLD, n_inner=40),
    "openai_gpt": lambda: OpenAIGPTConfig(**OLD),
    "nemotron": lambda: NemotronConfig(**WIDE),
    "glm": lambda: GlmConfig(**WIDE, pad_token_id=0),
    "glm4": lambda: Glm4Config(**WIDE, pad_token_id=0),
    "smollm3": lambda: SmolLM3Config(**GROUPED, pad_token_id=0),
    "seed_oss": lambda: SeedOssConfig(**WIDE),
    "apertus": lambda: ApertusConfig(**GROUPED),
    "arcee": lambda: ArceeConfig(**GROUPED),
    "exaone4": lambda: Exaone4Config(**GROUPED),
    "ernie4_5": lambda: Ernie4_5Config(**WIDE),
    "hunyuan": lambda: HunYuanDenseV1Config(**WIDE),
}  # fmt: skip

ALIKE = {
    "arcee": "apertus", "ernie4_5": "llama", "exaone4": "olmo2", "falcon_alibi": "bloom", "gemma": "gemma2",
    "glm": "glm4", "gpt_neo": "gpt2", "gptj": "codegen", "hunyuan": "qwen3", "mistral": "gemma3", "nemotron": "apertus",
    "olmo3": "olmo2", "qwen2": "llama", "seed_oss": "llama", "smollm3": "llama", "stablelm": "phi",
    "starcoder2": "gemma3", "xglm": "gpt2",
}  # fmt: skip
"""Architectures that are built like another, up to biases, norms or windows, and are left to the slow tests."""


def each(names: list[str]) -> list:
    """Parameters of a test of every architecture."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in names]


REFUSED = {  # with what is said
    "mixtral": (lambda: MixtralConfig(**GROUPED, num_local_experts=2), r"blocks\.0\.mlp .*has no plain W_in"),
    "qwen2_moe": (
        lambda: Qwen2MoeConfig(
            **GROUPED, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        r"blocks\.0\.mlp .*has no plain W_in",
    ),
    "olmoe": (
        lambda: OlmoeConfig(**GROUPED, num_experts=2, num_experts_per_tok=2), r"blocks\.0\.mlp .*has no plain W_in"
    ),
    "gpt_oss": (
        lambda: GptOssConfig(**WIDE, num_local_experts=2, num_experts_per_tok=2),
        r"blocks\.0\.mlp .*has no plain W_in",
    ),
    "deepseek_v3": (lambda: DeepseekV3Config(
            **HEADS, num_key_value_heads=4, n_group=1, topk_group=1, n_routed_experts=8
        ), r"blocks\.0\.attn .*has no plain W_Q"),
    "mamba": (
        lambda: MambaConfig(vocab_size=D_VOCAB, hidden_size=24, num_hidden_layers=2),
        r"blocks\.0 has the weight mixer\.",
    ),
    "rwkv": (
        lambda: RwkvConfig(vocab_size=D_VOCAB, hidden_size=24, num_hidden_layers=2),
        r"blocks\.0 has the weight attention\.",
    ),
    "jamba": (
        lambda: JambaConfig(**GROUPED, num_experts=2, attn_layer_period=2, attn_layer_offset=1),
        r"blocks\.0\.mlp .*has no plain W_in",
    ),
    "qwen3_next": (
        lambda: Qwen3NextConfig(
            **GROUPED, num_experts=2, num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"]
        ),
        r"blocks\.0\.mlp .*has no plain W_in",
    ),
    "falcon_h1": (
        lambda: FalconH1Config(**GROUPED, mamba_d_ssm=16, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=4),
        r"blocks\.0 has the weight mamba",
    ),
    "modernbert_decoder": (
        lambda: ModernBertDecoderConfig(**HEADS, pad_token_id=0, cls_token_id=0, sep_token_id=0),
        r"blocks\.0\.mlp do not fit together as neurons: W_in 80 x 24, W_out 24 x 40",
    ),
}  # fmt: skip
