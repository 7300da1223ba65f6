"""Checks from a configuration whether a model can be calibrated and used, with a small model of random weights.

The answer depends on the code of a family and on the kinds of layers in a model, not on its weights. So the checks at
the start of a calibration are run on a model with a few layers, narrow feed-forward parts, few experts and a small
vocabulary. Sizes in a configuration depend on each other, in other ways in every family. So it is verified that
such a model runs; if it does not, less is made smaller.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from kvq_calib.errors import ModelError, one_line
from kvq_calib.model.compat import count_layers, keeps_keys, own_layers, softcap_implementation
from kvq_calib.model.hub import quiet
from kvq_calib.model.inspect import check_generation, inspect_model
from kvq_calib.model.probe import Serving
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["Verdict", "check_configuration", "fill_zeros", "words_of"]

#: Width of feed-forward parts; hidden states hardly have it, so code that takes one for the other fails.
_WIDTH = 80
#: Width of the hidden state of models without attention heads.
_NARROW = 64
#: Settings that make a model small without changing attention, under the names that families use.
_SMALL = {
    "vocab_size": 128,
    "intermediate_size": _WIDTH,
    "ffn_dim": _WIDTH,
    "ffn_hidden_size": _WIDTH,
    "moe_intermediate_size": _WIDTH,
    "shared_expert_intermediate_size": _WIDTH,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_top_k": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size_per_layer_input": 128,
    "pad_token_id": 0,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}
#: Widths in proportion to that of the hidden state, and a factor on it whose product with it stays.
_IN_PROPORTION = ("hidden_size", "attention_hidden_size")
_FACTOR = "mamba_expand"
#: Names of the number of key-value heads, and other names of the number of layers.
_OWN_HEADS = ("num_key_value_heads", "kv_n_heads")
_DEPTHS = ("num_blocks", "num_layers")
#: Names of the kinds of all layers.
_KINDS = ("layer_types", "layers_block_type")
#: What is made smaller: layers, widths, numbers of heads. If such a model does not run, less is made smaller.
_ATTEMPTS = (
    (True, True, True),
    (False, True, True),
    (True, True, False),
    (True, False, False),
    (False, True, False),
)
#: Largest number of parameters of a small model; it has float32 weights.
_PARAMETERS = 2_000_000_000
_TOKENS = 8
#: Number of layers after the first one with keys and values.
_MOST_LAYERS = 12


@dataclass(frozen=True)
class Verdict:
    """The result for a model that can be served.

    Attributes:
        geometry: geometry of the small model, with fewer layers and heads of the same kinds as the model's.
        serving: how a packed cache serves it.
        layers: number of layers of the model.
    """

    geometry: KVGeometry
    serving: Serving
    layers: int


def check_configuration(config: Any) -> Verdict:
    """Check a model of this configuration.

    Args:
        config: configuration of the model; it is not changed.

    Raises:
        ModelError: it cannot be calibrated, or no small model can be built; the message says why in one line.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ModelError(f"{config.model_type} is not a causal language model that transformers can load")
    layers = count_layers(config)
    logger = logging.getLogger("kvq_calib.model.inspect")
    model = _small_model(config)
    logger.disabled = True
    try:
        geometry = inspect_model(model)
        return Verdict(geometry, check_generation(model, geometry), layers)
    finally:
        logger.disabled = False


def _small_model(config: Any) -> nn.Module:
    """The smallest model that runs. If none does though each was built, the largest: its refusal tells why.

    Raises:
        ModelError: some could not be built, and none of the others runs.
    """
    model: nn.Module | None = None
    unbuilt = failure = None
    for attempt in _ATTEMPTS:
        try:
            model = _built(_smaller(config, *attempt))
        except Exception as error:  # a family may raise anything for these sizes
            unbuilt = unbuilt or error
            continue
        try:
            with torch.no_grad():
                model(input_ids=torch.ones(1, _TOKENS, dtype=torch.int64), use_cache=True)
        except Exception as error:
            failure = error
        else:
            return model
    if model is not None and unbuilt is None:
        return model
    does, reason = ("be built", unbuilt) if failure is None else ("run", failure)
    assert reason is not None
    raise ModelError(
        f"a small model of this configuration cannot {does} ({one_line(reason)}); calibrate to see"
    )


def _built(config: Any) -> nn.Module:
    """A model of this configuration with random weights, in eval mode.

    Raises:
        ValueError: it would be too large.
    """
    settings = {"dtype": torch.float32, "attn_implementation": softcap_implementation(config)}
    with quiet(), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(copy.deepcopy(config), **settings).parameters()
        count = sum(weight.numel() for weight in weights)
        if count > _PARAMETERS:
            raise ValueError(f"it would have {count:,} parameters")
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config, **settings)
        fill_zeros(model)
    return model.eval().requires_grad_(False)


def fill_zeros(model: nn.Module) -> None:
    """Set parameters that are all zeros to small random values, because zeros would hide their effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def _smaller(config: Any, shallow: bool, narrow: bool, thin: bool) -> Any:
    """A copy of a configuration with fewer layers, narrower feed-forward parts, fewer heads."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    if narrow:
        for part in _parts(text):
            for name, size in _SMALL.items():
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, size)
    if thin:
        _thin(text)
    if shallow:
        _cut(text, config)
    return small


def _parts(text: Any) -> list[Any]:
    """A configuration and the configurations in it."""
    return [text, *(each for each in vars(text).values() if isinstance(each, PreTrainedConfig))]


def _thin(text: Any) -> None:
    """Reduce the number of heads, keeping their size and the ratio of query heads to key-value heads.

    A model without attention heads gets a narrow hidden state.
    """
    heads, own = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    hidden = getattr(text, "hidden_size", None)
    if heads is None and isinstance(hidden, int):
        heads = max(1, hidden // _NARROW)
    if not isinstance(heads, int) or not isinstance(own, int | None) or not isinstance(hidden, int):
        return
    share = math.gcd(heads, own or heads)
    for part in _parts(text):
        for name in _IN_PROPORTION:
            width = getattr(part, name, None)
            if isinstance(width, int) and (part is text or width == hidden):
                setattr(part, name, width // heads * (heads // share))
        for name in _OWN_HEADS:
            if own is not None and getattr(part, name, None) == own:
                setattr(part, name, own // share)
    if isinstance(factor := getattr(text, _FACTOR, None), int | float):
        setattr(text, _FACTOR, factor * share)
    if hasattr(text, "num_attention_heads"):
        text.num_attention_heads = heads // share


def _cut(text: Any, config: Any) -> None:
    """Keep the first layers, so many that every kind of layer is among them, if these are few."""
    whole = own_layers(config)
    named = next(filter(None, (getattr(text, name, None) for name in _KINDS)), None)
    kinds = list(named or [type(layer).__name__ for layer in whole])
    if getattr(text, "num_kv_shared_layers", None) or not kinds:
        return
    keys = next((n for n, layer in enumerate(whole) if keeps_keys(layer)), 0)
    depth = max(2, keys + 1, *(kinds.index(kind) + 1 for kind in set(kinds)))
    depth = min(depth, keys + _MOST_LAYERS)
    layers = int(text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, value[:depth])
    for name in _DEPTHS:
        if getattr(text, name, None) == layers:
            setattr(text, name, depth)
    text.num_hidden_layers = depth


def words_of(verdict: Verdict) -> list[str]:
    """The result in words, one fact per line."""
    geometry, serving = verdict.geometry, verdict.serving
    kinds = dict.fromkeys(
        f"heads of {layer.head_dim}"
        + ("" if layer.value_head_dim is None else f" and {layer.value_head_dim}")
        + ("" if layer.sliding_window is None else f", window {layer.sliding_window}")
        + ("" if layer.rope is not None else ", quantized as cached: no rotary embedding that can be undone")
        for layer in geometry.layers
    )
    lines = [f"caches keys and values of {'; '.join(kinds)}"]
    if serving.materialized:
        lines.append("gets them dequantized, a layer at a time: slower than attention over packed pages")
    else:
        lines.append("attends to packed pages")
    if geometry.state_bytes:
        lines.append("has layers that keep a state, which stays as it is")
    if geometry.state_bytes_per_token:
        lines.append(
            "has layers that keep more for a token than keys and values (an indexer), which stays as it is"
        )
    if any(geometry.is_shared(index) for index in range(len(geometry.layers))):
        lines.append("has layers that attend to keys and values of others, which are stored once")
    if serving.single_tokens:
        lines.append("continues a text by one token at a time only")
    return lines
