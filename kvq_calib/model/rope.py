"""Rotary position embeddings, undone and described by means of the model's own functions.

transformers' attention modules rotate keys with an `apply_rotary_pos_emb(q, k, cos, sin)` that stands in the
Python module that defines them. Its layout (half-split, interleaved, partial) and its scaling differ between
families, but it is always linear in the vector and, channel pair by channel pair, a rotation times a scale.
So calling the same function with other cosines and sines gives its inverse and its adjoint, with no per-model
code.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ApplyRotary", "RopeLayout", "RopeLayoutError", "Rotation", "discover_rope", "find_apply_rotary"]

ApplyRotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`apply(q, k, cos, sin) -> (q', k')`, heads in dimension 1, `cos` and `sin` of shape [B or 1, T, width]."""


class RopeLayoutError(ValueError):
    """A rotary embedding that no fixed table of frequencies describes; the message is the reason."""


def defining_attribute(module: nn.Module, name: str) -> Any:
    """Return the attribute `name` of the Python module that defines the class of `module` (or a base), or
    None."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if found is not None:
            return found
    return None


def find_apply_rotary(attention_module: nn.Module) -> ApplyRotary | None:
    """Return the `apply_rotary_pos_emb` that an attention module uses, or None where its family has none."""
    apply: ApplyRotary | None = defining_attribute(attention_module, "apply_rotary_pos_emb")
    return apply


@lru_cache(maxsize=256)
def _rotated_width(apply: ApplyRotary, head_dim: int, width: int) -> int:
    """Return how many leading channels of a head the function takes.

    Where only a part of a head is rotated, some families slice inside the function and some before calling
    it.
    """
    table = torch.ones(1, 1, width)
    for rotated in (head_dim, width):
        probe = torch.ones(1, 1, 1, rotated)
        try:
            _, out = apply(probe, probe, table, table)
        except RuntimeError:  # shapes that do not broadcast
            continue
        except TypeError as error:  # gptj's takes one tensor, and the sine first
            raise RopeLayoutError("its rotary function is not called as (q, k, cos, sin)") from error
        if out.shape == probe.shape:
            return rotated
    raise RopeLayoutError(f"its rotary function takes neither {head_dim} nor {width} channels")


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation that one attention layer applied to the keys of one forward pass.

    Arguments and results have shape [B, H, T, D]; the arithmetic and the results are at least float32.
    Without an `apply` (a layer that has no RoPE) all three maps are the identity.

    Attributes:
        apply: the model's `apply_rotary_pos_emb`, or None.
        cos: [B or 1, T, width] as the model computed it, attention scaling included.
        sin: like `cos`.
    """

    apply: ApplyRotary | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the layer has no RoPE."""
        return self.apply is None

    def rotate(self, keys: Tensor) -> Tensor:
        """Return keys as the model hands them to attention: `R k`."""
        if self.cos is None or self.sin is None:
            return keys
        return self._call(keys, self.cos, self.sin)

    def unrotate(self, rotated: Tensor) -> Tensor:
        """Return pre-RoPE keys: `R⁻¹ k`, exact also where RoPE is scaled (YaRN) or rounded to bfloat16."""
        if self.cos is None or self.sin is None:
            return rotated
        cos, sin = _wide(self.cos), _wide(self.sin)
        norm = cos.square() + sin.square()
        return self._call(rotated, cos / norm, -sin / norm)

    def adjoint(self, grad: Tensor) -> Tensor:
        """Return the gradient with respect to pre-RoPE keys from that with respect to rotated keys: `Rᵀ g`.

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
        # The function rotates queries as well; one head of keys in their place costs least.
        _, out = self.apply(head[:, :1], head, cos, sin)
        return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class RopeLayout:
    """A rotary embedding as a table, for code that cannot call the model: all that a kernel needs.

    For channels `(a, b) = pairs[p]` of a head and a token at `position`, with `angle = position *
    inv_freq[p]`::

        rotated[a] = attention_scaling * (cos(angle) * x[a] - sin(angle) * x[b])
        rotated[b] = attention_scaling * (sin(angle) * x[a] + cos(angle) * x[b])

    Channels in no pair are left as they are.

    Attributes:
        pairs: int64 [P, 2].
        inv_freq: float64 [P], radians per position, all of it as the model holds it in float32 where that is
            known.
        attention_scaling: factor of scaled RoPE (YaRN, longrope), else 1.
    """

    pairs: Tensor
    inv_freq: Tensor
    attention_scaling: float

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return float64 cosines and sines [..., P] of integer `positions` [...], attention scaling
        included."""
        angle = positions.to(torch.float64)[..., None] * self.inv_freq.to(positions.device)
        return self.attention_scaling * angle.cos(), self.attention_scaling * angle.sin()

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Return `keys` [B, H, T, D] rotated to `positions` [B or 1, T] (or [T])."""
        return self._turn(keys, positions, 1.0)

    def unrotate(self, rotated: Tensor, positions: Tensor) -> Tensor:
        """Undo `rotate`."""
        return self._turn(rotated, positions, -1.0) / self._scale(rotated)

    def _scale(self, like: Tensor) -> Tensor:
        scale = torch.ones(like.shape[-1], dtype=_wide(like[..., :0]).dtype, device=like.device)
        scale[self.pairs.flatten().to(like.device)] = self.attention_scaling**2
        return scale

    def _turn(self, x: Tensor, positions: Tensor, sign: float) -> Tensor:
        x = _wide(x)
        cos, sin = self.cos_sin(positions.to(x.device))
        if positions.ndim > 1:
            cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
        cos, sin = cos.to(x.dtype), (sign * sin).to(x.dtype)
        first, second = self.pairs.to(x.device).unbind(1)
        a, b = x[..., first], x[..., second]
        out = x.clone()
        out[..., first] = cos * a - sin * b
        out[..., second] = sin * a + cos * b
        return out

    def same_as(self, other: RopeLayout) -> bool:
        """Whether both describe the same rotation."""
        return (
            torch.equal(self.pairs, other.pairs)
            and torch.equal(self.inv_freq, other.inv_freq)
            and self.attention_scaling == other.attention_scaling
        )


def discover_rope(
    rotation: Rotation,
    positions: Tensor,
    head_dim: int,
    *,
    candidates: Iterable[Tensor] = (),
) -> RopeLayout:
    """Derive a layer's `RopeLayout` from the rotation that its model applied at known positions.

    Args:
        rotation: of a forward pass over one sequence; `cos` and `sin` are [1, T, width].
        positions: int64 [T], holding 0 and powers of two from 1 on without a gap. Each doubling halves the
            error of the frequencies, and adds none: a product with a power of two is exact.
        head_dim: channels of a head.
        candidates: one-dimensional tensors of the model; one that agrees with the frequencies found replaces
            them, which makes them exact where `cos` and `sin` are rounded to half precision.

    Raises:
        RopeLayoutError: the rotation is not a fixed table; the message is the reason.
    """
    if rotation.apply is None or rotation.cos is None or rotation.sin is None:
        raise RopeLayoutError("the layer has no rotary embedding")
    cos, sin = _wide(rotation.cos.detach().cpu()), _wide(rotation.sin.detach().cpu())
    positions = positions.cpu()
    rounding = float(torch.finfo(rotation.cos.dtype).eps)
    unit = torch.eye(head_dim)[None, None]  # token i holds the i-th unit vector

    def image(cosine: Tensor, sine: Tensor) -> Tensor:
        return Rotation(rotation.apply, cosine, sine).rotate(unit)[0, 0]

    # A quarter turn everywhere maps x[a] to +x[b] and x[b] to -x[a], and leaves the unrotated channels alone.
    quarter = image(torch.zeros(1, head_dim, cos.shape[-1]), torch.ones(1, head_dim, cos.shape[-1]))
    rotated = ~torch.isclose(quarter, torch.eye(head_dim)).all(dim=1)
    pairs = torch.nonzero(quarter > 0.5)
    pairs = pairs[rotated[pairs[:, 0]]]
    first, second = pairs.unbind(1)
    expected = torch.diag((~rotated).float())
    expected[first, second], expected[second, first] = 1.0, -1.0
    if len(pairs) == 0 or not torch.allclose(quarter, expected):
        raise RopeLayoutError("its rotary function does not turn pairs of channels")

    turned = torch.stack(
        [
            image(cos[:, t : t + 1].expand(1, head_dim, -1), sin[:, t : t + 1].expand(1, head_dim, -1))
            for t in range(len(positions))
        ]
    ).double()  # [T, D, D]
    x, y = turned[:, first, first], turned[:, first, second]
    scale = torch.hypot(x, y)
    scaling = float(scale[positions == 0].mean())
    slack = 4 * max(rounding, 1e-7) * scaling
    mismatch = max(
        float((turned[:, second, second] - x).abs().max()),
        float((turned[:, second, first] + y).abs().max()),
        float((scale - scaling).abs().max()),
    )
    if mismatch > 4 * slack:
        raise RopeLayoutError("its pairs of channels are not all rotated and scaled alike")
    # The factor is 1 for unscaled RoPE; snapping removes the rounding of cos² + sin².
    scaling = 1.0 if abs(scaling - 1.0) <= slack else scaling

    angle = torch.atan2(y, x)
    index = {int(p): t for t, p in enumerate(positions)}
    power = 1
    if power not in index:
        raise RopeLayoutError("position 1 was not observed")
    inv_freq = angle[index[1]]
    while (power := 2 * power) in index:
        error = torch.remainder(angle[index[power]] - power * inv_freq + math.pi, 2 * math.pi) - math.pi
        inv_freq = inv_freq + error / power
    if rounding <= torch.finfo(torch.float32).eps:
        inv_freq = inv_freq.float().double()  # the models hold frequencies in float32
    for candidate in candidates:
        exact = candidate.detach().cpu().double()
        if exact.shape == inv_freq.shape and torch.allclose(
            exact, inv_freq, rtol=1e-6, atol=8 * rounding / power
        ):
            inv_freq = exact
            break

    layout = RopeLayout(pairs, inv_freq, scaling)
    want_cos, want_sin = layout.cos_sin(positions)
    # The model rounds angle = position * inv_freq to float32 before it takes cosines.
    allowed = slack + scaling * positions.double()[:, None] * inv_freq.abs() * 2.4e-7
    if bool(((x - want_cos).abs() > allowed).any()) or bool(((y - want_sin).abs() > allowed).any()):
        raise RopeLayoutError("its angles are not proportional to the position")
    return layout
