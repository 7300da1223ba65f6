"""The cache layer that attends itself, as far as transformers sees it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvq_calib.model.compat import new_tokens
from kvq_calib.model.intercept import AttentionCall, mark

__all__ = ["AttendingLayer", "unknown_options"]

#: Tensors among the options of attention that say nothing beside the mask, or that packed attention knows.
_KNOWN_TENSORS = {"attention_mask", "position_ids", "cache_position", "s_aux"}


def unknown_options(call: AttentionCall) -> set[str]:
    """Names of tensors that change attention in a way that packed attention does not know."""
    return {
        name
        for name, value in call.kwargs.items()
        if isinstance(value, Tensor) and name not in _KNOWN_TENSORS
    }


class AttendingLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer whose ``update`` hands the new keys and values on, marked, to attention, which comes back to ``attend``.

    Args:
        sliding_window: tokens a query sees, or ``None`` for all.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, sliding_window: int | None) -> None:
        super().__init__()
        self.sliding_window = sliding_window

    @property
    @abstractmethod
    def length(self) -> int:
        """Slots held, those a sliding window has passed included."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Store the new keys and values and attend to all.

        Args:
            call: with the keys and values that :meth:`update` returned.

        Returns:
            ``[B, T, Hq, Dv]``.
        """

    @property
    def is_sliding(self) -> bool:
        """Whether the layer sees a window only."""
        return self.sliding_window is not None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: storage is made when the first tokens arrive."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to attention, which will store them.

        Args:
            key_states, value_states: ``[B, H, T, D]`` and ``[B, H, T, Dv]``, keys as the model rotated them.
            args, kwargs: not used.

        Returns:
            The same two tensors, the keys marked with this layer.
        """
        return mark(key_states, self), value_states

    def get_mask_sizes(self, query: int | Tensor, *args: Any) -> tuple[int, int]:
        """Slots the mask should cover, and the first of them.

        Args:
            query: see :func:`kvq_calib.model.compat.new_tokens`.
            args: not used.
        """
        first = 0 if self.sliding_window is None else max(self.length - self.sliding_window + 1, 0)
        return self.length + new_tokens(query) - first, first

    def get_seq_length(self, *args: Any) -> int:
        """Slots held, those a sliding window has passed included."""
        return self.length

    def get_max_length(self) -> int:
        """The window, or -1 for no limit; asked for from transformers 5.13 on."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_max_cache_shape(self) -> int:
        """The same, asked for to transformers 5.17."""
        return self.get_max_length()
