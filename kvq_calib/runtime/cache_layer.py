"""One layer of a packed cache, with transformers' interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.cache_layer import AttendingLayer, unknown_options
from kvq_calib.model.intercept import AttentionCall
from kvq_calib.model.rope import Rotation
from kvq_calib.runtime.attention import readable_mask
from kvq_calib.runtime.forward_pass import ForwardPass
from kvq_calib.runtime.ops import Ops
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.visibility import AttentionRequest, Visibility

__all__ = ["KVQCacheLayer", "request_of"]


class KVQCacheLayer(AttendingLayer):
    """One layer of a :class:`~kvq_calib.runtime.cache.KVQCache`.

    Args:
        index: number among the layers with keys and values.
        number: number of the model's layer with these keys and values; other layers may attend to them, too.
        ops: operations that pack and attend.
        forward_pass: forward pass of the cache, which has the contents.
        checks_rope: whether to compare the model's angles with the artifact's in every pass.
    """

    def __init__(
        self, index: int, number: int, ops: Ops, forward_pass: ForwardPass, checks_rope: bool
    ) -> None:
        super().__init__(forward_pass.contents.windows[index])
        self.index = index
        self.number = number
        self.ops = ops
        self.forward_pass = forward_pass
        self.checks_rope = checks_rope
        #: Whether angles of new tokens were wrong, on the device and not checked yet; ``None`` without such tokens.
        self._wrong_rope: Tensor | None = None
        #: Takes the place of :meth:`attend` in a step that is captured (:mod:`kvq_calib.runtime.step_cache`).
        self.step: Callable[[AttentionCall], Tensor] | None = None

    @property
    def storage(self) -> LayerStorage | None:
        """The storage; ``None`` while the cache is empty."""
        storages = self.forward_pass.contents.storages
        return storages[self.index] if storages else None

    @property
    def length(self) -> int:
        """Slots held."""
        return self.forward_pass.contents.length_of(self.index)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass the new keys and values on to attention. Attention of the layer before must have been called."""
        self.forward_pass.announce(self.index)
        return super().update(key_states, value_states)

    def attend(self, call: AttentionCall) -> Tensor:
        """Store the new tokens, if they are this layer's, and attend to all. Called by the attention function.

        Args:
            call: queries ``[B, Hq, T, D]``, keys ``[B, H, T, D]`` and values ``[B, H, T, Dv]``, queries and keys
                rotated, and a mask as :class:`~kvq_calib.runtime.visibility.Visibility` takes it.

        Returns:
            ``[B, T, Hq, Dv]``.

        Raises:
            RuntimeMismatchError: the call does not fit the cache. All layers are then in their state before this pass.
        """
        attend = self.step or (self._attend if call.layer == self.number else self._attend_again)
        return self.forward_pass.attention(call, lambda: attend(call))

    def _attend_again(self, call: AttentionCall) -> Tensor:
        """Attend for another layer of the model, after this layer has stored its tokens in this pass."""
        contents = self.forward_pass.contents
        assert contents.table is not None
        visibility = self._visibility(call, self.length)
        return self.ops.attend(request_of(call, visibility), contents.storages[self.index], contents.table)

    def _visibility(self, call: AttentionCall, length: int) -> Visibility:
        return Visibility(readable_mask(call), length, call.query.shape[2], call.kwargs.get("sliding_window"))

    def _attend(self, call: AttentionCall) -> Tensor:
        if unknown := unknown_options(call):
            raise RuntimeMismatchError(
                f"layer {self.index}: attention was given {sorted(unknown)[0]}, which a packed cache does not know"
            )
        visibility = self._visibility(call, self.length + call.query.shape[2])
        storage, table = self._take(call, visibility)
        return self.ops.attend(request_of(call, visibility), storage, table)

    def _take(self, call: AttentionCall, visibility: Visibility) -> tuple[LayerStorage, SlotTable]:
        """Store the new tokens of a call."""
        batch, _, tokens, _ = call.query.shape
        rotation = None if self.ops.rope is None else self.rotation_of(call)
        positions = call.kwargs.get("position_ids")
        storage, table = self.forward_pass.enter(self.index, batch, visibility, positions)
        if rotation is not None and self.checks_rope:
            if table.length == tokens:  # the recorded result is for an earlier text
                self._wrong_rope = None
            newest = table.positions(table.length - tokens, table.length)
            wrong = self.wrong_rope(rotation.unrotate(call.key), call.key, newest)
            self._wrong_rope = wrong if self._wrong_rope is None else self._wrong_rope | wrong
            # Reading the result makes the host wait for the GPU, so steps of one token leave it to the next block.
            if call.key.device.type == "cpu" or tokens > 1 or table.complete:
                self._check_rope()
        self.store_call(storage, call, rotation, table)
        return storage, table

    def store(self, storage: LayerStorage, keys: Tensor, values: Tensor, table: SlotTable) -> None:
        """Store the newest tokens, which already have slots, and free pages that a sliding window has passed.

        Args:
            storage: storage of this layer.
            keys, values: ``[B, H, T, D]``, with keys un-rotated if they are rotated on every read.
            table: slot table of the cache.
        """
        self._drop_passed(storage, table)
        storage.append(keys, values, table, self.ops.pack)

    def store_call(
        self, storage: LayerStorage, call: AttentionCall, rotation: Rotation | None, table: SlotTable
    ) -> None:
        """Store the keys and values of a call. The operations un-rotate them if they can."""
        joined = self.ops.join(storage, call.key, call.value, rotation)
        if joined is None:
            keys = call.key if rotation is None else rotation.unrotate(call.key)
            self.store(storage, keys, call.value, table)
            return
        self._drop_passed(storage, table)
        storage.hold(*joined, table, self.ops.pack)

    def _drop_passed(self, storage: LayerStorage, table: SlotTable) -> None:
        """Free pages that a sliding window has passed."""
        if self.sliding_window is not None:
            storage.drop_before(storage.length + 1 - self.sliding_window, table)

    def rotation_of(self, call: AttentionCall) -> Rotation:
        """What the model did to the keys of a call."""
        if call.position_embeddings is None:
            raise RuntimeMismatchError(
                f"layer {self.index} was called without position_embeddings; "
                "calibrate this model with --set cache.key.pre_rope=false"
            )
        cos, sin = call.position_embeddings
        tokens = call.key.shape[2]
        if cos.shape[-2] > tokens:  # of the whole text
            cos, sin = cos[..., -tokens:, :], sin[..., -tokens:, :]
        return self.forward_pass.rotation(call.module, cos, sin)

    def wrong_rope(self, keys: Tensor, rotated: Tensor, positions: Tensor) -> Tensor:
        """Whether angles are other than those of the artifact: they would be wrong on every later read.

        Args:
            keys, rotated: ``[B, H, T, D]``, as they were before the model turned them, and after.
            positions: integer ``[B, T]``.

        Returns:
            bool, no dimension.
        """
        rope = self.ops.rope
        assert rope is not None
        again = rope.rotate_(keys.mT.to(torch.float32, copy=True), *rope.cos_sin(positions))
        error = (rope.scale_(again).mT - rotated).abs().amax()
        slack = max(1e-3, 8 * torch.finfo(rotated.dtype).eps)
        return ~(error <= slack * rotated.abs().amax())

    def _check_rope(self) -> None:
        """Raise an error if a difference was recorded since the last call."""
        wrong, self._wrong_rope = self._wrong_rope, None
        if wrong is not None and bool(wrong):
            raise RuntimeMismatchError(
                f"layer {self.index} rotates keys by other angles than at calibration (RoPE that depends on "
                "the length of the text?); calibrate with --set cache.key.pre_rope=false, or this model anew"
            )

    def crop(self, *args: Any) -> None:
        """Raise an error: layers share slots, so only the cache can be cropped."""
        raise NotImplementedError("crop the cache, not one layer of it")

    def reset(self) -> None:
        """Raise an error: layers share slots, so only the cache can be reset."""
        raise NotImplementedError("reset the cache, not one layer of it")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Raise an error: layers share slots, so only the cache can be reordered."""
        raise NotImplementedError("reorder the cache, not one layer of it")


def request_of(call: AttentionCall, visibility: Visibility) -> AttentionRequest:
    """What a call of the attention function asks for."""
    scaling = call.kwargs.get("scaling")
    return AttentionRequest(
        call.query,
        visibility,
        call.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        call.kwargs.get("softcap"),
        call.kwargs.get("s_aux"),
    )
