"""The base of cache layers that compute attention, with the interface that transformers expects."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvq_calib.model.compat import new_tokens
from kvq_calib.model.intercept import AttentionCall, mark

__all__ = ["AttendingLayer", "unknown_options"]

#: Tensor options of attention that packed attention supports, or that the mask makes redundant.
_KNOWN_TENSORS = {"attention_mask", "position_ids", "cache_position", "s_aux"}


def unknown_options(call: AttentionCall) -> set[str]:
    """Names of tensor options that packed attention does not support."""
    return {
        name
        for name, value in call.kwargs.items()
        if isinstance(value, Tensor) and name not in _KNOWN_TENSORS
    }


class AttendingLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer whose ``update`` marks the new keys and passes them on to attention, which then calls ``attend``.

    Args:
        sliding_window: number of tokens that a query sees, or ``None`` for all.
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
        """Number of slots, including those that a sliding window has passed."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Store the new keys and values, and attend to all tokens.

        Args:
            call: the call, with the keys and values that :meth:`update` returned.

        Returns:
            ``[B, T, Hq, Dv]``.
        """

    @property
    def is_sliding(self) -> bool:
        """Whether the layer has a sliding window."""
        return self.sliding_window is not None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: storage is allocated when the first tokens arrive."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass the new keys and values on to attention, which will store them.

        Args:
            key_states, value_states: ``[B, H, T, D]`` and ``[B, H, T, Dv]``, with keys rotated by the model.
            args, kwargs: not used.

        Returns:
            The same two tensors, with the keys marked with this layer.
        """
        return mark(key_states, self), value_states

    def get_mask_sizes(self, query: int | Tensor, *args: Any) -> tuple[int, int]:
        """The number of slots that the mask must cover, and the first of them.

        Args:
            query: see :func:`kvq_calib.model.compat.new_tokens`.
            args: not used.
        """
        first = 0 if self.sliding_window is None else max(self.length - self.sliding_window + 1, 0)
        return self.length + new_tokens(query) - first, first

    def get_seq_length(self, *args: Any) -> int:
        """Number of slots, including those that a sliding window has passed."""
        return self.length

    def get_max_length(self) -> int:
        """The window, or -1 for no limit; called by transformers 5.13 and newer."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_max_cache_shape(self) -> int:
        """The same; called by transformers up to 5.17."""
        return self.get_max_length()
