"""Tiny random models of every supported family, and plans for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import BatchEncoding

from coreskip.kernels.sparse import SparseMLP
from coreskip.predictors.plan import LayerPlan, Plan
from coreskip.predictors.policies import Clusters, CoreNeurons, Dense, NeuronPolicy, Similar, Static
from coreskip.runtime.bundles import Weights
from coreskip.runtime.program import brick_of, build

VOCABULARY = 128
_ROPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_HEAD = {**_ROPE, "head_dim": 16}
_PLAIN = {key: value for key, value in _ROPE.items() if key != "num_key_value_heads"}

# family -> (configuration class, what differs from a small llama)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _ROPE),
    "llama_bias": ("LlamaConfig", {**_ROPE, "mlp_bias": True, "attention_bias": True}),
    "mistral": ("MistralConfig", {**_HEAD, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", _ROPE),
    "qwen3": ("Qwen3Config", _HEAD),
    "phi3": ("Phi3Config", _ROPE),
    "gemma": ("GemmaConfig", _HEAD),
    "gemma2": ("Gemma2Config", {**_HEAD, "sliding_window": 8}),
    "gemma3_text": ("Gemma3TextConfig", {**_HEAD, "sliding_window": 8}),
    "olmo2": ("Olmo2Config", _ROPE),
    "stablelm": ("StableLmConfig", _ROPE),
    "starcoder2": ("Starcoder2Config", {**_ROPE, "sliding_window": None}),
    "opt": (
        "OPTConfig",
        {
            **_PLAIN,
            "ffn_dim": 160,
            "word_embed_proj_dim": 64,
            "activation_function": "relu",
            "do_layer_norm_before": True,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_inner": 160, "n_layer": 3, "n_head": 4, "n_positions": 256}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_PLAIN, "use_parallel_residual": True}),
    "falcon": ("FalconConfig", {**_PLAIN, "ffn_hidden_size": 160, "new_decoder_architecture": False}),
    "falcon_new": (
        "FalconConfig",
        {**_PLAIN, "num_kv_heads": 2, "ffn_hidden_size": 160, "new_decoder_architecture": True},
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": None},
    ),
    # not in the table: found by their structure
    "olmo": ("OlmoConfig", _ROPE),
    "cohere": ("CohereConfig", _ROPE),
    "granite": ("GraniteConfig", _ROPE),
    "phi": ("PhiConfig", {**_ROPE, "num_key_value_heads": 4}),
    "nemotron_relu2": ("NemotronConfig", {**_HEAD, "hidden_act": "relu2"}),
    "smollm3": ("SmolLM3Config", _ROPE),
}


_MIXTURE = {**_ROPE, "num_local_experts": 8, "num_experts_per_tok": 2}
_SHARED = {**_ROPE, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1}
_SHARED |= {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
_LATENT = {**_SHARED, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_LATENT |= {"num_key_value_heads": 4}

# mixtures of experts: of every kind of router, of experts' matrices and of shared expert that transformers has
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _MIXTURE),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_ROPE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0]}
        | {"shared_expert_intermediate_size": 96, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_HEAD, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", {**_ROPE, "num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek_v3": ("DeepseekV3Config", {**_LATENT, "q_lora_rank": 16}),
    "granitemoe": ("GraniteMoeConfig", _MIXTURE),
    "phimoe": ("PhimoeConfig", _MIXTURE),
    "gpt_oss": ("GptOssConfig", {**_MIXTURE, "head_dim": 16, "sliding_window": 8}),
    "glm4_moe": ("Glm4MoeConfig", {**_SHARED, "head_dim": 16, "n_group": 2, "topk_group": 1}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {**_ROPE, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1},
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {**_ROPE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_dense_layers": 1}
        | {"layer_types": ["conv", "full_attention", "conv"]},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {**_HEAD, "num_experts": 8, "moe_topk": 2}),
    "minimax": (
        "MiniMaxConfig",
        {**_MIXTURE, "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "flex_olmo": ("FlexOlmoConfig", {**_ROPE, "num_experts": 8, "num_experts_per_tok": 2}),
    "dots1": ("Dots1Config", {**_SHARED, "n_group": 1, "topk_group": 1}),
    "jamba": (
        "JambaConfig",
        {**_ROPE, "num_experts": 8, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
    "llama4": (
        "Llama4TextConfig",
        {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}
        | {"interleave_moe_layer_step": 2, "attention_chunk_size": 64},
    ),
    "granitemoeshared": ("GraniteMoeSharedConfig", {**_MIXTURE, "shared_intermediate_size": 64}),
}

# dense families that differ in where their MLPs are, in what stands inside them, or in what other layers are
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", _ROPE),  # a learned activation
    "biogpt": ("BioGptConfig", _PLAIN),  # the MLP is written out in the layer
    "xglm": ("XGLMConfig", {**_PLAIN, "d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 160}),
    "mpt": ("MptConfig", {**_PLAIN, "d_model": 64, "n_layers": 3, "n_heads": 4, "use_cache": True}),  # adds a residual
    "bitnet": ("BitNetConfig", _ROPE),  # a norm before the down projection
    "doge": ("DogeConfig", {**_ROPE, "is_moe": False}),
    "lfm2": (  # convolutions among the attentions
        "Lfm2Config",
        {**_ROPE, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "modernbert_decoder": ("ModernBertDecoderConfig", _PLAIN),  # what it calls its decoder is the LM head
    "nemotron_h": (  # layers without any MLP
        "NemotronHConfig",
        {**_HEAD, "layers_block_type": ["mamba", "mlp", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 32}
        | {"ssm_state_size": 8, "n_groups": 2, "mlp_hidden_act": "relu2"},
    ),
}


def tiny(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of `family`, scaled so that its logits are far from ties."""
    class_name, settings = (FAMILIES | EXPERTS | ODD)[family]
    torch.manual_seed(seed)
    config = getattr(transformers, class_name)(**{**settings, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim in (2, 3):
                parameter.normal_(0.0, 0.25 if "embed" not in name else 0.5)
            elif "bias" in name:
                parameter.normal_(0.0, 0.1)
    return model


def prompt(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, length), generator=generator)


def plan_of(model: Any, kind: str, keep: float = 0.5) -> Plan:
    dense = Plan.dense(model)
    widths = dense.model.intermediate_sizes
    generator = torch.Generator().manual_seed(7)

    def some(width: int) -> torch.Tensor:
        return torch.randperm(width, generator=generator)[: max(1, round(keep * width))].sort().values

    clusters = None
    if kind == "static":
        policies: list[Any] = [Static(some(w)) if w else Dense() for w in widths]
    elif kind == "similar":
        policies = [Similar(torch.stack([some(w), some(w)])) if w else Dense() for w in widths]
        clusters = Clusters(1, 0.4, keep, "signed", torch.rand(2, widths[1], generator=generator))
    else:
        policies = [CoreNeurons(0.4, keep, kind) if w else Dense() for w in widths]  # type: ignore[arg-type]
    layers = tuple(LayerPlan(policy) for policy in policies)
    return Plan(layers, dense.model, {"method": kind}, clusters=clusters)


def sparse_of(weights: Weights, layer: int, policy: NeuronPolicy) -> SparseMLP:
    """What a policy makes of a layer's MLP."""
    pack = build(policy, brick_of(weights.anatomy, layer)).pack
    assert pack is not None
    return weights.sparse(layer, pack)


def greedy(model: Any, ids: torch.Tensor, new: int = 16, **options: Any) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **options}
    return model.generate(ids, max_new_tokens=new, **options)


class NoTokenizer:
    """Stands where a tokenizer has to be given and texts are given as ids."""

    bos_token_id = 1
    eos_token_id = None
    pad_token_id = 0

    def __call__(self, text: Any, **options: Any) -> Any:
        ids = [5] if isinstance(text, str) else [[5] for _ in text]
        return BatchEncoding({"input_ids": ids})

    def batch_decode(self, ids: torch.Tensor, **options: Any) -> list[str]:
        return [""] * len(ids)


class Spelled(NoTokenizer):
    """A token for every character."""

    eos_token_id = 3

    def __call__(self, text: Any, **options: Any) -> Any:
        ids = [[5 + ord(c) % 100 for c in row] for row in ([text] if isinstance(text, str) else text)]
        return BatchEncoding({"input_ids": ids[0] if isinstance(text, str) else ids})

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        return ["".join("x" for token in row if token not in (0, 3)) for row in ids]

    def decode(self, ids: Any, **options: Any) -> str:
        return self.batch_decode([ids])[0]
