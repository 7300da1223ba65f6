"""The reference for the runtime: an unpacked cache whose keys and values went through the quantizer.

It keeps every token, un-rotated, and uses the model's attention, masks and rotary function. It implements the packed
cache's rule of what is quantized when, as simply as possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.quantizer import STORAGE_DTYPES, Quantizer
from kvq_calib.model.rope import Rotation, find_apply_rotary
from kvq_calib.runtime import KVQCache

#: Per layer, the (un-rotated keys, values) of every call.
Recording = list[list[tuple[Tensor, Tensor]]]


def record(cache: KVQCache) -> Recording:
    """Keep a copy of whatever ``cache`` stores from now on."""
    recording: Recording = [[] for _ in cache.layers]
    for layer in cache.layers:

        def store_call(storage, call, rotation, table, calls=recording[layer.index], inner=layer.store_call):
            keys = call.key if rotation is None else rotation.unrotate(call.key)
            calls.append((keys.clone(), call.value.clone()))
            inner(storage, call, rotation, table)

        layer.store_call = store_call
    return recording


class PlainLayer(DynamicLayer):
    def __init__(self, cache: PlainCache, index: int, pair: dict[str, Quantizer], rotary: object) -> None:
        super().__init__()
        self.cache, self.index, self.rotary = cache, index, rotary
        self.key, self.value = pair["key"], pair["value"]
        self.exact: tuple[Tensor, Tensor] | None = None
        self.cos = self.sin = None
        self.packed = 0
        #: What a reader sees of the packed slots. A block is quantized once, whole: with a trellis its tokens
        #: depend on each other, also on those that a crop has taken since.
        self.seen: tuple[Tensor, Tensor] | None = None

    def get_seq_length(self) -> int:
        return 0 if self.exact is None else self.exact[0].shape[2]

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        cache, dtype = self.cache, keys.dtype
        rotation = Rotation()
        if self.rotary is not None and self.key.spec.pre_rope:
            cos, sin = (part.expand(keys.shape[0], -1, -1) for part in cache.embeddings)
            keys = Rotation(self.rotary, cos, sin).unrotate(keys)
            self.cos = cos if self.cos is None else torch.cat((self.cos, cos), 1)
            self.sin = sin if self.sin is None else torch.cat((self.sin, sin), 1)
            rotation = Rotation(self.rotary, self.cos, self.sin)
        if cache.recording is not None:
            recorded = cache.recording[self.index].pop(0)
            start = self.get_seq_length()
            real = torch.arange(start, start + keys.shape[2]) >= cache.padding[:, None]
            for ours, theirs in zip((keys, values), recorded, strict=True):
                difference = (ours - theirs).abs().amax((1, 3))[real]
                assert difference.numel() == 0 or difference.max() < 1e-4 * theirs.abs().max()
            keys, values = recorded
        new = [x.to(cache.storage).float() for x in (keys, values)]
        self.exact = (
            tuple(new)
            if self.exact is None
            else tuple(torch.cat(pair, 2) for pair in zip(self.exact, new, strict=True))
        )
        if keys.shape[2] > 1:
            self._quantize()
        slots = torch.arange(self.get_seq_length())
        rank = slots - cache.padding[:, None]
        quantized = (slots < self.packed) & ~((rank >= 0) & (rank < cache.sinks))
        quantized = quantized[:, None, :, None]
        k, v = (
            torch.where(quantized, torch.cat((seen, x[:, :, self.packed :]), 2), x)
            for seen, x in zip(self.seen or [x[:, :, :0] for x in self.exact], self.exact, strict=True)
        )
        if keys.shape[2] == 1:  # a single token reads the block that it completes exactly
            self._quantize()
        return rotation.rotate(k).to(dtype), v.to(dtype)

    def _quantize(self) -> None:
        """Quantize the blocks that are complete."""
        while self.get_seq_length() - self.cache.recent - self.packed >= 32:
            block = slice(self.packed, self.packed + 32)
            self._see(*(q(x[:, :, block]) for q, x in zip((self.key, self.value), self.exact, strict=True)))
            self.packed += 32

    def _see(self, *new: Tensor) -> None:
        old = self.seen
        self.seen = new if old is None else tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))

    def crop_to(self, length: int) -> None:
        self.exact = tuple(x[:, :, :length] for x in self.exact)
        self.seen = self.seen and tuple(x[:, :, :length] for x in self.seen)
        if self.cos is not None:
            self.cos, self.sin = self.cos[:, :length], self.sin[:, :length]
        self.packed = min(self.packed, length)

    def reorder_cache(self, rows: Tensor) -> None:
        self.exact = tuple(x[rows] for x in self.exact)
        self.seen = self.seen and tuple(x[rows] for x in self.seen)
        if self.cos is not None:
            self.cos, self.sin = self.cos[rows], self.sin[rows]


class PlainCache(Cache):
    """Use inside ``plain_cache(...)``, which tells it the angles of each call."""

    def __init__(
        self,
        artifact: KVArtifact,
        model: nn.Module,
        padding: Tensor,
        recent: int | None,
        recording: Recording | None,
    ) -> None:
        self.recording = recording
        self.storage = STORAGE_DTYPES[artifact.spec.storage_dtype]
        self.sinks = artifact.spec.sink_tokens
        self.recent = artifact.spec.recent_tokens if recent is None else recent
        self.padding = padding
        self.embeddings: tuple[Tensor, Tensor] | None = None
        modules = {m.layer_idx: m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)}
        layers = []
        for index, pair in enumerate(artifact.quantizers()):
            rotary = (
                None if artifact.geometry.layers[index].rope is None else find_apply_rotary(modules[index])
            )
            layers.append(PlainLayer(self, index, pair, rotary))
        super().__init__(layers=layers)

    def crop_to(self, length: int) -> None:
        for layer in self.layers:
            layer.crop_to(length)


@contextmanager
def plain_cache(
    artifact: KVArtifact,
    model: nn.Module,
    padding: Tensor,
    recent: int | None = None,
    recording: Recording | None = None,
) -> Iterator[PlainCache]:
    """The oracle for ``model``.

    Args:
        artifact, model: as for the packed cache; the model must not be attached.
        padding: int64 ``[B]``, pad slots at the left of each row.
        recent: exact window; the artifact's by default.
        recording: of :func:`record`.
    """
    cache = PlainCache(artifact, model, padding, recent, recording)

    def remember(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        found = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        if isinstance(found, tuple):
            cache.embeddings = found

    hooks = [
        module.register_forward_pre_hook(remember, with_kwargs=True)
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    try:
        yield cache
    finally:
        for hook in hooks:
            hook.remove()
