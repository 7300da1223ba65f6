"""Training of an artifact's parameters by gradient descent: coefficients of levels, and angles of key pairs.

The objective is the KL divergence from the model's predictions to those with quantized keys and values, on the
calibration text. Only a few thousand numbers are trained, and no weight of the model, so a few dozen short windows
suffice.

Codes are piecewise constant, so gradients treat them as fixed: a level moves according to the elements that are coded
with it. At a boundary between two levels both have the same error, so it does not matter to first order that elements
change codes. From a layer's error to earlier layers, gradients pass the quantizer unchanged (straight-through
estimator, arXiv 1308.3432).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.clock import Progress
from kvq_calib.calibrate.distributed import reduce_over_ranks, world
from kvq_calib.calibrate.divergence import divergence, unquantized
from kvq_calib.calibrate.levels import level_basis, storable_levels
from kvq_calib.codec.computed_levels import has_coefficient
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.fit.rising_polynomials import toward
from kvq_calib.model.backward import activations_only, recomputed_layers
from kvq_calib.model.placement import input_device, is_offloaded
from kvq_calib.schema.recipe import LearnConfig
from kvq_calib.schema.spec import Kind

__all__ = ["Learned", "Trainable", "learn"]

#: Adam averages squared gradients over many steps, because one short piece gives a noisy estimate.
_BETAS = (0.9, 0.99)
_WARMUP_STEPS = 5
#: Fractions of the way to the trained parameters that are tried on the held-out windows.
_FRACTIONS = (0.25, 0.5, 1.0)


class Trainable:
    """The parameters of one layer's keys or values as a differentiable quantizer.

    It trains offsets in units for which one learning rate suits all: for coefficients, a channel's range divided by its
    number of codes; for angles, radians. A channel moves only as far as its levels stay in order.

    Args:
        quantizer: the start.
    """

    def __init__(self, quantizer: TrellisQuantizer) -> None:
        params = quantizer.params
        self.quantizer = quantizer
        self.start = replace(params, coefficients=quantizer.coefficients, pair_angle=quantizer.pair_angle)
        levels, codes = quantizer.levels, 1 << params.bits.to(torch.int64)
        self._unit = ((levels[:, -1] - levels[:, 0]) / codes)[:, None] * has_coefficient(
            quantizer.spec, params.bits
        )
        self._basis = level_basis(quantizer.spec, params.bits)
        self.offsets: dict[str, Tensor] = {"coefficients": torch.zeros_like(quantizer.coefficients)}
        if self.start.pair_angle is not None:
            self.offsets["pair_angle"] = torch.zeros_like(self.start.pair_angle)
        for offset in self.offsets.values():
            offset.requires_grad_()

    def live(self, fraction: float = 1.0) -> TrellisParams:
        """The current parameters, or those a ``fraction`` of the way there; float32, in the autograd graph."""
        start, offsets = self.start, self.offsets
        before = start.level_coefficients(self.quantizer.spec)
        wanted = before + fraction * offsets["coefficients"] * self._unit
        with torch.no_grad():
            within = toward(self._basis, before.double(), wanted.double()).float()
        angle = start.pair_angle
        return replace(
            start,
            coefficients=wanted + (within - wanted).detach(),
            pair_angle=None if angle is None else angle + fraction * offsets["pair_angle"],
        )

    def result(self, fraction: float = 1.0) -> TrellisParams:
        """The same, rounded as stored."""
        live = self.live(fraction)
        spec = self.quantizer.spec
        levels = storable_levels(spec, live.bits, live.level_coefficients(spec).detach().double())
        angle = None if live.pair_angle is None else live.pair_angle.detach().half()
        return replace(live, pair_angle=angle).with_levels(levels).to("cpu")

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``[B, H, T, D]``, differentiably: float32."""
        live = self.quantizer.with_params(self.live())
        with torch.no_grad():
            codes = live.quantize(x)
        return live.dequantize(codes) + (x - x.detach()).float()


@dataclass(frozen=True)
class Learned:
    """Result of training.

    Attributes:
        layers: the parameters to store; those of the start if training did not help.
        fraction: how far they are from the start towards the trained parameters, 0 to 1.
        before, after: KL divergence in nats per predicted token on held-out windows; ``None`` without such windows.
    """

    layers: tuple[LayerParams, ...]
    fraction: float
    before: float | None
    after: float | None


def learn(
    model: Any,
    windows: Tensor,
    draft: KVArtifact,
    settings: LearnConfig,
    *,
    seed: int,
    held_out: int = 1,
    recompute: bool = False,
    progress: Progress | None = None,
) -> Learned:
    """Train an artifact's parameters on windows of text.

    It uses Adam with a short warm-up and cosine decay, with one short window per step. The last windows are held out.
    They decide how far to go from the start to the end of training: halfway keeps half of the systematic change, but
    only a quarter of the error from noise.

    Args:
        model: causal language model in eval mode.
        windows: token ids int64 ``[N, T]``.
        draft: artifact to start from.
        settings: number of steps, tokens per step, and the learning rate in the units of :class:`Trainable`.
        seed: seed for the order of windows.
        held_out: number of held-out windows at the end; fewer if there are not enough windows.
        recompute: recompute layers in the backward pass.
        progress: called after every step.

    Returns:
        The trained parameters, and the KL divergence before and after.
    """
    device = input_device(model)
    trained = _trainables(draft, device)
    seqlen = min(settings.seqlen, windows.shape[1])
    held_out = min(held_out, len(windows) - 1)
    kept, training = windows[len(windows) - held_out :], windows[: len(windows) - held_out]
    pieces = training[:, : training.shape[1] // seqlen * seqlen].reshape(-1, seqlen)
    order = _orders(len(pieces), seed)
    rank, ranks = world()

    def add_gradients(step: int) -> None:
        piece = pieces[next_of(order, step * ranks + rank)]
        divergence(model, piece[None].to(device), draft.spec, trained, backward=True)

    with ExitStack() as stack:
        stack.enter_context(activations_only(model))
        if recompute or is_offloaded(model):
            stack.enter_context(recomputed_layers(model))
        stack.enter_context(torch.enable_grad())
        _descend(trained, add_gradients, settings, progress)

    if not held_out:
        return Learned(_reached(trained, 1.0), 1.0, None, None)
    choices = [(0.0, tuple(draft.layers))]
    choices += [(fraction, _reached(trained, fraction)) for fraction in _FRACTIONS]
    with activations_only(model):
        found = _divergences(model, kept, draft, [layers for _, layers in choices])
    best = min(range(len(found)), key=found.__getitem__)
    fraction, learned = choices[best]
    return Learned(learned, fraction, found[0], found[best])


Trainables = Sequence[Mapping[Kind, Trainable]]
"""The trained tensors, by layer and kind."""


def _trainables(draft: KVArtifact, device: torch.device) -> Trainables:
    return [
        {
            kind: Trainable(quantizer)
            for kind, quantizer in layer.items()
            if isinstance(quantizer, TrellisQuantizer)
        }
        for layer in draft.quantizers(device)
    ]


def _reached(trained: Trainables, fraction: float) -> tuple[LayerParams, ...]:
    """The parameters to store at this fraction of the way."""
    return tuple(
        LayerParams(parts["key"].result(fraction), parts["value"].result(fraction)) for parts in trained
    )


def _descend(
    trained: Trainables,
    add_gradients: Callable[[int], None],
    settings: LearnConfig,
    progress: Progress | None,
) -> None:
    """Update all offsets with the gradients that ``add_gradients`` adds in each step, averaged over ranks."""
    offsets = [offset for layer in trained for part in layer.values() for offset in part.offsets.values()]
    optimizer = torch.optim.Adam(offsets, lr=settings.learning_rate, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    _, ranks = world()
    for step in range(settings.steps):
        optimizer.zero_grad()
        add_gradients(step)
        if ranks > 1:
            for offset in offsets:
                if offset.grad is None:
                    offset.grad = torch.zeros_like(offset)
                reduce_over_ranks(offset.grad, "sum")
                offset.grad /= ranks
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress("learning", step + 1, settings.steps)


def _divergences(
    model: Any, windows: Tensor, draft: KVArtifact, candidates: Sequence[tuple[LayerParams, ...]]
) -> list[float]:
    """Mean KL divergence over windows ``[N, T]``, of the draft with each of the given parameters."""
    device = input_device(model)
    found: list[list[float]] = [[] for _ in candidates]
    for window in windows:
        ids = window[None].to(device)
        reference = unquantized(model, ids)
        for own, layers in zip(found, candidates, strict=True):
            quantizers = replace(draft, layers=layers).quantizers(device)
            own.append(divergence(model, ids, draft.spec, quantizers, reference=reference))
    return [math.fsum(own) / len(windows) for own in found]


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to 0."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def _orders(count: int, seed: int) -> Callable[[int], Tensor]:
    """A shuffled order of the pieces for each round."""

    def order(round_: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed << 20) + round_)
        return torch.randperm(count, generator=generator)

    return order


def next_of(order: Callable[[int], Tensor], number: int) -> int:
    """The ``number``-th piece of an endless sequence of shuffled rounds."""
    count = len(order(0))
    return int(order(number // count)[number % count])
