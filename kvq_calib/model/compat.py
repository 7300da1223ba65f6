"""All private names of transformers and torch that the package uses, and all differences between their releases.

There is one function for each, which states the releases. No other module checks versions.
"""

from __future__ import annotations

import inspect
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, DynamicCache, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvq_calib.errors import ModelError

__all__ = [
    "attention_entries",
    "attention_implementation",
    "cache_of",
    "can_crop",
    "count_layers",
    "crop_takes_removed",
    "decoding_hint",
    "fill_state",
    "in_backward",
    "keeps_keys",
    "keeps_more",
    "keeps_state",
    "layer_attribute",
    "new_tokens",
    "own_layers",
    "register_state",
    "softcap_implementation",
    "state_alone",
    "state_flags",
    "state_tensors",
    "states_are_common",
    "stop_recording",
    "uncompiled",
    "with_cache",
]

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_CROP_TAKES_REMOVED = "tokens_to_remove" in inspect.signature(Cache.crop).parameters
#: The base of cache layers with a state; it does not exist up to transformers 5.4.
_STATE: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
#: Cache layers that keep only keys and values, and perhaps such a state.
_PLAIN: set[Any] = {
    DynamicLayer,
    DynamicSlidingWindowLayer,
    getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None),
    getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", None),
}


def with_cache(cache: Any) -> dict[str, Any]:
    """The argument that gives a model, or its `generate`, a cache.

    It is named `past_key_values` up to transformers 5.23, and `cache` from 5.24 on.
    """
    return {_CACHE: cache}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model called with `use_cache=True`, if any. Names are as in `with_cache`."""
    return getattr(output, _CACHE, None)


def crop_takes_removed() -> bool:
    """Whether `Cache.crop(0)` keeps all tokens.

    Up to transformers 5.14, the argument is the length to keep, or minus the number of tokens to remove. From 5.15 on,
    it is only the latter.
    """
    return _CROP_TAKES_REMOVED


def own_layers(config: Any) -> list[Any]:
    """The empty cache layers that transformers makes for a model of this configuration.

    There may be fewer than layers of the model: up to transformers 5.14, the last layers that share keys and values
    have none.
    """
    # Some families define special layers in the model's file, which this imports.
    MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return list(DynamicCache(config=config).layers)


def count_layers(config: Any) -> int:
    """The number of layers of a model with this configuration.

    Raises:
        ModelError: the configuration has no such number.
    """
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ModelError(
            f"the configuration of {config.model_type} does not say how many layers there are (num_hidden_layers), so "
            "what the model caches cannot be told"
        )
    return count


def decoding_hint(config: Any) -> str:
    """What makes a causal model of an encoder, as the end of a sentence, where its configuration has that."""
    if getattr(config, "is_decoder", True):
        return ""
    return '; if it is to be one, set "is_decoder": true in its config.json'


def states_are_common() -> bool:
    """Whether transformers has common cache layers for states (linear attention, convolution).

    It has them from 5.5 on. Before, every such model had a separate cache class.
    """
    return _STATE is not None


def keeps_keys(layer: Any) -> bool:
    """Whether a cache layer keeps keys and values."""
    return isinstance(layer, CacheLayerMixin)


def keeps_state(layer: Any) -> bool:
    """Whether a cache layer keeps a state, alone or beside keys and values."""
    return _STATE is not None and isinstance(layer, _STATE)


def keeps_more(layer: Any) -> bool:
    """Whether a cache layer of transformers keeps other tensors beside keys and values, such as keys of an indexer."""
    return keeps_keys(layer) and type(layer) not in _PLAIN


def register_state(kind: type) -> None:
    """Register a class as one that keeps a state, which `Cache` checks before it passes states on."""
    if _STATE is not None:
        _STATE.register(kind)


def state_tensors(layer: Any) -> dict[str, Tensor]:
    """All present tensors of a cache layer by name, without its keys and values.

    In older releases (5.5) a layer has one tensor of each kind, in newer ones (5.24) a dictionary.
    """
    if not keeps_state(layer):
        return {name: value for name, value in _held(layer).items() if isinstance(value, Tensor)}
    found: dict[str, Tensor] = {}
    for kind in ("conv", "recurrent"):
        held = getattr(layer, f"{kind}_states")
        for number, tensor in (held if isinstance(held, dict) else {0: held}).items():
            if tensor is not None:
                found[f"{kind}.{number}"] = tensor
    return found


def state_flags(layer: Any) -> dict[str, Tensor]:
    """Counters of a state by name, int64 without dimensions.

    States of linear attention and of convolutions have none.
    """
    if keeps_state(layer):
        return {}
    return {name: torch.tensor(int(v)) for name, v in _held(layer).items() if isinstance(v, int)}


def _held(layer: Any) -> dict[str, Any]:
    """Public attributes of an object and entries of its dictionaries, by name, without keys and values."""
    found: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if not name.startswith("_") and name not in ("keys", "values"):
            found |= (
                {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            )
    return found


def _fill_held(layer: Any, tensors: dict[str, Tensor]) -> None:
    known = _held(layer)
    for name, tensor in tensors.items():
        before = known[name]
        value = type(before)(tensor.item()) if isinstance(before, int) else tensor
        name, _, key = name.partition(".")
        if key:
            getattr(layer, name)[key] = value
        else:
            setattr(layer, name, value)


def fill_state(layer: Any, tensors: dict[str, Tensor]) -> None:
    """Fill an empty state with the results of `state_tensors` and `state_flags` for another."""
    if not keeps_state(layer):
        _fill_held(layer, tensors)
        return
    for name, tensor in sorted(tensors.items()):  # convolutions first: up to 5.5 they determine the dtype
        kind, number = name.split(".")
        several = isinstance(getattr(layer, f"{kind}_states"), dict)
        which = {"state_idx": int(number)} if several else {}
        layer.lazy_initialization(**{f"{kind}_states": tensor}, **which)
        state_tensors(layer)[name].copy_(tensor)
        if several:
            layer.has_previous_state[int(number)] = True
        else:
            layer.has_previous_state = True


def can_crop(state: Any, kept: int = 0, removed: int = 0) -> bool:
    """Whether tokens can be removed from a state.

    They can if the state has an entry for each token. In newer releases (5.24; not 5.5) they can, too, if the state is
    of convolutions only and recorded what this needs (`activate_past_recording`).

    Args:
        state: the state.
        kept: number of tokens to keep.
        removed: number of tokens to remove.
    """
    if not keeps_state(state):
        return bool(state.is_croppable and not state.is_sliding)
    if not (getattr(state, "record_past", False) and state.is_croppable):
        return False
    held = ((state.conv_kernel_size[number], inputs) for number, inputs in state.conv_states.items())
    return all(inputs is None or inputs.shape[-1] - removed >= min(size, kept) for size, inputs in held)


def stop_recording(state: Any) -> None:
    """Let a state from which no token can be removed keep no more than the next pass needs."""
    if getattr(state, "record_past", False):
        state.crop(0)
        state.record_past = False


def state_alone(layer: Any) -> Any:
    """A cache layer for the other states of an empty cache layer. It never gets keys and values."""
    if not (keeps_keys(layer) and keeps_state(layer)):
        return layer
    several = getattr(layer, "number_of_states", None)
    return cache_utils.LinearAttentionLayer(**({} if several is None else {"number_of_states": several}))


def new_tokens(query: int | Tensor) -> int:
    """The number of new tokens, from the argument of a cache layer's `get_mask_sizes`.

    Up to transformers 5.3, that method gets the positions of the new tokens; from 5.5 on, their number.
    """
    return query if isinstance(query, int) else int(query.shape[0])


def attention_implementation(config: Any) -> str | None:
    """The name of the attention implementation in a configuration ("sdpa", "eager", ...); `None` if there is none.

    `_attn_implementation` is private in all releases from 5.2 to 5.24, and there is no public name.
    """
    name = getattr(config, "_attn_implementation", None)
    return name if isinstance(name, str) else None


def layer_attribute(config: Any, name: str) -> Any:
    """An attribute of a configuration: `None` if there is none, a list with one entry per layer if layers differ.

    From transformers 5.15 on, a configuration can differ by layer (`per_layer_config`). Then reading such an attribute
    is an error.
    """
    layers = [getattr(layer, name, None) for layer in getattr(config, "per_layer_config", None) or ()]
    if not layers:
        return getattr(config, name, None)
    return layers[0] if all(value == layers[0] for value in layers) else layers


def softcap_implementation(config: Any) -> str | None:
    """The attention implementation to request if the default would be wrong.

    Up to transformers 5.22, the default for a model with capped attention scores is sdpa, which silently ignores the
    cap.
    """
    return "eager" if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) else None


@lru_cache(maxsize=64)
def _families_own(
    cls: type,
) -> tuple[tuple[AttentionInterface, ...], tuple[tuple[dict[str, Any], str], ...]]:
    """Interfaces, and (namespace, name) of eager functions, in the files that define an attention class."""
    interfaces: dict[int, AttentionInterface] = {}
    eager: list[tuple[dict[str, Any], str]] = []
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        namespace = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        for name, value in list(namespace.items()):
            if isinstance(value, AttentionInterface):
                interfaces[id(value)] = value
            elif name.endswith("eager_attention_forward") and callable(value):
                eager.append((namespace, name))
    return tuple(interfaces.values()), tuple(eager)


def attention_entries(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """All dictionaries and keys in which an attention module may look up its attention function.

    These are the mapping of `AttentionInterface` for all models, the mapping of a family that overrides some
    implementations, and the name of a family's eager function in the file that defines it. The two mappings are private
    (`_global_mapping`, `_local_mapping`) in all releases from 5.2 to 5.24.
    """
    cls: Any = type(module)
    interfaces, eager = _families_own(cls)
    mappings = [AttentionInterface._global_mapping, *(interface._local_mapping for interface in interfaces)]
    return [*((mapping, name) for mapping in mappings for name in list(mapping)), *eager]


def in_backward() -> bool:
    """Whether this thread runs a backward pass; the function is private in torch 2.6 to 2.13."""
    return torch._C._current_graph_task_id() != -1


def uncompiled(model: Any) -> Any:
    """The module inside the wrapper of `torch.compile`; its name is private in torch 2.6 to 2.13."""
    return getattr(model, "_orig_mod", model)
