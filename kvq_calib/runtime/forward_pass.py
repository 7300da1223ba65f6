"""One forward pass of a model through a cache: checks that it fits, and undoes it after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.intercept import AttentionCall
from kvq_calib.model.rope import Rotation, find_apply_rotary
from kvq_calib.model.states import States
from kvq_calib.runtime.closing import BlockCloser, close_blocks
from kvq_calib.runtime.contents import CacheContents
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage, StorageMark
from kvq_calib.runtime.visibility import Visibility

__all__ = ["ForwardPass"]

X = TypeVar("X")


class ForwardPass:
    """The current forward pass of a cache, if any. Its layers share it, and are called in order.

    Args:
        contents: contents of the cache.
        closers: what packs the blocks of each layer.
        modules: the attention modules of the model.
        max_tokens: largest number of tokens, or ``None``.
        rope_switch: see :func:`kvq_calib.model.rope.rope_switch`.
        states: states of layers beside keys and values.
        last_number: number of the last layer of the model that attends to the cache.
        single_tokens: whether a text can only be continued by single tokens.
    """

    def __init__(
        self,
        contents: CacheContents,
        closers: Sequence[BlockCloser],
        modules: Set[nn.Module],
        max_tokens: int | None,
        rope_switch: int | None,
        states: States,
        *,
        last_number: int,
        single_tokens: bool,
    ) -> None:
        self.last_number = last_number
        self.single_tokens = single_tokens
        self.states = states
        self.contents = contents
        self.closers = closers
        self.modules = modules
        self.max_tokens = max_tokens
        self.rope_switch = rope_switch
        #: The layer whose attention must be called next.
        self._announced: int | None = None
        #: Slots and packed blocks before the pass; ``None`` outside one.
        self._before: tuple[int, int] | None = None
        #: Rotations of the current pass, which layers share.
        self._rotations: list[tuple[type[nn.Module], Rotation]] = []
        #: Storages that have tokens of the pass, with their marks before.
        self._marks: list[tuple[LayerStorage, StorageMark]] = []

    def announce(self, layer: int) -> None:
        """Record that the model passed keys and values to ``layer``. Its attention must be called next.

        Raises:
            RuntimeMismatchError: attention of the layer announced before was never called.
        """
        missing, self._announced = self._announced, None
        if missing is not None:
            raise RuntimeMismatchError(
                f"layer {missing} updated the cache, but its attention never came: this cache is for "
                "another model, or the model was detached; make KVQCache(artifact, model) for this model"
            )
        self._announced = layer

    def rotation(self, module: nn.Module, cos: Tensor, sin: Tensor) -> Rotation:
        """The rotation that an attention module applied to keys, from its cosines and sines."""
        for kind, known in self._rotations:
            if kind is type(module) and known.cos is cos and known.sin is sin:
                return known
        made = Rotation(find_apply_rotary(module), cos, sin)
        self._rotations = [*self._rotations[-3:], (type(module), made)]
        return made

    def attention(self, call: AttentionCall, attend: Callable[[], X]) -> X:
        """Run attention of a layer. If it fails, the cache returns to its state before the pass.

        Args:
            call: call of the layer.
            attend: computes attention, or stores and reads for it.

        Raises:
            RuntimeMismatchError: the module does not belong to the cache's model.
        """
        self._announced = None
        with self.undone_on_failure():
            if call.module not in self.modules:
                raise RuntimeMismatchError(
                    "this cache was made for another model; make KVQCache(artifact, model) for each"
                )
            result = attend()
            if call.layer == self.last_number:
                self.end()
            return result

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """A context manager that restores the state before the pass if anything is raised."""
        try:
            yield
        except BaseException:
            self.roll_back()
            self._states_are_ahead()
            raise

    def _states_are_ahead(self) -> None:
        """Whether states of other layers include tokens of a pass that was undone."""
        if self.contents.table is None:
            self.states.reset()
        else:
            self.states.spoiled = bool(self.states)

    def enter(
        self, layer: int, batch: int, visibility: Visibility, position_ids: Tensor | None = None
    ) -> tuple[LayerStorage, SlotTable]:
        """Prepare for the new tokens of a layer. The first layer of a pass gives them slots.

        If there are several for a sequence, the blocks that they complete are packed as each layer stores them, so that
        no prompt is held exactly. A block that single tokens complete is packed by :meth:`end`, for all layers at once.

        Args:
            layer: number of the layer.
            batch: number of sequences ``B``.
            visibility: visibility of the new tokens.
            position_ids: integer ``[B or 1, T]`` or ``[sections, B or 1, T]``; by default they follow the slots in use.

        Returns:
            The layer's storage, and the slot table with the new tokens.

        Raises:
            RuntimeMismatchError: the pass does not fit the cache.
        """
        contents = self.contents
        if self._begins(layer, batch, visibility.tokens):
            positions = _positions(position_ids, contents.length, visibility.tokens, contents.device)
            self._check_switch(positions)
            self._before = (0, 0) if contents.table is None else (contents.length, contents.table.blocks)
            self._marks = []
            table = contents.start(batch) if contents.table is None else contents.table
            real = visibility.real()
            table.add(positions, real if real is None else real.expand(batch, -1))
            if visibility.tokens > 1:
                table.close_blocks()
        assert contents.table is not None
        storage = contents.storages[layer]
        self._marks.append((storage, storage.mark()))
        return storage, contents.table

    def _begins(self, layer: int, batch: int, tokens: int) -> bool:
        """Whether ``layer`` is the first of a pass. Checks that the pass fits."""
        self.states.check()
        self.contents.settle()
        table, held = self.contents.table, self.contents.length_of(layer)
        known = self.contents.length
        if table is not None and batch != table.batch:
            raise RuntimeMismatchError(
                f"the cache holds {table.batch} sequences and was given {batch}; "
                "reset() it, or use batch_select_indices or batch_repeat_interleave"
            )
        if table is not None and held + tokens == known:
            return False
        # If a pass ended early, later layers have fewer tokens. The next pass finds its record here.
        if held != known or self._marks:
            raise RuntimeMismatchError(
                "the layers of the cache hold different numbers of tokens (a forward pass failed midway); "
                "what it stored is undone now, so run it again"
            )
        if self.single_tokens and known and tokens > 1:
            raise RuntimeMismatchError(
                f"this model continues a text by one token at a time only, and was given {tokens}: with more, layers "
                "that keep a state begin anew; give it the whole text at once, or single tokens"
            )
        if self.max_tokens is not None and known + tokens > self.max_tokens:
            raise RuntimeMismatchError(
                f"{known + tokens} tokens are more than the model's {self.max_tokens}; "
                "shorten the text, or pass max_tokens if the model can do more"
            )
        return True

    def _check_switch(self, positions: Tensor) -> None:
        """Refuse new tokens for which the model uses other RoPE frequencies than before."""
        table, switch = self.contents.table, self.rope_switch
        if table is None or switch is None:
            return
        before = int(table.positions(table.length - 1, table.length).max()) + 1
        if before <= switch < int(positions.max()) + 1:
            raise RuntimeMismatchError(
                f"the text passes {switch} tokens, from where this model rotates all its keys by other angles, those "
                "in the cache too; give the whole text to an empty cache"
            )

    def end(self) -> None:
        """End the pass after its last layer: pack the block that is complete now, if any. It is no longer undone.

        Raises:
            RuntimeMismatchError: on a GPU, a number does not fit the storage dtype.
        """
        table = self.contents.table
        if table is not None:
            close_blocks(self.closers, self.contents.storages, table)
            table.angles.clear()
        self._before, self._marks, self._rotations = None, [], []

    def roll_back(self) -> None:
        """Restore the state before the current pass, if there is one."""
        before, marks = self._before, self._marks
        self._before, self._marks = None, []
        table = self.contents.table
        if before is None or table is None:
            return
        length, blocks = before
        if length == 0:
            self.contents.reset()
            self._announced = None
        else:
            table.crop(length, blocks)
            for storage, mark in marks:
                storage.restore(mark)
        self._states_are_ahead()

    def forget(self) -> None:
        """Drop the current pass, because the cache is empty."""
        self._announced, self._before, self._marks = None, None, []


def _positions(position_ids: Tensor | None, start: int, tokens: int, device: torch.device) -> Tensor:
    if position_ids is None:
        return torch.arange(start, start + tokens, device=device)[None]
    if position_ids.ndim == 3:  # in sections, which are equal for text; angles are checked
        position_ids = position_ids[0]
    if position_ids.ndim != 2 or position_ids.shape[1] != tokens:
        raise RuntimeMismatchError(
            f"position_ids of shape {list(position_ids.shape)} for {tokens} tokens; give one row per sequence"
        )
    return position_ids
