"""Rotary position embeddings: inverted and described with the model's functions, and as a table.

transformers' attention modules rotate keys with a function `apply_rotary_pos_emb(q, k, cos, sin)` in the Python module
that defines them. Its layout (half-split, interleaved, partial) and scaling differ between families. But it is always
linear in the vector, and a rotation times a scale for each pair of channels. So calling the same function with other
cosines and sines gives its inverse and its adjoint, without model-specific code. `Rotation` is the rotation in one
pass. `discover_rope` finds its numbers (a `RopeSpec`, which is stored). `RopeTable` has them as tensors, for code that
runs without the model.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kvq_calib.schema.geometry import RopeSpec

__all__ = [
    "ApplyRotary",
    "RopeLayoutError",
    "RopeTable",
    "Rotation",
    "discover_rope",
    "find_apply_rotary",
    "rope_switch",
]

ApplyRotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`apply(q, k, cos, sin) -> (q', k')`, with heads in dimension 1, `cos` and `sin` of shape [B or 1, T, width]."""


class RopeLayoutError(ValueError):
    """No fixed table of frequencies describes the rotary embedding. The message is the reason."""


def find_apply_rotary(attention_module: nn.Module) -> ApplyRotary | None:
    """Return the `apply_rotary_pos_emb` that an attention module uses, or None if its family has none.

    It is in the Python module that defines the class or one of its bases. It is the same function for the whole family.
    """
    for cls in type(attention_module).__mro__:
        apply: ApplyRotary | None = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
        if apply is not None:
            return _for_two(apply)
    return None


@lru_cache(maxsize=64)
def _for_two(apply: Callable[..., Any]) -> ApplyRotary:
    """A function of queries and keys, also for a family whose function takes one tensor, `apply(x, cos, sin)`."""
    if tuple(inspect.signature(apply).parameters)[1:3] != ("cos", "sin"):
        return apply

    def both(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply(queries, cos, sin), apply(keys, cos, sin)

    return both


def rope_switch(config: Any) -> int | None:
    """Length of text above which a model uses other frequencies for all of it (LongRoPE); None if it never does."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    limits = [
        kind.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min(map(int, limits), default=None)


@lru_cache(maxsize=256)
def _rotated_width(apply: ApplyRotary, head_dim: int, width: int) -> int:
    """Return the number of leading channels of a head that the function takes.

    If only a part of a head is rotated, some families slice inside the function, and some before the call.
    """
    table = torch.ones(1, 1, width)
    for rotated in (head_dim, width):
        probe = torch.ones(1, 1, 1, rotated)
        try:
            _, out = apply(probe, probe, table, table)
        except RuntimeError:  # shapes that do not broadcast
            continue
        except TypeError as error:  # gptj's function takes one tensor, and the sine first
            raise RopeLayoutError("its rotary function is not called as (q, k, cos, sin)") from error
        if out.shape == probe.shape:
            return rotated
    raise RopeLayoutError(f"its rotary function takes neither {head_dim} nor {width} channels")


@lru_cache(maxsize=256)
def _turns_pairs(apply: ApplyRotary, pairs: tuple[tuple[int, int], ...], head_dim: int, width: int) -> bool:
    if width > head_dim or any(coordinate >= width for pair in pairs for coordinate in pair):
        return False
    generator = torch.Generator().manual_seed(0)
    cos, sin = torch.randn(2, 1, 5, width, generator=generator)
    x = torch.randn(1, 3, 5, head_dim, generator=generator)
    first, second = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    want = x.clone()
    a, b = x[..., first], x[..., second]
    want[..., first] = a * cos[..., first] + -b * sin[..., first]
    want[..., second] = b * cos[..., second] + a * sin[..., second]
    return torch.equal(Rotation(apply, cos, sin).rotate(x), want)


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation that an attention layer applied to the keys of a forward pass.

    Arguments and results have shape [B, H, T, D]. Arithmetic and results are at least float32. Without `apply` (a layer
    without RoPE), all three maps are the identity.

    Attributes:
        apply: the model's `apply_rotary_pos_emb`, or None.
        cos: [B or 1, T, width] as the model computed it, including attention scaling.
        sin: like `cos`.
    """

    apply: ApplyRotary | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    def rotate(self, keys: Tensor) -> Tensor:
        """Return rotated keys, as the model passes them to attention: `R k`."""
        if self.cos is None or self.sin is None:
            return keys
        return self._call(keys, self.cos, self.sin)

    def unrotate(self, rotated: Tensor) -> Tensor:
        """Return pre-RoPE keys: `R⁻¹ k`. It is exact even if RoPE is scaled (YaRN) or rounded to bfloat16."""
        if self.cos is None or self.sin is None:
            return rotated
        return self._call(rotated, *self.inverse)

    @cached_property
    def inverse(self) -> tuple[Tensor, Tensor]:
        """The cosines and sines of the inverse, at least float32."""
        assert self.cos is not None
        assert self.sin is not None
        cos, sin = _wide(self.cos), _wide(self.sin)
        norm = cos.square() + sin.square()
        return cos / norm, -sin / norm

    def turns(self, pairs: tuple[tuple[int, int], ...], head_dim: int) -> bool:
        """Whether it equals ``x[a] cos[a] + (-x[b]) sin[a]`` and ``x[b] cos[b] + x[a] sin[b]`` in float32, bit for bit.

        All other coordinates must be unchanged.
        """
        if self.apply is None or self.cos is None:
            return False
        return _turns_pairs(self.apply, pairs, head_dim, self.cos.shape[-1])

    def adjoint(self, grad: Tensor) -> Tensor:
        """Return the gradient with respect to pre-RoPE keys, from that with respect to rotated keys: `Rᵀ g`.

        For scaled RoPE this is not the inverse.
        """
        if self.cos is None or self.sin is None:
            return grad
        return self._call(grad, self.cos, -self.sin)

    def _call(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        assert self.apply is not None
        x = _wide(x)
        cos, sin = cos.to(x.device, x.dtype), sin.to(x.device, x.dtype)
        width = _rotated_width(self.apply, x.shape[-1], cos.shape[-1])
        head = x[..., :width]
        # The function also rotates queries. One head of keys in their place costs least.
        _, out = self.apply(head[:, :1], head, cos, sin)
        return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RopeTable:
    """A rotary embedding as tensors, for attention without the model's code.

    Angles are the float32 product of position and frequency, as in models. Far into a text, its rounding error is
    larger than that of all other steps.

    Args:
        rope: the rotary embedding.
        device: device of the tensors.
    """

    def __init__(self, rope: RopeSpec, device: torch.device) -> None:
        self.inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
        self.scaling = rope.attention_scaling
        self._first = _as_slice([pair[0] for pair in rope.pairs], device)
        self._second = _as_slice([pair[1] for pair in rope.pairs], device)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions int32 ``[B, S]``, each float32 ``[B, 1, P, S]``, without scaling."""
        angle = positions[:, None, None].float() * self.inv_freq[:, None]
        return angle.cos(), angle.sin()

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate ``x [..., D, S]`` in place by angles broadcastable to ``[..., P, S]``, without scaling."""
        a, b = x[..., self._first, :], x[..., self._second, :]
        a_sin = a * sin
        a.mul_(cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).add_(a_sin)
        if isinstance(self._first, Tensor):
            x[..., self._first, :] = a
        if isinstance(self._second, Tensor):
            x[..., self._second, :] = b
        return x

    def scale_(self, x: Tensor) -> Tensor:
        """Multiply the rotated channels of ``x [..., D, S]`` by the attention scaling, in place."""
        if self.scaling != 1.0:
            for channels in (self._first, self._second):
                x[..., channels, :] *= self.scaling
        return x

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [t for t in (self.inv_freq, self._first, self._second) if isinstance(t, Tensor)]


def _as_slice(channels: list[int], device: torch.device) -> slice | Tensor:
    """Channel numbers as a slice if they are evenly spaced, because slices are views."""
    step = channels[1] - channels[0] if len(channels) > 1 else 1
    if channels and step > 0 and channels == list(range(channels[0], channels[-1] + 1, step)):
        return slice(channels[0], channels[-1] + 1, step)
    return torch.tensor(channels, dtype=torch.int64, device=device)


def discover_rope(
    rotation: Rotation,
    positions: Tensor,
    head_dim: int,
    *,
    candidates: Iterable[Tensor] = (),
) -> RopeSpec:
    """Derive a layer's `RopeSpec` from its rotation at known positions.

    Args:
        rotation: rotation of a forward pass over one sequence; `cos` and `sin` are [1, T, width].
        positions: int64 [T], with 0 and all powers of two from 1 up to some number. Each doubling halves the error of
            the frequencies and adds none, because a product with a power of two is exact.
        head_dim: number of channels of a head.
        candidates: one-dimensional tensors of the model. One that agrees with the frequencies found replaces them.
            That makes them exact if `cos` and `sin` are rounded to half precision.

    Raises:
        RopeLayoutError: no fixed table describes the rotation; the message is the reason.
    """
    if rotation.apply is None or rotation.cos is None or rotation.sin is None:
        raise RopeLayoutError("the layer has no rotary embedding")
    positions = positions.cpu()
    rounding = float(torch.finfo(rotation.cos.dtype).eps)
    pairs = _rotated_pairs(rotation, head_dim)
    x, y, scaling = _turned(rotation, pairs, positions, head_dim)  # scaled cosines and sines of all angles
    slack = 4 * max(rounding, 1e-7) * scaling
    # The factor is 1 for unscaled RoPE. Snapping to 1 removes the rounding of cos² + sin².
    scaling = 1.0 if abs(scaling - 1.0) <= slack else scaling
    inv_freq = _frequencies(torch.atan2(y, x), positions, rounding, candidates)
    angle = positions.double()[:, None] * inv_freq
    # The model rounds angle = position * inv_freq to float32 before it computes cosines.
    allowed = slack + scaling * positions.double()[:, None] * inv_freq.abs() * 2.4e-7
    if bool(((x - scaling * angle.cos()).abs() > allowed).any()) or bool(
        ((y - scaling * angle.sin()).abs() > allowed).any()
    ):
        raise RopeLayoutError("its angles are not proportional to the position")
    return RopeSpec(
        pairs=tuple((int(first), int(second)) for first, second in pairs.tolist()),
        inv_freq=tuple(inv_freq.tolist()),
        attention_scaling=scaling,
    )


def _images(rotation: Rotation, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Images of all unit vectors, float32 [D, D], for one token's `cos` and `sin` [1, 1, width]."""
    unit = torch.eye(head_dim)[None, None]  # token i is the i-th unit vector
    cos, sin = cos.expand(1, head_dim, -1), sin.expand(1, head_dim, -1)
    return Rotation(rotation.apply, cos, sin).rotate(unit)[0, 0]


def _rotated_pairs(rotation: Rotation, head_dim: int) -> Tensor:
    """Pairs of channels that are rotated together, int64 [P, 2]."""
    assert rotation.cos is not None
    # A quarter turn maps x[a] to +x[b] and x[b] to -x[a], and does not change unrotated channels.
    table = torch.zeros(1, 1, rotation.cos.shape[-1])
    quarter = _images(rotation, table, torch.ones_like(table), head_dim)
    rotated = ~torch.isclose(quarter, torch.eye(head_dim)).all(dim=1)
    pairs = torch.nonzero(quarter > 0.5)
    pairs = pairs[rotated[pairs[:, 0]]]
    first, second = pairs.unbind(1)
    expected = torch.diag((~rotated).float())
    expected[first, second], expected[second, first] = 1.0, -1.0
    if len(pairs) == 0 or not torch.allclose(quarter, expected):
        raise RopeLayoutError("its rotary function does not turn pairs of channels")
    return pairs


def _turned(
    rotation: Rotation, pairs: Tensor, positions: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, float]:
    """Scaled cosines and sines of all pairs at all positions, float64 [T, P] each, and the scale."""
    assert rotation.cos is not None
    assert rotation.sin is not None
    cos, sin = _wide(rotation.cos.detach().cpu()), _wide(rotation.sin.detach().cpu())
    first, second = pairs.unbind(1)
    turned = torch.stack(
        [_images(rotation, cos[:, t : t + 1], sin[:, t : t + 1], head_dim) for t in range(len(positions))]
    ).double()  # [T, D, D]
    x, y = turned[:, first, first], turned[:, first, second]
    scale = torch.hypot(x, y)
    scaling = float(scale[positions == 0].mean())
    mismatch = max(
        float((turned[:, second, second] - x).abs().max()),
        float((turned[:, second, first] + y).abs().max()),
        float((scale - scaling).abs().max()),
    )
    rounding = float(torch.finfo(rotation.cos.dtype).eps)
    if mismatch > 16 * max(rounding, 1e-7) * scaling:
        raise RopeLayoutError("its pairs of channels are not all rotated and scaled alike")
    return x, y, scaling


def _frequencies(angle: Tensor, positions: Tensor, rounding: float, candidates: Iterable[Tensor]) -> Tensor:
    """Radians per position, float64 [P], from `angle` [T, P] modulo a turn. `rounding` is the error of the cosines."""
    index = {int(p): t for t, p in enumerate(positions)}
    power = 1
    if power not in index:
        raise RopeLayoutError("position 1 was not observed")
    inv_freq = angle[index[1]]
    while (power := 2 * power) in index:
        error = torch.remainder(angle[index[power]] - power * inv_freq + math.pi, 2 * math.pi) - math.pi
        inv_freq = inv_freq + error / power
    if rounding <= torch.finfo(torch.float32).eps:
        inv_freq = inv_freq.float().double()  # models have frequencies in float32
    for candidate in candidates:
        exact = candidate.detach().cpu().double()
        if exact.shape == inv_freq.shape and torch.allclose(
            exact, inv_freq, rtol=1e-6, atol=8 * rounding / power
        ):
            return exact
    return inv_freq
