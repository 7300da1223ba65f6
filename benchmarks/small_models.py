"""Small models with random weights of every family of causal language models, for benchmarks/models.py."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from kvq_calib.model.check import fill_zeros
from kvq_calib.model.compat import keeps_keys, layer_attribute, own_layers, states_are_common

#: Largest number of parameters of a small model.
_PARAMETERS = 150_000_000
#: Numbers of layers to try if the settings of a family have none, because in some families only later layers keep keys
#: and values. The first is from SMALL.
_DEPTHS = (None, 4, 8)

#: Fields of configurations that make a model small, under all names that families use.
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 32, "unpadded_vocab_size": 128,
    "linear_head_dim": 16, "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip
#: Parts of a configuration for encoders of pictures and sounds, which are not used here, and the fields that make them
#: small.
_PARTS = {"vision_config", "audio_config"}
_DEEP = {"num_hidden_layers", "num_blocks", "depth", "encoder_layers"}
#: Other names of the same fields in some families.
_SEQ2SEQ = {
    "d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96,
}  # fmt: skip
#: States of Mamba.
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
_PER_LAYER_INPUTS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128, "global_head_dim": 32,
}  # fmt: skip
#: Multi-head latent attention.
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
_DECODING = {"is_decoder": True}
_BYTES = {
    "hidden_size": 64, "hidden_size_global": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
_ASSISTANT = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_hidden_layers": 2, "num_kv_shared_layers": 2,
}  # fmt: skip
_ONE_CODEBOOK = {"num_codebooks": 1}
_INDEXED_HYBRID = {
    "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4, "hc_lowrank": 8,
}  # fmt: skip
#: Whether layers of Mamba have the name that all layers with a state have by now.
_NAMED = states_are_common()
_STATE = "linear_attention" if _NAMED else "mamba"
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: Further fields of single families; ``None`` leaves a field of SMALL out.
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian"), _SEQ2SEQ),
    **dict.fromkeys(("mbart", "mvp", "pegasus", "plbart", "whisper"), _SEQ2SEQ),
    **dict.fromkeys(_ENCODERS, _DECODING),
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "blt": {
        "vocab_size": 260,
        "encoder_config": _BYTES,
        "decoder_config": _BYTES,
        "global_config": _BYTES,
        "patcher_config": _BYTES,
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        **dict.fromkeys(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        ),
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 16,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe", "moe"],
        "num_nextn_predict_layers": 0,
        "num_experts_per_tok": 2,
    },
    "codegen": {"rotary_dim": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "num_key_value_heads": 4,
        "vision_config": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {
            "hidden_size": 64,
            "adapter_input_size": 64,
            "num_attention_heads": 4,
            "adapter_out_dim": 64,
        },
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "falcon": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, **_PER_LAYER_INPUTS},
    "gemma4": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, **_PER_LAYER_INPUTS},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, **_PER_LAYER_INPUTS},
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _ASSISTANT),
    "granitemoehybrid": {"layer_types": [_STATE, "full_attention" if _NAMED else "attention"], **_MAMBA},
    "gptj": {"rotary_dim": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 2, "num_encoder_layers": 2},
    "zamba2": {
        "layer_types" if _NAMED else "layers_block_type": [_STATE, "hybrid"],
        "hybrid_layer_ids": [1],
        "use_mem_rope": True,  # older releases need it
        **_MAMBA,
    },
    "hrm_text": {"L_bp_cycles": [3, 3]},  # gradients reach every cycle
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": None,
        "head_dim": 8,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    **dict.fromkeys(("musicgen", "musicgen_melody"), _ONE_CODEBOOK),
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _INDEXED_HYBRID),
    "xlnet": {
        "d_model": 64,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 96,
        **dict.fromkeys(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        ),
    },
    "xlstm": {"hidden_size": 128, "num_heads": 2, "head_dim": None, "num_attention_heads": None},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX", **_DECODING},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
        "head_dim": None,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_embds": False},
}


def small_model(family: str) -> Any:
    """A model of the family with random weights, in eval mode.

    Raises:
        Exception: any error of the family's configuration or model with these sizes.
    """
    settings = {
        name: value for name, value in {**SMALL, **EXTRA.get(family, {})}.items() if value is not None
    }
    failures: list[Exception] = []
    for nested in (None, "text_config", "decoder"):
        try:
            config = _small_config(family, settings, nested)
            with torch.device("meta"):
                count = sum(weight.numel() for weight in _model(config).parameters())
            if count > _PARAMETERS:
                raise ValueError(f"{count:,} parameters with these sizes")
            torch.manual_seed(0)
            model = _model(config).eval().requires_grad_(False)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim >= 2:
                        weight *= 4  # attention that depends on what it sees
            fill_zeros(model)
            return model
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _model(config: Any) -> Any:
    """A model of a configuration, or of the part of it that is a causal language model."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config):
        config = config.get_text_config(decoder=True)
    return kind._from_config(config, dtype=torch.float32)


def _small_config(family: str, settings: dict[str, Any], nested: str | None) -> Any:
    """A configuration with these settings, in its part `nested` if given. It has more layers if none keeps keys."""
    if _is_latent(family):
        settings = {**{name: value for name, value in settings.items() if name != "head_dim"}, **_LATENT}
        settings |= {name: value for name, value in EXTRA.get(family, {}).items() if value is not None}
    made: list[Any] = []
    failure: Exception | None = None
    for layers in (None,) if "num_hidden_layers" in EXTRA.get(family, {}) else _DEPTHS:
        sizes = settings if layers is None else {**settings, "num_hidden_layers": layers}
        if nested:
            parts = {name: value for name, value in sizes.items() if name in _PARTS}
            sizes = {**parts, nested: {name: value for name, value in sizes.items() if name not in parts}}
        try:
            made.append(AutoConfig.for_model(family, **sizes))
        except Exception as error:
            failure = failure or error
            continue
        if _keeps_keys(made[-1]):
            break
    else:
        made = made[:1]  # no layer keeps keys
    if not made:
        assert failure is not None
        raise failure
    config = made[-1]
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and part is not config.get_text_config(decoder=True):
            for name in _DEEP.intersection(vars(part)):
                setattr(part, name, 1)
    return config


def _keeps_keys(config: Any) -> bool:
    """Whether layers of a model of this configuration keep keys and values."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds and set(kinds) <= {"linear_attention", "conv", "mamba"}:  # own_layers of 5.2 does not tell
        return False
    try:
        return any(map(keeps_keys, own_layers(config)))
    except Exception:  # it does not say what its layers are
        return False


def _is_latent(family: str) -> bool:
    """Whether a family has multi-head latent attention."""
    try:
        text = AutoConfig.for_model(family).get_text_config(decoder=True)
        return bool(layer_attribute(text, "kv_lora_rank"))
    except Exception:  # some have no defaults, or do not say what their layers are
        return False
