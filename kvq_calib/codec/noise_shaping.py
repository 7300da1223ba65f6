"""Noise shaping: a share of a token's rounding error is added to the next token before it is coded.

An error changes the loss by its product with the gradient, and gradients of values are correlated between neighbouring
tokens. So errors of neighbours should cancel: the number coded at token ``t`` is the value plus ``gain[t]`` times the
rounding error at ``t - 1``. The rounding errors do not become smaller, but their sum over a few tokens does. Readers
are not affected. See ``docs/explanation/noise-shaping.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS
from kvq_calib.codec.paths import Subsets

__all__ = ["feedback_gains", "shaped_path"]

#: Largest gain relative to the head's feedback, for any ratio of token weights.
_MOST = 4.0


def feedback_gains(feedback: Tensor, weight: Tensor | None, batch: int, tokens: int) -> Tensor:
    """The share of the rounding error of the previous token that is added, in each head.

    The feedback is multiplied by the square root of the ratio of the tokens' weights. It is 0 for the first token of a
    block.

    Args:
        feedback: float32 ``[H]``, correlation of the gradients of neighbours.
        weight: weights of the tokens, float32 ``[B, T, H]``, or ``None`` for equal weights.
        batch, tokens: ``B`` and ``T``.

    Returns:
        float32 ``[B, T, H]``.
    """
    gain = feedback.expand(batch, tokens, -1).clone()
    if weight is not None:
        ratio = weight[:, :-1] / weight[:, 1:]
        # In float64, because torch's square root in float32 is not correctly rounded on every processor.
        root = ratio.double().sqrt().float()
        # Not "greater": if both weights are 0, the ratio is NaN.
        root = torch.where(ratio <= _MOST * _MOST, root, _MOST)
        gain[:, 1:] *= root
    gain[:, ::BLOCK_TOKENS] = 0
    return gain


def shaped_path(
    subsets: Subsets, u: Tensor, gain: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of the best path, as from :func:`kvq_calib.codec.paths.best_path`, with noise shaping.

    The number coded at a token depends on the error before it, so it differs between the four survivors of Viterbi's
    algorithm. Tokens are processed one at a time, in float32 with every operation rounded. Ties go to the predecessor,
    and at the end to the state, with the lower number.

    Args:
        subsets: subsets of the levels of ``C`` channels.
        u: float32 ``[C, B, T]``, tokens in order, starting with the first of a block.
        gain: float32 ``[C, B, T]``, from :func:`feedback_gains`.
        weight: float32 ``[C, B, T]``, not negative, weights of the squares.

    Returns:
        Codes, uint8 ``[C, B, T]``, and the indices of their levels, int64.
    """
    channels, batch, tokens = u.shape
    weight = torch.ones_like(u) if weight is None else weight

    def by_token(x: Tensor) -> Tensor:  # [32, C, B * blocks]; missing tokens have weight 0
        padded = torch.nn.functional.pad(x, (0, -tokens % BLOCK_TOKENS))
        return padded.reshape(channels, -1, BLOCK_TOKENS).permute(2, 0, 1).contiguous()

    # A state is u[t - 1] + 2 u[t - 2], with u[t] the lowest bit of the code of token t.
    state, free = torch.arange(4, device=u.device), torch.arange(2, device=u.device)
    subset = 2 * (free ^ (state >> 1)[:, None]) + (state & 1)[:, None]  # [4 states, 2 codes]
    start = (subset * subsets.nearest.shape[-1])[None, :, :, None]
    nearest = subsets.nearest.flatten(1)
    cost = torch.full((channels, 4, batch * -(-tokens // BLOCK_TOKENS)), torch.inf, device=u.device)
    cost[:, 0] = 0
    error = torch.zeros_like(cost)
    steps = []
    for x, of_error, counts in zip(by_token(u), by_token(gain), by_token(weight), strict=True):
        target = x[:, None] + of_error[:, None] * error
        rank = torch.searchsorted(subsets.boundaries, target.flatten(1)).view(target.shape)
        place = start + rank[:, :, None]  # [C, 4, 2, n]
        made = target[:, :, None] - nearest.gather(1, place.flatten(1)).view(place.shape)
        total = cost[:, :, None] + made * made * counts[:, None, None]
        low, high = _predecessors(total)
        is_high = high < low
        cost, error, place = (_survivors(each, is_high) for each in (total, made, place))
        steps.append((is_high.flatten(1, 2), place))
    return _traced(subsets, steps, cost.min(1, keepdim=True).indices, (batch, tokens))


def _predecessors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``[C, 4, 2, n]``, by state and code: what leads into each state from the lower and from the higher state.

    Both are ``[C, 2, 2, n]``, by ``u[t - 1]`` and ``u[t]``, which is the number of the new state.
    """
    low, high = x.unflatten(1, (2, 2)).unbind(1)
    return low, high


def _survivors(x: Tensor, is_high: Tensor) -> Tensor:
    """Of the same, what the better predecessor of each new state gives: ``[C, 4, n]``."""
    low, high = _predecessors(x)
    return torch.where(is_high, high, low).flatten(1, 2)


def _traced(
    subsets: Subsets, steps: list[tuple[Tensor, Tensor]], last: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Codes and indices on the paths to the states ``last``, int64 ``[C, 1, n]``."""
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
