"""Noise shaping: a token takes up a share of the error that the token before it made.

What the loss sees of an error is its product with the gradient, and gradients of values are alike from one token to the
next. So errors of neighbours should cancel: what is coded at token ``t`` is the value plus ``gain[t]`` times the
rounding error at ``t - 1``. The rounding errors are as large as without; their sum over a few tokens is smaller. A
reader of the codes has nothing to do. (``docs/explanation/noise-shaping.md``)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS
from kvq_calib.codec.paths import Subsets

__all__ = ["feedback_gains", "shaped_path"]

#: A gain is at most this many times the head's feedback, however much more the token before counts.
_MOST = 4.0


def feedback_gains(feedback: Tensor, weight: Tensor | None, batch: int, tokens: int) -> Tensor:
    """What of the rounding error of the token before is added, in each head.

    Errors count by the square roots of the tokens' weights, so the feedback is taken times the root of their ratio.
    The first token of a block takes up nothing.

    Args:
        feedback: float32 ``[H]``, correlation of the gradients of neighbours.
        weight: of the tokens, float32 ``[B, T, H]``, or ``None`` where all count alike.
        batch, tokens: ``B`` and ``T``.

    Returns:
        float32 ``[B, T, H]``.
    """
    gain = feedback.expand(batch, tokens, -1).clone()
    if weight is not None:
        ratio = weight[:, :-1] / weight[:, 1:]
        # Through float64: torch's own square root of float32 is not the nearest number on every processor.
        root = ratio.double().sqrt().float()
        # Not "greater": no weight on both sides is a ratio that is no number.
        root = torch.where(ratio <= _MOST * _MOST, root, _MOST)
        gain[:, 1:] *= root
    gain[:, ::BLOCK_TOKENS] = 0
    return gain


def shaped_path(
    subsets: Subsets, u: Tensor, gain: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes as :func:`kvq_calib.codec.paths.best_path` finds them, with the errors of neighbours shaped.

    What is coded at a token depends on the error before it, so each of the four survivors of Viterbi's algorithm has
    its own. Tokens are taken one at a time, in float32, every operation rounded; ties go to the predecessor, and in the
    end to the state, of the lower number.

    Args:
        subsets: of the levels of ``C`` channels.
        u: float32 ``[C, B, T]``, tokens in order from the first of a block on.
        gain: float32 ``[C, B, T]``, from :func:`feedback_gains`.
        weight: float32 ``[C, B, T]``, not negative, of the squares.

    Returns:
        Codes, uint8 ``[C, B, T]``, and the indices of the levels they stand for, int64.
    """
    channels, batch, tokens = u.shape
    weight = torch.ones_like(u) if weight is None else weight

    def by_token(x: Tensor) -> Tensor:  # [32, C, B * blocks]; tokens that are not there count nothing
        padded = torch.nn.functional.pad(x, (0, -tokens % BLOCK_TOKENS))
        return padded.reshape(channels, -1, BLOCK_TOKENS).permute(2, 0, 1).contiguous()

    # States are [u[t - 1], u[t]] before a step and [u[t], u[t + 1]] after it: the number is the place.
    n = batch * -(-tokens // BLOCK_TOKENS)
    ranks, width = subsets.boundaries.shape[1], n
    state = torch.arange(4, device=u.device)
    free = torch.arange(2, device=u.device)
    subset = 2 * (free ^ (state >> 1)[:, None]) + (state & 1)[:, None]  # [4 states, 2 codes]
    start = (subset * (ranks + 1))[None, :, :, None]
    nearest = subsets.nearest.flatten(1)
    cost = torch.full((channels, 4, width), torch.inf, device=u.device)
    cost[:, 0] = 0
    error = torch.zeros_like(cost)
    steps = []
    for x, of_error, counts in zip(by_token(u), by_token(gain), by_token(weight), strict=True):
        target = x[:, None] + of_error[:, None] * error
        rank = torch.searchsorted(subsets.boundaries, target.flatten(1)).view(target.shape)
        place = start + rank[:, :, None]  # [C, 4, 2, n]
        made = target[:, :, None] - nearest.gather(1, place.flatten(1)).view(place.shape)
        total = cost[:, :, None] + made * made * counts[:, None, None]
        low, high = total.unflatten(1, (2, 2)).unbind(
            1
        )  # [C, u[t - 1], u[t], n]: by u[t - 2], which is forgotten
        is_high = high < low
        cost = torch.where(is_high, high, low).flatten(1, 2)
        made_low, made_high = made.unflatten(1, (2, 2)).unbind(1)
        error = torch.where(is_high, made_high, made_low).flatten(1, 2)
        place_low, place_high = place.unflatten(1, (2, 2)).unbind(1)
        steps.append((is_high.flatten(1, 2), torch.where(is_high, place_high, place_low).flatten(1, 2)))
        # [u[t - 1], u[t]] to the number u[t] + 2 u[t - 1]: the place as it stands.
    return _traced(subsets, steps, cost.min(1, keepdim=True).indices, (batch, tokens))


def _traced(
    subsets: Subsets, steps: list[tuple[Tensor, Tensor]], last: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Codes and indices on the ways that lead to the states ``last``, int64 ``[C, 1, n]``."""
    codes, indices = [], []
    entries = subsets.nearest.shape[-1]
    for is_high, place in reversed(steps):
        found = place.gather(1, last)
        in_subset, free = subsets.place.gather(1, found[:, 0]), last[:, 0] & 1
        codes.append(in_subset << 1 | free)
        indices.append(in_subset << 2 | found[:, 0] // entries)
        last = (last >> 1) + 2 * is_high.gather(1, last)
    empty = subsets.empty[:, None, None]

    def in_order(parts: list[Tensor]) -> Tensor:  # to [C, B, T]
        batch, tokens = shape
        joined = torch.stack(parts[::-1], dim=-1).reshape(len(subsets.empty), batch, -1)
        return joined[..., :tokens].masked_fill(empty, 0)

    return in_order(codes).to(torch.uint8), in_order(indices)
