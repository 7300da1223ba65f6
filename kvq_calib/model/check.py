"""Checks from a configuration whether a model can be calibrated and used, with a small model of random weights.

The answer depends on the code of a family and on the kinds of layers in a model, not on its weights. So the checks at
the start of a calibration are run on a model with a few layers, narrow feed-forward parts, few experts and a small
vocabulary.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kvq_calib.errors import ModelError, one_line
from kvq_calib.model.compat import count_layers, keeps_keys, own_layers, softcap_implementation
from kvq_calib.model.hub import quiet
from kvq_calib.model.inspect import check_generation, inspect_model
from kvq_calib.model.probe import Serving
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["Verdict", "check_configuration", "fill_zeros", "words_of"]

#: Settings that make a model small without changing attention, under the names that families use.
_SMALL = {
    "vocab_size": 128,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size_per_layer_input": 128,
    "pad_token_id": 0,
}
#: What is made smaller: layers, widths, numbers of heads. If such a model cannot be built, less is made smaller.
_ATTEMPTS = ((True, True, True), (True, True, False), (True, False, False), (False, True, False))
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
    layers = count_layers(config)
    failure: Exception | None = None
    for small in _smaller(config):
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(
                    small, dtype=torch.float32, attn_implementation=softcap_implementation(small)
                )
                fill_zeros(model)
        except Exception as error:  # a family may raise anything for these sizes
            failure = failure or error
            continue
        model = model.eval().requires_grad_(False)
        logging.getLogger("kvq_calib.model.inspect").disabled = True
        try:
            geometry = inspect_model(model)
            return Verdict(geometry, check_generation(model, geometry), layers)
        finally:
            logging.getLogger("kvq_calib.model.inspect").disabled = False
    assert failure is not None
    raise ModelError(
        f"a small model of this configuration cannot be built ({one_line(failure)}); calibrate to see"
    )


def fill_zeros(model: nn.Module) -> None:
    """Set parameters that are all zeros to small random values, because zeros would hide their effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.add_(0.1 * torch.randn_like(parameter))


def _smaller(config: Any) -> Iterator[Any]:
    """Configurations to try, smallest first."""
    for shallow, narrow, thin in _ATTEMPTS:
        small = copy.deepcopy(config)
        text = small.get_text_config(decoder=True)
        if narrow:
            for name, size in _SMALL.items():
                if isinstance(getattr(text, name, None), int):
                    setattr(text, name, size)
        if thin:
            _thin(text)
        if shallow:
            _cut(text, config)
        yield small


def _thin(text: Any) -> None:
    """Reduce the number of heads, keeping their size and the ratio of query heads to key-value heads."""
    heads, own = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if not isinstance(heads, int) or not isinstance(own, int | None):
        return
    share = math.gcd(heads, own or heads)
    text.hidden_size = int(text.hidden_size) // heads * (heads // share)
    text.num_attention_heads = heads // share
    if own is not None:
        text.num_key_value_heads = own // share


def _cut(text: Any, config: Any) -> None:
    """Keep the first layers, so many that every kind of layer is among them, if these are few."""
    whole = own_layers(config)
    kinds = list(getattr(text, "layer_types", None) or [type(layer).__name__ for layer in whole])
    if getattr(text, "num_kv_shared_layers", None) or not kinds:
        return
    keys = next((n for n, layer in enumerate(whole) if keeps_keys(layer)), 0)
    depth = max(2, keys + 1, *(kinds.index(kind) + 1 for kind in set(kinds)))
    depth = min(depth, keys + _MOST_LAYERS)
    layers = int(text.num_hidden_layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, value[:depth])
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
