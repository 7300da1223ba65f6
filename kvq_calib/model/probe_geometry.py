"""Finds by running a model what it caches: shapes of its attention layers, and their rotary embeddings.

Keys and values are observed where attention is called, or where they are passed to the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from kvq_calib.errors import ModelError, NothingToQuantizeError, one_line, told_by
from kvq_calib.model.compat import (
    cache_of,
    count_layers,
    decoding_hint,
    keeps_keys,
    keeps_more,
    keeps_state,
    layer_attribute,
    own_layers,
    with_cache,
)
from kvq_calib.model.intercept import (
    AttentionCall,
    Handler,
    attention_modules,
    call_argument,
    intercept_calls,
    parameters_of,
)
from kvq_calib.model.own_cache import own_class, own_state
from kvq_calib.model.placement import input_device
from kvq_calib.model.rope import RopeLayoutError, discover_rope, find_apply_rotary
from kvq_calib.model.states import held_bytes
from kvq_calib.model.updates import intercept_updates
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec

__all__ = ["Found", "Interceptor", "probe_geometry"]

_PROBE_TOKENS = 8
_NOTHING = "{} has no layer that caches keys and values: there is nothing to quantize"


#: An interception that passes keys and values to a handler while a model runs.
Interceptor = Callable[[nn.Module, Handler], AbstractContextManager[None]]


@dataclass(frozen=True)
class Found:
    """What a model caches.

    Attributes:
        geometry: geometry of the model.
        no_table: why a rotary embedding of it has no table; empty if all have one.
    """

    geometry: KVGeometry
    no_table: str = ""


def probe_geometry(model: nn.Module, intercept: Interceptor) -> Found:
    """Observe two short passes; see :func:`kvq_calib.model.inspect.inspect_model`.

    Args:
        model: the model.
        intercept: where keys and values are observed.

    Raises:
        ModelError: they cannot be observed; the message says why in one line.
    """
    name = type(model).__name__
    text: Any = _text_config(model)
    count = count_layers(model.config)
    if not any(map(keeps_keys, own_layers(model.config))):
        raise NothingToQuantizeError(_NOTHING.format(name))
    if intercept is intercept_calls:
        for layer in own_layers(model.config):
            if keeps_more(layer):  # the model itself chooses the keys that a query attends to
                kind = type(layer).__name__
                raise ModelError(f"its cache layers keep more than keys and values ({kind})")
    short, far = torch.arange(_PROBE_TOKENS), _far_positions(model, text)
    # The far pass comes first, so that a rotary module that adapts to the length ends in its state for short texts.
    far_calls, _ = _probe(model, intercept, short if far is None else far, explicit=far is not None)
    short_calls, shared = _probe(model, intercept, short, explicit=False)
    if intercept is not intercept_calls:
        _check_own_cache(model)
    if missing := _missing(model, set(short_calls) | set(shared), count):
        do = (
            "call transformers' attention interface"
            if intercept is intercept_calls
            else "give a cache what they keep"
        )
        raise ModelError(f"{name} cannot be captured: {missing} of its {count} layers do not {do}")
    attends_to = _attends_to(model, sorted(short_calls), shared, count)

    candidates = [buffer for buffer in model.buffers() if buffer.ndim == 1 and buffer.is_floating_point()]
    passes = _Passes(short if far is None else far, short, candidates)
    specs: list[RopeSpec | str | None] = []
    for layer, call in sorted(short_calls.items()):
        rotates = [_check_layer(name, each) for each in (call, far_calls[layer])]
        specs.append(passes.rope(far_calls[layer], call) if all(rotates) else None)
    ropes = list(dict.fromkeys(spec for spec in specs if isinstance(spec, RopeSpec)))
    reasons = [spec for spec in specs if isinstance(spec, str)]
    if reasons:
        ropes.append(RopeSpec(pairs=(), inv_freq=(), length_dependent=True))
    layers = [
        _geometry(call, _index(ropes, spec), _query_heads(text, call))
        for (_, call), spec in zip(sorted(short_calls.items()), specs, strict=True)
    ]
    state_bytes, per_token = _state_bytes(model)
    geometry = KVGeometry(
        layers=tuple(layers),
        ropes=tuple(ropes),
        attends_to=attends_to,
        state_bytes=state_bytes,
        state_bytes_per_token=per_token,
    )
    return Found(geometry, *reasons[:1])


def _check_own_cache(model: Any) -> None:
    """Raise an error with the reason if a model keeps nothing in a cache of transformers or of its own class."""
    if own_class(model) is not None:
        return
    name = type(model).__name__
    ids = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64, device=input_device(model))
    try:
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=True)
    except Exception:  # then an earlier check gives the reason
        return
    cache = cache_of(output)
    if cache is None and not isinstance(output, tuple):
        raise NothingToQuantizeError(
            f"{name} keeps no keys and values in a cache: there is nothing to quantize{decoding_hint(model.config)}"
        )
    if cache is not None and not hasattr(cache, "update"):
        raise NothingToQuantizeError(
            f"{name} keeps no keys and values in its cache ({type(cache).__name__}): there is nothing to quantize"
        )
    if cache is not None and not isinstance(cache, DynamicCache | EncoderDecoderCache):
        raise ModelError(
            f"{name} cannot be captured: it keeps what it caches in a class of its own ({type(cache).__name__})"
        )


def _missing(model: nn.Module, seen: set[int], expected: int) -> int:
    """Number of layers that keep keys and values but were not observed."""
    own: list[Any] = own_layers(model.config)
    if own_class(model) is not None:  # transformers does not know which layers these are
        return len(_updated(model) - seen)
    return sum(
        layer not in seen and (layer >= len(own) or keeps_keys(own[layer])) for layer in range(expected)
    )


def _updated(model: nn.Module) -> set[int]:
    """Numbers of the layers that pass keys and values to their cache."""
    found: set[int] = set()
    ids = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64, device=input_device(model))
    with torch.no_grad(), intercept_updates(model, lambda call: found.add(call.layer)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return found


def _attends_to(
    model: nn.Module, called: list[int], shared: dict[int, int], expected: int
) -> tuple[int | None, ...]:
    """See :class:`KVGeometry`. Checks that a cache supports what layers without keys and values keep.

    Args:
        model: the model.
        called: numbers of the layers with their own keys and values.
        shared: for each layer that attends to another layer's keys and values, the number of the other.
        expected: number of layers of the model.
    """
    name = type(model).__name__
    if not called:
        raise NothingToQuantizeError(_NOTHING.format(name))
    if any(layer >= max(expected, len(called)) for layer in called):
        raise ModelError(f"{name} cannot be captured: its attention layers are not numbered without a gap")
    if called == list(range(max(expected, len(called)))):
        return ()
    sources = {**shared, **{layer: layer for layer in called}}
    return tuple(called.index(sources[layer]) if layer in sources else None for layer in range(expected))


def _state_bytes(model: Any) -> tuple[int, int]:
    """Bytes of other states that layers keep for one sequence: a fixed number, and a number per token."""
    own = own_class(model) is not None
    if not own and not any(keeps_state(layer) or keeps_more(layer) for layer in own_layers(model.config)):
        return 0, 0
    held = []
    for tokens in (_PROBE_TOKENS, 2 * _PROBE_TOKENS):
        ids = torch.ones(1, tokens, dtype=torch.int64, device=input_device(model))
        state = own_state(model)
        given = {} if state is None else with_cache(state.cache)
        with torch.no_grad():
            cache = cache_of(
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **given)
            )
        if state is not None:
            held.append(state.nbytes)
        elif cache is None:
            raise ModelError(f"{type(model).__name__} keeps what it caches in its modules, not in a cache")
        else:
            held.append(held_bytes(cache))
    per_token = (held[1] - held[0]) // _PROBE_TOKENS
    return held[0] - per_token * _PROBE_TOKENS, per_token


def _text_config(model: nn.Module) -> Any:
    """The configuration of a model of a kind that can be captured."""
    name = type(model).__name__
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model; only decoder-only language models can be captured"
        )
    text = config.get_text_config(decoder=True)
    return text


def _far_positions(model: nn.Module, text: Any) -> Tensor | None:
    """Positions from which frequencies can be determined, int64 [T]; None if the model takes no positions."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    limit = int(getattr(text, "max_position_embeddings", 0) or 2048)
    powers = [2**k for k in range(15) if 2**k < limit]
    return torch.tensor(sorted({0, 3, *powers, limit - 1}))


def _index(ropes: Sequence[RopeSpec], spec: RopeSpec | str | None) -> int | None:
    """The index of a layer's rotary embedding. One without a table is the last."""
    if spec is None:
        return None
    return ropes.index(spec) if isinstance(spec, RopeSpec) else len(ropes) - 1


def _query_heads(text: Any, call: AttentionCall) -> int:
    """Number of query heads. If attention was not observed, that in the configuration, if it fits."""
    heads, own = call.query.shape[1], call.key.shape[1]
    if call.query is not call.key:
        return heads
    named = layer_attribute(text, "num_attention_heads")
    return named if isinstance(named, int) and named % own == 0 else own


def _geometry(call: AttentionCall, rope: int | None, query_heads: int) -> LayerGeometry:
    window = call.kwargs.get("sliding_window")
    head_dim, value_head_dim = call.key.shape[-1], call.value.shape[-1]
    return LayerGeometry(
        num_query_heads=query_heads,
        num_kv_heads=call.key.shape[1],
        head_dim=head_dim,
        value_head_dim=None if value_head_dim == head_dim else value_head_dim,
        sliding_window=int(window) if window else None,
        rope=rope,
        swapped=call.swapped,
    )


def _probe(
    model: nn.Module, intercept: Interceptor, positions: Tensor, *, explicit: bool
) -> tuple[dict[int, AttentionCall], dict[int, int]]:
    """Run one sequence through the model, with the same hidden state at all positions of an attention module.

    If only the second of the two cached tensors depends on the position, it is the keys.

    Returns:
        The calls of layers with their own keys and values, by number; and for layers that attend to another layer's
        keys and values, the number of the other.
    """
    name = type(model).__name__
    calls: dict[int, AttentionCall] = {}
    shared: dict[int, int] = {}

    def handler(call: AttentionCall) -> None:
        if call.layer in calls or call.layer in shared:
            does = (
                "computes attention" if intercept is intercept_calls else "hands keys and values to its cache"
            )
            raise ModelError(f"{name} cannot be captured: layer {call.layer} {does} more than once")
        if intercept is not intercept_calls:
            if call.key.data_ptr() == call.value.data_ptr():
                raise ModelError(
                    f"{name} cannot be captured: layer {call.layer} caches one tensor as keys and as values, which "
                    "would be stored twice"
                )
            calls[call.layer] = call.swap() if _only_values_turn(call) else call
            return
        for number, other in calls.items():
            if call.key.untyped_storage().data_ptr() == other.key.untyped_storage().data_ptr():
                if call.value.untyped_storage().data_ptr() != other.value.untyped_storage().data_ptr():
                    raise ModelError(
                        f"{name} cannot be captured: layer {call.layer} uses keys of layer {number} without its values"
                    )
                shared[call.layer] = number
                return
        calls[call.layer] = call

    device = input_device(model)
    ids = torch.ones(1, len(positions), dtype=torch.int64, device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if explicit:
        inputs["position_ids"] = positions[None].to(device)
    with torch.no_grad(), intercept(model, handler), _level(model):
        try:
            model(**inputs)
        except ModelError:
            raise
        except Exception as error:
            failure = error
        else:
            return calls, shared
    _check_runs(model, inputs)
    if intercept is not intercept_calls:
        _check_own_cache(model)
    raise ModelError(
        f"{name} cannot be captured: a pass over {len(positions)} tokens failed{told_by(failure)}"
    ) from failure


def _check_runs(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Raise an error with the reason if a pass fails without interception, too."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run with this configuration and transformers "
            f"{transformers.__version__} ({type(error).__name__}: {one_line(error)})"
        ) from error


@contextmanager
def _level(model: nn.Module) -> Iterator[None]:
    """Give every attention module the same hidden state at all positions."""

    def level(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = call_argument(module, "hidden_states", args, kwargs)
        if not (isinstance(hidden, Tensor) and hidden.ndim == 3):
            return None
        # Noise of unit variance, as after a norm. The state of a token may be zero, as for padding.
        state = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        hidden = state.to(hidden.device, hidden.dtype).expand_as(hidden)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden}
        at = parameters_of(type(module).forward).index("hidden_states")
        return (*args[:at], hidden, *args[at + 1 :]), kwargs

    with ExitStack() as stack:
        for module in attention_modules(model, unnumbered=True):
            if hasattr(module, "config"):
                stack.callback(module.register_forward_pre_hook(level, with_kwargs=True).remove)
        yield


def _check_layer(name: str, call: AttentionCall) -> bool:
    """Check the shapes of one layer. Return whether its keys were rotated in a way that can be undone.

    Keys with positions encoded in another way are quantized as they are.
    """
    layer, key, value = call.layer, call.key, call.value
    if key.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise ModelError(
            f"{name} cannot be captured: layer {layer} has keys of shape {tuple(key.shape[1:])} and values "
            f"of shape {tuple(value.shape[1:])} (heads, tokens, channels)"
        )
    if call.query.shape[1] % key.shape[1] or call.query.shape[-1] != key.shape[-1]:
        raise ModelError(f"{name} cannot be captured: queries and keys of layer {layer} do not match")
    if not bool(torch.isfinite(key).all()):
        raise ModelError(f"{name} cannot be captured: layer {layer} gives keys that are not finite")
    if not bool(key.any()):
        raise ModelError(f"{name} cannot be captured: all keys of layer {layer} are zero")
    return _spread(key) > _tolerance(key) and _can_be_undone(call)


def _only_values_turn(call: AttentionCall) -> bool:
    """Whether the second of the two cached tensors depends on the position, and the first does not."""
    turns = [_spread(x) > _tolerance(x) for x in (call.key, call.value)]
    return turns == [False, True]


def _tolerance(x: Tensor) -> float:
    return max(1e-4, 8 * float(torch.finfo(x.dtype).eps)) * float(x.abs().max())


def _can_be_undone(call: AttentionCall) -> bool:
    """Whether keys that depend on the position can be un-rotated so that they do not."""
    key, embeddings = call.key, call.position_embeddings
    if (
        find_apply_rotary(call.module) is None
        or not (isinstance(embeddings, tuple | list) and len(embeddings) == 2)
        or not all(isinstance(e, Tensor) and e.is_floating_point() for e in embeddings)
    ):
        return False
    try:
        rotation = call.rotation()
        plain = rotation.unrotate(key)
        restored = float((rotation.rotate(plain) - key).abs().max())
    except (RuntimeError, RopeLayoutError):
        return False
    return max(_spread(plain), restored) <= _tolerance(key)


def _spread(keys: Tensor) -> float:
    """Largest difference between positions in the second half, because a convolution has no input before the first."""
    half = keys[:, :, keys.shape[2] // 2 :]
    return float((half - half[:, :, :1]).abs().max())


@dataclass(frozen=True, eq=False)
class _Passes:
    """The two passes that determine a rotary embedding.

    Attributes:
        far, short: positions of each, int64 [T].
        candidates: one-dimensional tensors of the model, which may include its frequencies.
    """

    far: Tensor
    short: Tensor
    candidates: list[Tensor]

    def rope(self, far_call: AttentionCall, short_call: AttentionCall) -> RopeSpec | str:
        """The rotary embedding of a layer, or why it has no table."""
        rotation, near = far_call.rotation(), short_call.rotation()
        assert rotation.cos is not None
        assert near.cos is not None
        shared = [(int((self.far == p).nonzero()), int(p)) for p in self.short if bool((self.far == p).any())]
        at_far, at_short = (torch.tensor(index) for index in zip(*shared, strict=True))
        if not torch.equal(
            rotation.cos[:, at_far.to(rotation.cos.device)], near.cos[:, at_short.to(near.cos.device)]
        ):
            return "its frequencies depend on the length of the sequence"
        try:
            return discover_rope(rotation, self.far, far_call.key.shape[-1], candidates=self.candidates)
        except RopeLayoutError as reason:
            return str(reason)
