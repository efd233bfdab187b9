"""A tiny random model of every causal architecture that transformers registers.

The sizes of a default config are cut to a few dozen; what decides how a row is read (windows, selected keys,
kinds of layers, rotary positions) stays, with windows shorter than the rows of the tests.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WINDOW = 160, 12
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base "
    "encoder_hash_byte_group_vocab shape_vocab_size pronunciation_vocab_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "context_length model_max_length",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size dff dim_ff "
    "d_inner intermediate_size_mlp shared_intermediate_size dense_intermediate_size feed_forward_size "
    "expert_ffn_hidden_size",
    32: "hidden_size n_embd d_model embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim dim_model_base embedding_dim emb_dim pronunciation_embed_dim shape_embed_dim "
    "lru_width attention_hidden_size ple_embed_dim hidden_dim out_hidden_size",
    16: "moe_intermediate_size shared_expert_intermediate_size kv_lora_rank q_lora_rank o_lora_rank "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size laurel_rank "
    "hidden_size_per_layer_input router_hidden_size adapter_rank hc_lowrank gated_norm_rank d_rel "
    "qk_head_dim index_head_dim attention_head_dim",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
    "kv_channels attention_head_size mamba_d_head mamba_head_dim global_head_dim swa_head_dim "
    "linear_head_dim dim_head d_head rotary_dim query_pre_attn_scalar mamba_d_state state_size "
    "ssm_state_size time_step_rank mamba_dt_rank chunk_size mamba_chunk_size block_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "attention_heads linear_num_value_heads num_query_groups mamba_n_heads num_encoder_attention_heads "
    "num_decoder_attention_heads index_n_heads swa_num_attention_heads linear_num_heads mamba_num_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num",
    2: "num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads "
    "num_global_key_value_heads num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers num_blocks num_experts_per_tok moe_topk num_experts_per_token "
    "moe_k top_k_experts",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "mamba_n_groups n_groups mamba_ngroups first_k_dense_replace",
    WINDOW: "sliding_window window_size sliding_window_size attention_window_size local_attention "
    "attention_chunk_size local_attention_window_len keep_window_size index_topk",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
# Kept small above all but 0 in some configs, where 0 means that there are none.
_PLAIN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")
_COMPUTED = ("model_type", "transformers_version", "architectures", "dtype", "mlp_layer_types")
_COMPUTED += ("layer_types", "per_layer_config", "activation_sparsity_pattern", "_attn_implementation")

_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": "auto"},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": "auto", "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": "auto"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"layer_types": ["chunked_attention", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "index_topk_blocks": 3,
        "index_block_size": 4,
    },
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_PHI_ROPE = {"rope_type": "longrope", "rope_theta": 1e4}
_PHI_ROPE |= {"short_factor": [2.5, 2.0, 1.5, 1.0], "long_factor": [1.0, 1.5, 2.0, 2.5]}
NOT_BUILT = frozenset(
    {
        *("blt", "cohere_compass_text", "dbrx", "dots3_note", "gemma3n", "gemma4_assistant"),
        *("gemma4_unified_assistant", "musicgen", "musicgen_melody", "qwen4_exp", "reformer"),
        *("zamba", "zamba2"),
    }
)
"""Architectures whose default config transformers itself cannot build, or not without other packages."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama, dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40},
    ),
    "llama, yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}},
    ),
    "llama, llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 40,
            }
        },
    ),
    # One row of the tests has exactly 44 tokens, others fewer and more.
    **{
        f"phi3, longrope from {length}": (
            "phi3",
            {
                "rope_parameters": _PHI_ROPE | {"original_max_position_embeddings": length},
                "original_max_position_embeddings": length,
            },
        )
        for length in (43, 44)
    },
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "phi3, window": ("phi3", {"sliding_window": WINDOW}),
    "mixtral, window": ("mixtral", {"sliding_window": WINDOW}),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
}
"""Further settings under which architectures read rows in another way."""


def build_tiny(name: str, **overrides: Any) -> PreTrainedModel:
    """Build a float32 model of an architecture, whose weights are spread wide enough to show a wrong mask.

    Raises whatever transformers raises for a config that cannot be made this small.
    """
    config = _shrink(CONFIG_MAPPING[name](), _OVERRIDES.get(name, {}) | overrides)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for weight in model.parameters():
            if weight.dim() >= 2 and 0 < (spread := weight.std().item()) < 0.1:
                weight *= 0.15 / spread
    return model.eval()


def _shrink(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    settings = dict(_shrink_settings(config, overrides))
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if kinds:  # one layer of each kind
        settings["layer_types"] = kinds * 2 if len(kinds) == 1 else kinds
        settings["num_hidden_layers"] = len(settings["layer_types"])
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= overrides
    try:
        return type(config)(**settings)
    except AttributeError:  # layer_types follows from other settings
        settings |= {"num_hidden_layers": 2}
        return type(config)(**{k: v for k, v in settings.items() if not k.startswith("layer")})


def _shrink_settings(config: PreTrainedConfig, overrides: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.to_dict().items():
        if name in _COMPUTED:
            continue
        if isinstance(part := vars(config).get(name), PreTrainedConfig):
            yield name, _shrink(part, overrides)
        elif isinstance(value, list) and name == "intermediate_size":
            yield name, _SMALL[name]
        elif not isinstance(value, int) or isinstance(value, bool):
            yield name, value
        elif name in _SMALL:
            yield name, _SMALL[name] if value or name.startswith("num_key") else value
        elif name in _PLAIN_IDS:
            yield name, min(value, 3)
        else:  # a token that stands for an image or a sound is none of the tests'
            yield name, VOCABULARY - 1 if name.endswith(("token_id", "token_index")) else value
