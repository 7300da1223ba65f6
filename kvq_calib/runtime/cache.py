"""``KVQCache``: a transformers cache that holds packed keys and values."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.packing import PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.cache_layer import AttendingLayer
from kvq_calib.model.compat import crop_takes_removed
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.intercept import AttentionCall, attention_modules, layer_of
from kvq_calib.model.rope import Rotation, find_apply_rotary
from kvq_calib.runtime.attention import attach, readable_mask
from kvq_calib.runtime.storage import LayerStorage, SlotTable, StorageMark
from kvq_calib.runtime.torch_ops import AttentionRequest, ReferenceOps, Visibility

__all__ = ["KVQCache", "KVQCacheLayer"]

_log = logging.getLogger("kvq_calib.runtime")


class KVQCacheLayer(AttendingLayer):
    """One layer of a :class:`KVQCache`, as transformers sees it.

    Args:
        cache: the cache it belongs to.
        index: the layer's number.
        ops: what stores and attends.
    """

    def __init__(self, cache: KVQCache, index: int, ops: ReferenceOps) -> None:
        super().__init__(ops.geometry.sliding_window)
        self.cache = cache
        self.index = index
        self.ops = ops
        self.storage: LayerStorage | None = None
        self._pending = False

    @property
    def length(self) -> int:
        """Slots held."""
        return 0 if self.storage is None else self.storage.length

    # ------------------------------------------------- what transformers calls

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to attention, once that of the layer before has come."""
        self.cache._refuse_pending()
        self._pending = True
        return super().update(key_states, value_states)

    def attend(self, call: AttentionCall) -> Tensor:
        """Store the new tokens and attend to all; called by the attention function.

        Args:
            call: queries ``[B, Hq, T, D]``, keys and values ``[B, H, T, D]``, queries and keys rotated, and a mask as
                :class:`~kvq_calib.runtime.torch_ops.Visibility` takes it.

        Returns:
            ``[B, T, Hq, D]``.

        Raises:
            RuntimeMismatchError: the call does not fit the cache; every layer is as it was before this forward
                pass.
        """
        self._pending = False
        module, query, key, value = call.module, call.query, call.key, call.value
        options = call.kwargs
        with self.cache._undone_on_failure():
            cache, ops = self.cache, self.ops
            batch, _, tokens, size = query.shape
            if module not in cache._modules:
                raise RuntimeMismatchError(
                    "this cache was made for another model; make KVQCache(artifact, model) for each"
                )
            visibility = Visibility(
                readable_mask(call), self.length + tokens, tokens, options.get("sliding_window")
            )
            keys, rotation = key, None
            if ops.key.spec.pre_rope and ops.key.rope is not None:
                rotation = self._rotation(module, call.position_embeddings)
                keys = rotation.unrotate(key)
            if cache._begins(self, batch, tokens):
                positions = cache._positions(options.get("position_ids"), tokens, query.device)
                if rotation is not None and self.index in cache._rope_witnesses:
                    self._check_rope(keys, key, positions)
                cache._begin(batch, positions, visibility.real())
            elif rotation is not None and self.index in cache._rope_witnesses:
                self._check_rope(keys, key, cache.new_positions(tokens))
            storage, table = self.storage, cache.table
            assert storage is not None
            assert table is not None
            if self.sliding_window is not None:
                storage.drop_before(self.length + 1 - self.sliding_window, table)
            cache._pass.layers.append((storage, storage.mark()))
            ops.append(storage, keys, value, table)
            scaling = options.get("scaling")
            request = AttentionRequest(
                query,
                visibility,
                size**-0.5 if scaling is None else float(scaling),
                options.get("softcap"),
                options.get("s_aux"),
            )
            attended = ops.attend(request, storage, table)
            if self.index == len(cache.layers) - 1:
                table.angles.clear()
                cache._pass = _Pass()
            return attended

    def _rotation(self, module: nn.Module, embeddings: Any) -> Rotation:
        if embeddings is None:
            raise RuntimeMismatchError(
                f"layer {self.index} was called without position_embeddings; "
                "calibrate with pre_rope: false for this model"
            )
        return Rotation(find_apply_rotary(module), *embeddings)

    def _check_rope(self, keys: Tensor, rotated: Tensor, positions: Tensor) -> None:
        """Refuse angles other than those of the artifact: they would be wrong on every later read."""
        rope = self.ops.rope
        assert rope is not None
        again = rope.rotate_(keys.mT.to(torch.float32, copy=True), *rope.cos_sin(positions))
        error = (rope.scale_(again).mT - rotated).abs().amax()
        slack = max(1e-3, 8 * torch.finfo(rotated.dtype).eps)
        if not bool(error <= slack * rotated.abs().amax()):
            raise RuntimeMismatchError(
                f"layer {self.index} rotates keys by other angles than at calibration (RoPE that depends on "
                "the length of the text?); calibrate with pre_rope: false, or this model anew"
            )

    def crop(self, *args: Any) -> None:
        """Layers share their slots, so only the cache can be cropped."""
        raise NotImplementedError("crop the cache, not one layer of it")

    def reset(self) -> None:
        """Free everything."""
        self.storage = None
        self._pending = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Layers share their slots, so only the cache can be reordered."""
        raise NotImplementedError("reorder the cache, not one layer of it")


@dataclass
class _Pass:
    """What it takes to undo the forward pass under way.

    Attributes:
        length, blocks: slots and packed blocks before it; ``None`` outside a pass.
        layers: storages that have its tokens, and where they stood.
    """

    length: int | None = None
    blocks: int = 0
    layers: list[tuple[LayerStorage, StorageMark]] = field(default_factory=list)


class KVQCache(Cache):  # type: ignore[misc]
    """A packed key-value cache for one model.

    Use it like any cache of transformers: ``model.generate(**inputs, cache=KVQCache(artifact, model))`` (before 5.24
    the argument is ``past_key_values``). The constructor attaches the model: attention over a packed cache is the cache's
    own from then on, and all else stays as it was; :func:`kvq_calib.runtime.detach` undoes that.

    Args:
        artifact: calibrated for this model.
        model: a causal language model of transformers, all on one device.
        recent_tokens: newest tokens kept exact; the artifact's by default.
        max_tokens: tokens after which the cache refuses more; the model's ``max_position_embeddings`` by
            default.
        backend: ``"auto"`` (the kernels where they can run, else the reference), ``"reference"`` or
            ``"cuda"``.

    Attributes:
        artifact: as given.
        table: positions, blocks and sinks, shared by all layers; ``None`` while empty.
        backend: the operations in use.

    Raises:
        RuntimeMismatchError: model and artifact do not fit, or the recipe cannot be streamed.
        ArtifactModelError: the artifact is for another model; names the field that differs.
    """

    def __init__(
        self,
        artifact: KVArtifact,
        model: nn.Module,
        *,
        recent_tokens: int | None = None,
        max_tokens: int | None = None,
        backend: str = "auto",
    ) -> None:
        artifact.check_model(model_fingerprint(model))
        _check_streamable(artifact)
        modules = _attention_modules(model, len(artifact.layers))
        device = _single_device(modules)
        ops, note = select_ops(artifact, device, backend)
        config: Any = model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        attach(model, artifact.geometry)
        self.artifact = artifact
        self.device = device
        self.recent_tokens = artifact.spec.recent_tokens if recent_tokens is None else recent_tokens
        self.max_tokens: int | None = limit if max_tokens is None else max_tokens
        self.table: SlotTable | None = None
        self.backend = ops[0].name
        self._pass = _Pass()
        self._modules = modules
        # One layer of each rotary embedding checks in every pass that its angles are those of the artifact.
        ropes = [layer.rope for layer in artifact.geometry.layers]
        self._rope_witnesses = {ropes.index(rope) for rope in set(ropes) if rope is not None}
        super().__init__(layers=[KVQCacheLayer(self, index, op) for index, op in enumerate(ops)])
        _log.info("packed cache of %d layers: %s operations on %s%s", len(ops), self.backend, device, note)

    def __repr__(self) -> str:
        """Short: what is held."""
        held = f"{len(self.layers)} layers, {self.get_seq_length()} tokens, {self.nbytes} bytes"
        return f"KVQCache({held}, {self.backend})"

    def __deepcopy__(self, memo: dict[int, Any]) -> KVQCache:
        """Copy what is stored; artifact, tables and model are shared."""
        shared: list[Any] = [self.artifact, self._modules]
        for layer in self.layers:
            shared += [layer.ops, layer.ops.key, layer.ops.value]
        memo.update({id(item): item for item in shared})
        made = KVQCache.__new__(KVQCache)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    # --------------------------------------------------------- a forward pass

    def _refuse_pending(self) -> None:
        for layer in self.layers:
            if layer._pending:
                layer._pending = False
                raise RuntimeMismatchError(
                    f"layer {layer.index} updated the cache, but its attention never came: this cache is for "
                    "another model, or the model was detached; make KVQCache(artifact, model) for this model"
                )

    def _begins(self, layer: KVQCacheLayer, batch: int, tokens: int) -> bool:
        """Whether ``layer`` is the first of a forward pass; checks that the pass fits."""
        if self.table is None:
            known = 0
        else:
            known = self.table.length
            if batch != self.table.batch:
                raise RuntimeMismatchError(
                    f"the cache holds {self.table.batch} sequences and was given {batch}; "
                    "reset() it, or use batch_select_indices or batch_repeat_interleave"
                )
        if layer.length + tokens == known and layer.storage is not None:
            return False
        # A pass that ended early left layers behind; one that begins after it finds its record.
        if layer.length != known or self._pass.layers:
            raise RuntimeMismatchError(
                "the layers of the cache hold different numbers of tokens (a forward pass failed midway); "
                "what it stored is undone now, so run it again"
            )
        if self.max_tokens is not None and known + tokens > self.max_tokens:
            raise RuntimeMismatchError(
                f"{known + tokens} tokens are more than the model's {self.max_tokens}; "
                "shorten the text, or pass max_tokens if the model can do more"
            )
        return True

    def _positions(self, position_ids: Tensor | None, tokens: int, device: torch.device) -> Tensor:
        if position_ids is None:
            start = self.get_seq_length()
            return torch.arange(start, start + tokens, device=device)[None]
        if position_ids.ndim != 2 or position_ids.shape[1] != tokens:
            raise RuntimeMismatchError(
                f"position_ids of shape {list(position_ids.shape)} for {tokens} tokens; "
                "give one row per sequence"
            )
        return position_ids

    def new_positions(self, tokens: int) -> Tensor:
        """Positions of the newest ``tokens`` slots, int32 ``[B, tokens]``."""
        assert self.table is not None
        return self.table.positions(self.table.length - tokens, self.table.length)

    def _begin(self, batch: int, positions: Tensor, real: Tensor | None) -> None:
        self._pass = _Pass(0) if self.table is None else _Pass(self.table.length, self.table.blocks)
        if self.table is None:
            sinks = self.artifact.spec.sink_tokens
            self.table = SlotTable(batch, sinks, self.recent_tokens, self.device)
            for layer in self.layers:
                layer.storage = LayerStorage(layer.ops.key, layer.ops.value, batch, sinks, self.device)
        self.table.append(positions, real if real is None else real.expand(batch, -1))

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        """Become what the cache was before the forward pass that is under way, if there is one."""
        failed, self._pass = self._pass, _Pass()
        if failed.length == 0:
            self.reset()
        elif failed.length is not None and self.table is not None:
            self.table.crop(failed.length, failed.blocks)
            for storage, mark in failed.layers:
                storage.restore(mark)

    # ------------------------------------------------------- the rest of Cache

    @property
    def is_initialized(self) -> bool:
        """Whether tokens are stored."""
        return self.table is not None

    def crop(self, count: int) -> None:
        """Forget the newest tokens. Nothing is re-quantized: exact tokens that were packed stay packed.

        Args:
            count: a length to keep where positive, minus the number of tokens to forget where negative. 0
                means
                what it means in the transformers in use: keep all (newer), forget all (older).

        Raises:
            RuntimeMismatchError: a sliding window has freed tokens that would be visible again.
        """
        self._roll_back()
        length = self.get_seq_length()
        if count > 0:
            kept = count
        elif count < 0:
            kept = max(length + count, 0)
        else:
            kept = length if crop_takes_removed() else 0
        if kept >= length or self.table is None:
            return
        if kept == 0:
            self.reset()
            return
        for layer in self.layers:
            dropped = PAGE_BLOCKS * layer.storage.key.dropped_pages
            if not dropped:
                continue
            if self.table.first[dropped - 1] + self.table.fill[dropped - 1] > kept - layer.sliding_window + 1:
                raise RuntimeMismatchError(
                    f"cannot crop to {kept} tokens: layer {layer.index} has freed what its window of "
                    f"{layer.sliding_window} would show again; reset() the cache"
                )
        self.table.crop(kept)
        for layer in self.layers:
            layer.storage.crop(self.table)

    def reset(self) -> None:
        """Free everything; the cache can be used again, also for another batch size."""
        self.table = None
        self._pass = _Pass()
        for layer in self.layers:
            layer.reset()

    def _select(self, rows: Tensor) -> None:
        self._roll_back()
        if self.table is None:
            return
        rows = rows.to(self.device)
        if len(rows) == self.table.batch and bool(
            (rows == torch.arange(len(rows), device=self.device)).all()
        ):
            return
        self.table.select(rows)
        for layer in self.layers:
            layer.storage.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` become what row ``beam_idx[i]`` is (beam search)."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (numbers, or one bool per sequence)."""
        indices = torch.as_tensor(indices)
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        if self.table is not None:
            self._select(torch.arange(self.table.batch).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Nothing to do: what the latest call could see is kept until the next call, so it can be taken
        back."""

    # ------------------------------------------------------------------ memory

    @cached_property
    def _fixed_memory(self) -> dict[str, int]:
        """Bytes that do not depend on what is stored: the artifact's numbers and what the operations
        derive."""
        counted: set[int] = set()

        def count(tensors: list[Tensor]) -> int:
            total = 0
            for tensor in tensors:
                if tensor.untyped_storage().data_ptr() not in counted and tensor.numel():
                    counted.add(tensor.untyped_storage().data_ptr())
                    total += tensor.nbytes
            return total

        sizes = {"parameters": 0, "tables": 0}
        for layer in self.layers:
            for quantizer in (layer.ops.key, layer.ops.value):
                sizes["parameters"] += quantizer.params.held_bytes
                counted.update(t.untyped_storage().data_ptr() for t in quantizer.params.tensors().values())
        for layer in self.layers:
            sizes["tables"] += count(layer.ops.tables())
        return sizes

    def memory(self) -> dict[str, int]:
        """Bytes held, by kind; the kinds of :meth:`kvq_calib.artifact.artifact.KVArtifact.storage`, and ``tables``."""
        sizes = dict(self._fixed_memory)
        if self.table is not None:
            sizes.update(self.table.memory())
            for layer in self.layers:
                for kind, size in layer.storage.memory():
                    sizes[kind] = sizes.get(kind, 0) + size
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes held, everything counted."""
        return sum(self.memory().values())

    def outliers(self) -> dict[str, list[int]]:
        """Outlier entries held, per kind and layer."""
        return {
            kind: [
                0 if layer.storage is None else getattr(layer.storage, kind).outlier_entries
                for layer in self.layers
            ]
            for kind in ("key", "value")
        }

    # ------------------------------------------------------------ save and load

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what is stored to one safetensors file: whole, or not at all.

        Raises:
            RuntimeMismatchError: the cache is empty.
        """
        from kvq_calib.runtime.checkpoint import save_cache

        save_cache(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], artifact: KVArtifact, model: nn.Module, **options: Any
    ) -> KVQCache:
        """Make a cache that holds what :meth:`save` wrote.

        Args:
            path: the file.
            artifact, model: the ones the cache was filled with.
            options: further arguments of the constructor.

        Raises:
            RuntimeMismatchError: the file is damaged, or belongs to another artifact.
        """
        from kvq_calib.runtime.checkpoint import load_cache

        cache = cls(artifact, model, **options)
        load_cache(cache, path)
        return cache


def select_ops(artifact: KVArtifact, device: torch.device, backend: str) -> tuple[list[ReferenceOps], str]:
    """The operations of every layer, and a remark for the log on why they were chosen.

    Raises:
        RuntimeMismatchError: ``backend`` is unknown, or it is "cuda" and the kernels cannot run.
    """
    if backend not in ("auto", "reference", "cuda"):
        raise RuntimeMismatchError(f"unknown backend {backend!r}; use auto, reference or cuda")
    quantizers = artifact.quantizers(device)
    reason = ""
    if backend == "cuda" or (backend == "auto" and device.type == "cuda"):
        try:
            from kvq_calib.runtime.cuda import ops as cuda

            return cuda.make_ops(quantizers, device), ""
        except (ImportError, RuntimeMismatchError) as error:
            if backend == "cuda":
                raise RuntimeMismatchError(f"the CUDA kernels cannot be used: {error}") from error
            reason = f" (no kernels: {error})"
    return [ReferenceOps(pair["key"], pair["value"]) for pair in quantizers], reason


def _check_streamable(artifact: KVArtifact) -> None:
    storage = torch.finfo(getattr(torch, artifact.spec.storage_dtype))
    for index, layer in enumerate(artifact.spec.resolved(len(artifact.layers))):
        rope = artifact.geometry.rope_of(index)
        for kind in ("key", "value"):
            spec = layer.of(kind)
            if spec.granularity == "channel" and spec.dynamic:
                raise RuntimeMismatchError(
                    f"layer {index}: dynamic thresholds per channel need the whole text at once and serve "
                    "evaluation only; use static thresholds (dynamic: false)"
                )
            params = artifact.layers[index].of(kind)
            if params.scale is not None and params.zero_point is not None:
                largest = float((params.zero_point.float().abs() + params.scale.float()).max())
                if largest > storage.max:
                    raise RuntimeMismatchError(
                        f"layer {index}: {kind} thresholds reach {largest:.3g}, more than "
                        f"{artifact.spec.storage_dtype} holds; calibrate with storage_dtype: bfloat16"
                    )
        if layer.key.pre_rope and rope is not None and rope.length_dependent:
            raise RuntimeMismatchError(
                f"layer {index}: the rotary embedding depends on the length of the text; "
                "calibrate with pre_rope: false"
            )


def _attention_modules(model: nn.Module, layers: int) -> set[nn.Module]:
    """The attention modules, as a set that hashes by identity."""
    return {module for module in attention_modules(model) if layer_of(module) < layers}


def _single_device(modules: set[nn.Module]) -> torch.device:
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "none"
        raise RuntimeMismatchError(
            f"the attention layers are on several devices ({names}); load the model on one"
        )
    return devices.pop()
