"""Tiny random models of every supported family: the same code paths as real models, in milliseconds."""

from __future__ import annotations

import string

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvq_calib.model.compat import states_are_common

#: Tried with 5.23.0; 5.2.0 looks at the mask of such a model before there is one ("meta tensors").
needs_whole_models_on_disk = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23),
    reason="all weights on disk need a newer transformers",
)

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
    "gpt_neox": {
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
    "olmo2": {},
    "olmo3": {
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "rope_theta": 500000.0,  # as checkpoints write it; the default differs between releases
    },
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "stablelm": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    },
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "cohere": {"logit_scale": 0.25},
    "glm": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "ernie4_5": {"head_dim": 16},
}
"""Family (`model_type`) to what its configuration has beyond the common sizes."""

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
_GATED_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_GATED_DELTA |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}

HYBRIDS: dict[str, dict[str, object]] = {
    "qwen3_next": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        **_GATED_DELTA,
    },
    "qwen3_5_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 32,
        **_GATED_DELTA,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "head_dim": 16, **_MAMBA},
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
"""Families in which some layers keep a state: instead of keys and values, or beside them (``falcon_h1``)."""

_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
}
SHARING: dict[str, dict[str, object]] = {
    "gemma3n_text": {**_SHARED, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**_SHARED, "global_head_dim": 32},
}
"""Families of which some layers attend to others' keys and values; in ``gemma4_text`` heads differ by layer."""

_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
}
LATENT: dict[str, dict[str, object]] = {
    family: {
        "num_key_value_heads": 4,
        "kv_lora_rank": 24,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        **_EXPERTS,
    }
    for family in ("deepseek_v2", "deepseek_v3", "minicpm3")
}
"""Families with multi-head latent attention."""

UNEVEN: dict[str, dict[str, object]] = {
    "mimo_v2_flash": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 16,
        "head_dim": 16,
        "v_head_dim": 8,
        **_EXPERTS,
    },
}
"""Families of which keys and values, or layers, differ in size."""

OWN_ATTENTION: dict[str, dict[str, object]] = {
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "num_key_value_heads": None},
    "bloom": {"n_layer": 2, "n_head": 4},
    "diffllama": {},
    "doge": {},
}
"""Families that do not call the attention interface, call it twice, or use keys or values beside it."""

_INDEXER = {"index_topk": 128, "index_n_heads": 2, "index_head_dim": 16}
INDEXED: dict[str, dict[str, object]] = {
    "deepseek_v32": {**LATENT["deepseek_v3"], **_INDEXER},
    "glm_moe_dsa": {**LATENT["deepseek_v3"], **_INDEXER, "indexer_types": ["full", "full"]},
}
"""Families with an indexer, which keeps keys of its own; it chooses all tokens of a test's text here."""

INDEXED_HYBRIDS: dict[str, dict[str, object]] = {
    "qwen4_exp_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "indexed_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 128,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        **_GATED_DELTA,
    },
}
"""Families with an indexer in some layers and a state in others."""

REPEATED: dict[str, dict[str, object]] = {
    "zamba2": {
        "num_hidden_layers": 4,
        **(
            {"layer_types": ["linear_attention", "hybrid"] * 2}
            if states_are_common()
            else {"layers_block_type": ["mamba", "hybrid"] * 2}
        ),
        "hybrid_layer_ids": [1, 3],
        "use_mem_rope": True,  # 5.2 needs it
        **_MAMBA,
    },
    "hrm_text": {"head_dim": 16, "num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 1, "L_bp_cycles": [1]},
}
"""Families of which one attention module runs for several layers."""

UNTOLD: dict[str, dict[str, object]] = {"bamba": {"attn_layer_indices": [1], **_MAMBA}}
"""Families that count the tokens of each pass from 0 unless told their positions."""

PICTURES: dict[str, dict[str, object]] = {
    "git": {
        "num_key_value_heads": None,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
        },
    },
}
"""Families that write about a picture; ``git`` of 5.2 adds up positions of single tokens."""

DECODING: dict[str, dict[str, object]] = {
    "bert": {"is_decoder": True, "num_key_value_heads": None},
    "roformer": {"is_decoder": True, "num_key_value_heads": None, "embedding_size": 64},
}
"""Encoders that are causal language models by their configuration."""

FAMILIES_OF_ALL_KINDS = {
    **FAMILIES, **HYBRIDS, **SHARING, **LATENT, **UNEVEN, **OWN_ATTENTION, **INDEXED, **INDEXED_HYBRIDS, **REPEATED,
    **UNTOLD, **DECODING, **PICTURES,
}  # fmt: skip


def tiny_config(family: str, **overrides: object):
    """Return the configuration of a tiny model; `overrides` replace single fields."""
    known = FAMILIES_OF_ALL_KINDS.get(family, {})
    settings = {**_COMMON, **known, **overrides}
    return AutoConfig.for_model(family, **{name: v for name, v in settings.items() if v is not None})


def tiny_model(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """Return a random float32 model in eval mode, the same for the same arguments."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # transformers 5.2 would choose sdpa for gemma2, which leaves its softcap out
        softcap = getattr(config, "attn_logit_softcapping", None)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if softcap else None)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start at one and zero, which would hide mistakes
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            assert torch.isfinite(parameter).all(), name
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def token_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids [batch, tokens]."""
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are single ASCII characters; it fits the vocabulary of `tiny_model`."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *string.printable])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
    )
