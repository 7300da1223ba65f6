"""What a model caches, found by running it: shapes of its attention layers and their rotary embeddings."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kvq_calib.errors import ModelError, one_line
from kvq_calib.model.compat import (
    cache_of,
    keeps_keys,
    keeps_more,
    keeps_state,
    own_layers,
    states_are_common,
    uncompiled,
)
from kvq_calib.model.intercept import (
    AttentionCall,
    attention_modules,
    call_argument,
    intercept_calls,
    parameters_of,
)
from kvq_calib.model.placement import input_device
from kvq_calib.model.rope import RopeLayoutError, discover_rope, find_apply_rotary
from kvq_calib.model.states import held_bytes
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec

__all__ = ["inspect_model", "why_no_table"]

_PROBE_TOKENS = 8


_KNOWN: weakref.WeakKeyDictionary[nn.Module, KVGeometry] = weakref.WeakKeyDictionary()
#: Why a rotary embedding of a model has no table.
_NO_TABLE: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def inspect_model(model: nn.Module) -> KVGeometry:
    """Verify by two tiny forward passes that a model can be captured, and return its geometry.

    Every attention layer must come by exactly once per pass, with as many keys as values. Each attention module is
    given one and the same hidden state at every position: keys that differ between positions were rotated, and must not
    differ any more once that is undone. Where they still do, positions are encoded in another way; a layer is then taken
    for one without rotary embedding, and its keys are quantized as they are. Results are kept per model object.

    A rotary embedding whose frequencies depend on the length of the text has no table that always holds; its
    `RopeSpec` has no pairs and says `length_dependent`, and `why_no_table` gives the reason.

    Raises:
        ModelError: the model cannot be captured; the message says why.
    """
    model = uncompiled(model)
    found = _KNOWN.get(model)
    if found is None:
        found = _KNOWN[model] = _inspect(model)
    return found


def why_no_table(model: nn.Module) -> str:
    """Why a rotary embedding of an inspected model has no table, as a sentence about it; empty where each has one."""
    inspect_model(model)
    return _NO_TABLE.get(uncompiled(model), "")


def _inspect(model: nn.Module) -> KVGeometry:
    name = type(model).__name__
    text: Any = _text_config(model)
    short, far = torch.arange(_PROBE_TOKENS), _far_positions(model, text)
    # The far pass comes first, so that a rotary module that adapts to length is left as it was for short
    # ones.
    far_calls, _ = _probe(model, short if far is None else far, explicit=far is not None)
    short_calls, shared = _probe(model, short, explicit=False)
    attends_to = _attends_to(model, sorted(short_calls), shared, int(text.num_hidden_layers))

    candidates = [buffer for buffer in model.buffers() if buffer.ndim == 1 and buffer.is_floating_point()]
    passes = _Passes(short if far is None else far, short, candidates)
    specs: list[RopeSpec | str | None] = []
    for layer, call in sorted(short_calls.items()):
        rotates = [_check_layer(name, each) for each in (call, far_calls[layer])]
        specs.append(passes.rope(far_calls[layer], call) if all(rotates) else None)
    ropes = list(dict.fromkeys(spec for spec in specs if isinstance(spec, RopeSpec)))
    if reasons := [spec for spec in specs if isinstance(spec, str)]:
        _NO_TABLE[model] = reasons[0]
        ropes.append(RopeSpec(pairs=(), inv_freq=(), length_dependent=True))
    layers = [
        _geometry(call, _index(ropes, spec))
        for (_, call), spec in zip(sorted(short_calls.items()), specs, strict=True)
    ]
    return KVGeometry(
        layers=tuple(layers),
        ropes=tuple(ropes),
        attends_to=attends_to,
        state_bytes=_state_bytes(model),
    )


def _attends_to(
    model: nn.Module, called: list[int], shared: dict[int, int], expected: int
) -> tuple[int | None, ...]:
    """See :class:`KVGeometry`; checks that layers without keys and values keep what a cache can keep for them.

    Args:
        model: of which layers ``called`` attend to keys and values of their own.
        called: their numbers.
        shared: by the number of each layer that attends to another's, the other's.
        expected: layers of the model.
    """
    name = type(model).__name__
    own: list[Any] = own_layers(model.config)
    missing = [
        layer
        for layer in range(expected)
        if layer not in called and layer not in shared and (layer >= len(own) or keeps_keys(own[layer]))
    ]
    if missing:
        raise ModelError(
            f"{name} cannot be captured: {len(missing)} of its {expected} layers do not call "
            "transformers' attention interface"
        )
    if not called:
        raise ModelError(f"{name} has no layer that caches keys and values: there is nothing to quantize")
    if any(layer >= max(expected, len(called)) for layer in called):
        raise ModelError(f"{name} cannot be captured: its attention layers are not numbered without a gap")
    for layer in own:
        if keeps_more(layer):
            raise ModelError(
                f"{name} cannot generate with a packed cache: its cache layers keep more than keys and values "
                f"({type(layer).__name__})"
            )
    if called == list(range(max(expected, len(called)))):
        return ()
    sources = {**shared, **{layer: layer for layer in called}}
    return tuple(called.index(sources[layer]) if layer in sources else None for layer in range(expected))


def _state_bytes(model: Any) -> int:
    """Bytes that layers keep of one sequence beside keys and values."""
    if not any(map(keeps_state, own_layers(model.config))):
        return 0
    ids = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64, device=input_device(model))
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True))
    if cache is None:
        raise ModelError(f"{type(model).__name__} keeps what it caches in its modules, not in a cache")
    return held_bytes(cache)


def _text_config(model: nn.Module) -> Any:
    """The configuration of a model whose kind can be captured."""
    name = type(model).__name__
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model; only decoder-only language models can be captured"
        )
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise ModelError(
            f"{name} caches multi-head latent attention, not keys and values; it cannot be captured"
        )
    kinds = getattr(text, "layer_types", None) or []
    without = sorted({kind for kind in kinds if "attention" not in kind or kind.startswith("linear")})
    if without and not states_are_common():
        raise ModelError(
            f"{name} has layers without keys and values ({', '.join(without)}), and transformers "
            f"{transformers.__version__} keeps their state in a cache class of the model's own; use 5.5 or newer"
        )
    return text


def _far_positions(model: nn.Module, text: Any) -> Tensor | None:
    """Positions from which frequencies can be told, int64 [T]; None where the model takes no positions."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    limit = int(getattr(text, "max_position_embeddings", 0) or 2048)
    powers = [2**k for k in range(15) if 2**k < limit]
    return torch.tensor(sorted({0, 3, *powers, limit - 1}))


def _index(ropes: Sequence[RopeSpec], spec: RopeSpec | str | None) -> int | None:
    """Where a layer's rotary embedding stands; one that has no table is the last."""
    if spec is None:
        return None
    return ropes.index(spec) if isinstance(spec, RopeSpec) else len(ropes) - 1


def _geometry(call: AttentionCall, rope: int | None) -> LayerGeometry:
    window = call.kwargs.get("sliding_window")
    head_dim, value_head_dim = call.key.shape[-1], call.value.shape[-1]
    return LayerGeometry(
        num_query_heads=call.query.shape[1],
        num_kv_heads=call.key.shape[1],
        head_dim=head_dim,
        value_head_dim=None if value_head_dim == head_dim else value_head_dim,
        sliding_window=int(window) if window else None,
        rope=rope,
    )


def _probe(
    model: nn.Module, positions: Tensor, *, explicit: bool
) -> tuple[dict[int, AttentionCall], dict[int, int]]:
    """Run one sequence through the model, every attention module seeing one hidden state at all positions.

    Returns:
        By number the calls of layers with keys and values of their own; and of layers that attend to another's, the
        other's number.
    """
    name = type(model).__name__
    calls: dict[int, AttentionCall] = {}
    shared: dict[int, int] = {}

    def handler(call: AttentionCall) -> None:
        if call.layer in calls or call.layer in shared:
            raise ModelError(
                f"{name} cannot be captured: layer {call.layer} computes attention more than once"
            )
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
    with torch.no_grad(), intercept_calls(model, handler), _level(model):
        try:
            model(**inputs)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{name} cannot be captured: a pass over {len(positions)} tokens failed ({one_line(error)})"
            ) from error
    return calls, shared


@contextmanager
def _level(model: nn.Module) -> Iterator[None]:
    """Give every attention module one and the same hidden state at all positions."""

    def level(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = call_argument(module, "hidden_states", args, kwargs)
        if not (isinstance(hidden, Tensor) and hidden.ndim == 3):
            return None
        # Noise of unit variance, as after a norm; a token's own state can be zero (padding tokens are).
        state = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        hidden = state.to(hidden.device, hidden.dtype).expand_as(hidden)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden}
        at = parameters_of(type(module).forward).index("hidden_states")
        return (*args[:at], hidden, *args[at + 1 :]), kwargs

    with ExitStack() as stack:
        for module in attention_modules(model):
            if hasattr(module, "config"):
                stack.callback(module.register_forward_pre_hook(level, with_kwargs=True).remove)
        yield


def _check_layer(name: str, call: AttentionCall) -> bool:
    """Check shapes of one layer; return whether its keys were rotated, in a way that can be undone.

    Positions that are encoded otherwise stay in the keys, which are then quantized as they are.
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
    largest = float(key.abs().max())
    if largest == 0.0:
        raise ModelError(f"{name} cannot be captured: all keys of layer {layer} are zero")
    tolerance = max(1e-4, 8 * float(torch.finfo(key.dtype).eps)) * largest
    return _spread(key) > tolerance and _can_be_undone(call, tolerance)


def _can_be_undone(call: AttentionCall, tolerance: float) -> bool:
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
    return _spread(plain) <= tolerance and restored <= tolerance


def _spread(keys: Tensor) -> float:
    """The largest difference between positions, of the latter half: a convolution sees nothing before the first ones."""
    half = keys[:, :, keys.shape[2] // 2 :]
    return float((half - half[:, :, :1]).abs().max())


@dataclass(frozen=True, eq=False)
class _Passes:
    """The two passes that tell a rotary embedding.

    Attributes:
        far, short: positions of each, int64 [T].
        candidates: one-dimensional tensors of the model, its frequencies perhaps among them.
    """

    far: Tensor
    short: Tensor
    candidates: list[Tensor]

    def rope(self, far_call: AttentionCall, short_call: AttentionCall) -> RopeSpec | str:
        """A layer's rotary embedding, or why it has no table."""
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
