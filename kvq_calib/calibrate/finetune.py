"""Gradient descent on what an artifact stores: levels, scales, zero points and phases.

The objective is what matters in the end, the KL divergence from the model's own predictions to those it makes
with quantized keys and values, on the calibration text. A few thousand numbers are trained and no weight of
the model is, so a few dozen short windows suffice.

Codes are piecewise constant, so gradients take them as given: a level, scale or zero point is moved by what
it does to the elements that are coded with it. (At a boundary between two levels both err by the same amount,
so to first order nothing is lost by leaving out that elements change sides.) Through the quantizer, from a
layer's error to earlier layers, gradients pass unchanged (straight-through estimator, arXiv 1308.3432).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kvq_calib.artifact.artifact import LayerParams, reference_quantizers
from kvq_calib.calibrate.allocation import storable_levels
from kvq_calib.calibrate.distributed import world
from kvq_calib.calibrate.gradients import activations_only, head_logits, is_splittable, recomputed_layers
from kvq_calib.codec.quantizer import (
    Quantizer,
    QuantParams,
    codebook_table,
    pack_codebooks,
    roundtrip_storage,
    storable_thresholds,
)
from kvq_calib.errors import CalibrationError
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.model.placement import input_device, is_offloaded
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KINDS, Kind, KVCacheSpec, QuantSpec

__all__ = ["Learned", "Trainable", "divergence", "learn"]

#: Tokens whose logits exist at one time.
_CHUNK = 256
#: A long memory of squared gradients: one short piece says little about their size.
_BETAS = (0.9, 0.99)
_WARMUP_STEPS = 5
#: How far towards the trained numbers is tried on the window that was not trained on.
_FRACTIONS = (0.25, 0.5, 1.0)

Progress = Callable[[str, int, int], None]


class Trainable:
    """The numbers of one layer's keys or values as a differentiable quantizer.

    What is trained are offsets in units that make one learning rate serve all: of a channel's level spacing
    for scale and zero point, of the codebook's level spacing for levels, and radians for phases. Scales stay
    positive and levels sorted by construction.

    Args:
        spec: static channel thresholds, no outliers.
        params: where to start.
        geometry, rope: as for :class:`kvq_calib.codec.quantizer.Quantizer`.
        device: of the model.
    """

    def __init__(
        self,
        spec: QuantSpec,
        params: QuantParams,
        geometry: LayerGeometry,
        rope: RopeSpec | None,
        device: torch.device | str = "cpu",
    ) -> None:
        assert params.scale is not None  # static channel thresholds have both
        assert params.zero_point is not None
        self.spec, self.geometry, self.rope = spec, geometry, rope
        self.start = replace(
            params,
            codebook=codebook_table(spec, params),
            scale=params.scale.float(),
            zero_point=params.zero_point.float(),
            phase=None if params.phase is None else params.phase.float(),
        ).to(device)
        index = self.start.codebook_index.to(torch.int64)
        bits = self.start.bits.to(torch.int64)
        row_bits = torch.zeros(len(self.start.codebook), dtype=torch.int64, device=device)
        row_bits = row_bits.scatter_reduce(0, index, bits, "amax", include_self=False)
        spacing = 2.0 ** (1 - bits.clamp(min=1).float())
        self._channel_unit = spacing
        counts = torch.tensor([spec.level_count(width) for width in row_bits.tolist()], device=device)
        self._level_unit = 2.0 / counts.clamp(min=2).float()[:, None]
        self.offsets: dict[str, Tensor] = {
            "scale": torch.zeros_like(spacing),
            "zero_point": torch.zeros_like(spacing),
            "codebook": torch.zeros_like(self.start.codebook),
        }
        if self.start.phase is not None:
            self.offsets["phase"] = torch.zeros_like(self.start.phase)
        for offset in self.offsets.values():
            offset.requires_grad_()
        # The repeated last levels of a narrower row must follow its last real one.
        columns = torch.arange(self.start.codebook.shape[1], device=device)
        self._real = torch.minimum(columns, counts[:, None] - 1)

    def live(self, fraction: float = 1.0) -> QuantParams:
        """The numbers as they stand, or this ``fraction`` of the way there; part of the autograd graph, float32."""
        start = self.start
        offsets = {name: fraction * offset for name, offset in self.offsets.items()}
        assert start.scale is not None  # static channel thresholds have both
        assert start.zero_point is not None
        scale = start.scale * torch.exp(offsets["scale"] * self._channel_unit)
        zero_point = start.zero_point + start.scale * (offsets["zero_point"] * self._channel_unit)
        codebook = (start.codebook + offsets["codebook"] * self._level_unit).gather(1, self._real)
        codebook = codebook.cummax(1).values
        phase = None if start.phase is None else start.phase + offsets["phase"]
        return replace(start, scale=scale, zero_point=zero_point, codebook=codebook, phase=phase)

    def result(self, fraction: float = 1.0) -> QuantParams:
        """The same, rounded to what is stored."""
        live = self.live(fraction)
        detached = replace(live, **{name: tensor.detach() for name, tensor in live.tensors().items()})
        codebook, index = storable_levels(detached.codebook), detached.codebook_index
        if self.spec.variable_bits:
            codebook, index = pack_codebooks(self.spec, detached.bits, codebook, index)
        assert detached.scale is not None and detached.zero_point is not None
        scale, zero_point = storable_thresholds(self.spec, detached.scale, detached.zero_point)
        return replace(
            detached,
            codebook=codebook,
            codebook_index=index,
            scale=scale,
            zero_point=zero_point,
            phase=None if detached.phase is None else detached.phase.half(),
        ).to("cpu")

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``[B, H, T, D]``, differentiably; float32."""
        live = self.live()
        assert live.scale is not None  # static channel thresholds have both
        assert live.zero_point is not None
        quantizer = Quantizer(self.spec, live, self.geometry, self.rope)
        with torch.no_grad():
            codes = quantizer.quantize(x).codes
        decoded = quantizer.decode(codes)
        seen = quantizer.inverse_transform(live.zero_point + live.scale * decoded)
        return seen + (x - x.detach()).float()


@dataclass(frozen=True)
class Learned:
    """What training gave.

    Attributes:
        layers: the numbers to store; those it started from where training did not help.
        fraction: how far towards the trained numbers they lie, 0 to 1.
        before, after: KL divergence in nats per predicted token on windows that were not trained on; ``None``
            where no window could be spared for that.
    """

    layers: tuple[LayerParams, ...]
    fraction: float
    before: float | None
    after: float | None


@torch.no_grad()
def unquantized(model: Any, ids: Tensor) -> Tensor:
    """What :func:`divergence` holds predictions against: the model's own, for ``ids [B, T]``.

    Returns:
        Its last hidden states ``[B, T, hidden]`` where its head can be applied to a part of them, else its logits.
    """
    if not is_splittable(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def divergence(
    model: Any,
    ids: Tensor,
    cache: KVCacheSpec,
    quantize: Sequence[Mapping[Kind, Callable[[Tensor], Tensor]]],
    *,
    backward: bool = False,
    reference: Tensor | None = None,
) -> float:
    """KL divergence from the model's predictions to those with quantized keys and values.

    Args:
        model: causal language model in eval mode.
        ids: int64 ``[B, T]``.
        cache: sink tokens stay exact.
        quantize: by layer and kind, what a reader sees of ``[B, H, T, D]``.
        backward: also add the gradient of the divergence to whatever ``quantize`` trains.
        reference: of :func:`unquantized`, where it is known.

    Returns:
        Nats per predicted token.

    Raises:
        CalibrationError: the divergence is not finite.
    """
    sinks = cache.sink_tokens

    def transform(kv: LayerKV) -> tuple[Tensor, Tensor]:
        seen = []
        for kind, x in zip(KINDS, (kv.keys, kv.values), strict=True):
            exact = roundtrip_storage(x[:, :, :sinks], cache).float()
            seen.append(torch.cat([exact, quantize[kv.layer][kind](x)[:, :, sinks:]], dim=2))
        return seen[0], seen[1]

    body = model.base_model if is_splittable(model) else None
    run = (lambda: body(input_ids=ids, use_cache=False)) if body is not None else None
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    total = 0.0
    if reference is None:
        reference = unquantized(model, ids)
    with torch.set_grad_enabled(backward), intercept(model, transform):
        output = run() if run else model(input_ids=ids, use_cache=False)
    last = output.last_hidden_state if run else output.logits
    gradient = torch.zeros_like(last)
    for start in range(0, ids.shape[1] - 1, _CHUNK):
        part = slice(start, min(start + _CHUNK, ids.shape[1] - 1))
        piece = last[:, part].detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            changed, wanted = piece, reference[:, part]
            if run:
                changed = head_logits(model, type(output), piece, ids[:, part])
                with torch.no_grad():
                    wanted = head_logits(model, type(output), wanted, ids[:, part])
            log_p, log_q = wanted.float().log_softmax(-1), changed.float().log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum() / predicted
        total += float(loss.detach())
        if backward:
            (gradient[:, part],) = torch.autograd.grad(loss, piece)
    if not math.isfinite(total):
        raise CalibrationError("the divergence of the quantized model is not finite; try --dtype float32")
    if backward:
        with intercept(model, transform):  # layers that are recomputed must be quantized again
            last.backward(gradient)
    return total


def learn(
    model: Any,
    windows: Tensor,
    cache: KVCacheSpec,
    geometry: KVGeometry,
    layers: Sequence[LayerParams],
    *,
    steps: int,
    seqlen: int,
    learning_rate: float,
    seed: int,
    held_out: int = 1,
    recompute: bool = False,
    progress: Progress | None = None,
) -> Learned:
    """Train an artifact's numbers on windows of text.

    Adam with a short warm-up and a cosine decay, one short window a step. The last windows are not
    trained on. They decide how far to go from the start to where training ended: halfway keeps half of what all
    steps agree on, and a quarter of the error that noise adds.

    Args:
        model: causal language model in eval mode.
        windows: token ids int64 ``[N, T]``.
        cache: spec of the artifact.
        geometry: of the model.
        layers: where to start.
        steps: updates.
        seqlen: tokens of one step; windows are cut into pieces of this length.
        learning_rate: of Adam, in the units of :class:`Trainable`.
        seed: of the order of windows.
        held_out: windows at the end that are not trained on, as far as there are more.
        recompute: recompute layers in the backward pass.
        progress: told after every step.

    Returns:
        The trained numbers, and the divergence before and after.
    """
    device = input_device(model)
    trained: list[dict[Kind, Trainable]] = [
        {
            kind: Trainable(
                spec.of(kind), params.of(kind), geometry.layers[number], geometry.rope_of(number), device
            )
            for kind in KINDS
        }
        for number, (spec, params) in enumerate(zip(cache.resolved(len(layers)), layers, strict=True))
    ]
    seqlen = min(seqlen, windows.shape[1])
    held_out = min(held_out, len(windows) - 1)
    kept, training = windows[len(windows) - held_out :], windows[: len(windows) - held_out]
    pieces = training[:, : training.shape[1] // seqlen * seqlen].reshape(-1, seqlen)
    order = _orders(len(pieces), seed)
    rank, ranks = world()
    offsets = [offset for layer in trained for part in layer.values() for offset in part.offsets.values()]
    optimizer = torch.optim.Adam(offsets, lr=learning_rate, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))

    def measure(candidates: Sequence[Sequence[LayerParams]]) -> list[float]:
        """Divergence of each on the windows that were not trained on."""
        found: list[list[float]] = [[] for _ in candidates]
        for window in kept:
            ids = window[None].to(device)
            reference = unquantized(model, ids)
            for own, candidate in zip(found, candidates, strict=True):
                quantizers = reference_quantizers(cache, geometry, candidate, device)
                own.append(divergence(model, ids, cache, quantizers, reference=reference))
        return [math.fsum(own) / held_out for own in found]

    with ExitStack() as stack:
        stack.enter_context(activations_only(model))
        if recompute or is_offloaded(model):
            stack.enter_context(recomputed_layers(model))
        stack.enter_context(torch.enable_grad())
        for step in range(steps):
            piece = pieces[next_of(order, step * ranks + rank)]
            optimizer.zero_grad()
            divergence(model, piece[None].to(device), cache, trained, backward=True)
            if ranks > 1:
                for offset in offsets:
                    if offset.grad is None:
                        offset.grad = torch.zeros_like(offset)
                    dist.all_reduce(offset.grad)
                    offset.grad /= ranks
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress("learning", step + 1, steps)

    def reached(fraction: float) -> tuple[LayerParams, ...]:
        return tuple(
            LayerParams(parts["key"].result(fraction), parts["value"].result(fraction)) for parts in trained
        )

    if not held_out:
        return Learned(reached(1.0), 1.0, None, None)
    choices = [(0.0, tuple(layers)), *((fraction, reached(fraction)) for fraction in _FRACTIONS)]
    with activations_only(model):
        found = measure([candidate for _, candidate in choices])
    best = min(range(len(found)), key=found.__getitem__)
    fraction, learned = choices[best]
    return Learned(learned, fraction, found[0], found[best])


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to 0."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def _orders(count: int, seed: int) -> Callable[[int], Tensor]:
    """Shuffled order of the pieces in each round through them."""

    def order(round_: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed << 20) + round_)
        return torch.randperm(count, generator=generator)

    return order


def next_of(order: Callable[[int], Tensor], number: int) -> int:
    """The ``number``-th piece of an endless sequence of shuffled rounds."""
    count = len(order(0))
    return int(order(number // count)[number % count])
