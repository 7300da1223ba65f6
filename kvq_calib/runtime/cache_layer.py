"""One layer of a packed cache, as transformers sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.rope import Rotation, find_apply_rotary
from kvq_calib.runtime.attention import mark
from kvq_calib.runtime.forward_pass import ForwardPass
from kvq_calib.runtime.ops import Ops
from kvq_calib.runtime.rope_table import RopeTable
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.visibility import AttentionRequest, Visibility

__all__ = ["KVQCacheLayer"]


class KVQCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a :class:`~kvq_calib.runtime.cache.KVQCache`.

    Args:
        index: the layer's number.
        ops: what packs and attends.
        forward_pass: of the cache; it knows what the cache holds.
        checks_rope: compare the model's angles with the artifact's in every pass.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, index: int, ops: Ops, forward_pass: ForwardPass, checks_rope: bool) -> None:
        super().__init__()
        self.index = index
        self.ops = ops
        self.forward_pass = forward_pass
        self.checks_rope = checks_rope
        self.sliding_window = forward_pass.contents.windows[index]

    @property
    def storage(self) -> LayerStorage | None:
        """What is stored; ``None`` while the cache is empty."""
        storages = self.forward_pass.contents.storages
        return storages[self.index] if storages else None

    @property
    def is_sliding(self) -> bool:
        """Whether the layer sees a window only."""
        return self.sliding_window is not None

    @property
    def length(self) -> int:
        """Slots held."""
        return self.forward_pass.contents.length_of(self.index)

    # ------------------------------------------------- what transformers calls

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: storage is made when the first tokens arrive."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to attention, which will store them.

        Args:
            key_states, value_states: ``[B, H, T, D]``, keys as the model rotated them.
            args, kwargs: not used.

        Returns:
            The same two tensors, the keys marked with this layer.
        """
        self.forward_pass.announce(self.index)
        return mark(key_states, self), value_states

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        embeddings: Any,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Store the new tokens and attend to all; called by the attention function.

        Args:
            module: the attention module.
            query: ``[B, Hq, T, D]``, rotated.
            key, value: ``[B, H, T, D]``, keys rotated; values may have heads of another size.
            mask: as :class:`~kvq_calib.runtime.visibility.Visibility` takes it.
            embeddings: the model's (cos, sin) of these tokens, or ``None``.
            options: keyword arguments of the attention function.

        Returns:
            ``[B, T, Hq, D]``, ``D`` of the values, contiguous.

        Raises:
            RuntimeMismatchError: the call does not fit the cache; every layer is as it was before this forward
                pass.
        """
        with self.forward_pass.attention(self.index, module):
            batch, _, tokens, size = query.shape
            visibility = Visibility(mask, self.length + tokens, tokens, options.get("sliding_window"))
            rope, keys = self.ops.rope, key
            if rope is not None:
                keys = self._rotation(module, embeddings).unrotate(key)
            positions = options.get("position_ids")
            storage, table = self.forward_pass.enter(self.index, batch, visibility, positions)
            if rope is not None and self.checks_rope:
                self._check_rope(rope, keys, key, table.positions(table.length - tokens, table.length))
            self.store(storage, keys, value, table)
            scaling = options.get("scaling")
            request = AttentionRequest(
                query,
                visibility,
                size**-0.5 if scaling is None else float(scaling),
                options.get("softcap"),
                options.get("s_aux"),
            )
            return self.ops.attend(request, storage, table)

    def store(self, storage: LayerStorage, keys: Tensor, values: Tensor, table: SlotTable) -> None:
        """Store the newest tokens, which have their slots already, and free what a sliding window has passed.

        Args:
            storage: of this layer.
            keys, values: ``[B, H, T, D]``, keys un-rotated where they are turned on every read.
            table: of the cache.
        """
        if self.sliding_window is not None:
            storage.drop_before(storage.length + 1 - self.sliding_window, table)
        storage.append(keys, values, table, self.ops.pack)

    def _rotation(self, module: nn.Module, embeddings: Any) -> Rotation:
        if embeddings is None:
            raise RuntimeMismatchError(
                f"layer {self.index} was called without position_embeddings; "
                "calibrate with pre_rope: false for this model"
            )
        return Rotation(find_apply_rotary(module), *embeddings)

    def _check_rope(self, rope: RopeTable, keys: Tensor, rotated: Tensor, positions: Tensor) -> None:
        """Refuse angles other than those of the artifact: they would be wrong on every later read."""
        again = rope.rotate_(keys.mT.to(torch.float32, copy=True), *rope.cos_sin(positions))
        error = (rope.scale_(again).mT - rotated).abs().amax()
        slack = max(1e-3, 8 * torch.finfo(rotated.dtype).eps)
        if not bool(error <= slack * rotated.abs().amax()):
            raise RuntimeMismatchError(
                f"layer {self.index} rotates keys by other angles than at calibration (RoPE that depends on "
                "the length of the text?); calibrate with pre_rope: false, or this model anew"
            )

    def get_mask_sizes(self, query: int | Tensor, *args: Any) -> tuple[int, int]:
        """Slots the mask should cover, and the first of them.

        Args:
            query: number of new tokens, or (older releases) their positions.
            args: not used.
        """
        tokens = query if isinstance(query, int) else query.shape[0]
        first = 0 if self.sliding_window is None else max(self.length - self.sliding_window + 1, 0)
        return self.length + tokens - first, first

    def get_seq_length(self, *args: Any) -> int:
        """Slots held, those a sliding window has passed included."""
        return self.length

    def get_max_length(self) -> int:
        """The window, or -1 for no limit (newer releases)."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_max_cache_shape(self) -> int:
        """The window, or -1 for no limit (older releases)."""
        return self.get_max_length()

    def crop(self, *args: Any) -> None:
        """Layers share their slots, so only the cache can be cropped."""
        raise NotImplementedError("crop the cache, not one layer of it")

    def reset(self) -> None:
        """Layers share their slots, so only the cache can be reset."""
        raise NotImplementedError("reset the cache, not one layer of it")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Layers share their slots, so only the cache can be reordered."""
        raise NotImplementedError("reorder the cache, not one layer of it")
