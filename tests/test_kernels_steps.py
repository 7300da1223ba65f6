"""Steps whose launches stay the same from token to token, beside torch; on what :mod:`test_kernels` runs on."""

from __future__ import annotations

import pytest
import torch
from artifact_factory import recipe, trellis
from shim.host import compiler
from test_kernels import SMALL, Cache, Machine, assert_same_pages, geometry, machine
from torch import Tensor

from kvq_calib.runtime.cuda.step import STATE_WORDS, StepContext, StepLayer
from kvq_calib.runtime.cuda.step_pages import StepPages
from kvq_calib.runtime.cuda.structs import StepState
from kvq_calib.runtime.visibility import AttentionRequest, Visibility

__all__ = ["machine"]  # a fixture

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


class Steps:
    """Steps of :mod:`kvq_calib.runtime.cuda.step` beside torch, from where a cache stands."""

    def __init__(self, cache: Cache, window: int | None = None, mask: Tensor | None = None):
        self.cache, self.window, self.mask = cache, window, mask
        table, storage, device = cache.table, cache.storages[0], cache.machine.device
        self.positions = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self.state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=device)
        held = cache.ours.view.context(Visibility(mask, table.length, 1, None), table)
        launcher = cache.machine.launcher
        self.context = StepContext(launcher, table, held, window, 64, self.positions, self.state)
        self.pages = StepPages([storage.key, storage.value], 8)
        rows = self.pages.table[0], self.pages.table[1]
        self.layer = StepLayer(cache.ours.kernel, self.context, storage, rows)

    def step(self) -> None:
        """One token; what is attended must agree."""
        cache, layer, table = self.cache, self.cache.layer, self.cache.table
        batch = cache.batch
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(batch, 1)), dim=1)
        closes = table.blocks > self.pages.blocks
        positions = table.positions(table.length - 1, table.length) + 1
        table.add(positions, None)
        theirs = cache.storages[1]
        keys, values = layer.tokens("key", batch, 1), layer.tokens("value", batch, 1)
        theirs.append(keys, values, table, cache.theirs.pack)
        shape = batch, layer.geometry.num_query_heads, 1, layer.geometry.head_dim
        query = torch.randn(shape, generator=layer.generator).to(cache.machine.device).half()
        visibility = Visibility(self.mask, table.length, 1, self.window)
        want = cache.theirs.attend(AttentionRequest(query.float(), visibility, 0.125), theirs, table)
        if closes:
            self.pages.before_block()
        self.positions.copy_(positions[:, 0])
        self.context.advance()
        self.layer.store(keys, values)
        got = self.layer.attend(AttentionRequest(query, Visibility(None, 1, 1, None), 0.125))
        if closes:
            self.pages.after_block()
        table.close_blocks()
        theirs.close_blocks(table, cache.theirs.pack)
        assert (got.double() - want.double()).norm() <= 1e-3 * want.double().norm()

    def close(self) -> None:
        """The storage becomes what it would be without."""
        cache = self.cache
        ours, theirs = cache.storages
        table, packed = cache.table, self.pages.blocks
        self.pages.close()
        first = table.first[packed] if table.blocks > packed else table.packed_slots
        ours.tail_key, ours.tail_value = self.layer.tail(table.length - first)
        ours.length = table.length
        ours.close_blocks(table, cache.ours.pack)
        for side in ("key", "value"):
            assert_same_pages(getattr(ours, side), getattr(theirs, side))
            assert torch.equal(getattr(ours, f"tail_{side}"), getattr(theirs, f"tail_{side}"))
        assert list(StepState.from_buffer_copy(self.state.cpu().numpy().tobytes()).faults) == [0] * 4


STEPS = {
    "outliers": recipe(key={"bits": 3}, value={"bits": 3}, sink_tokens=2, recent_tokens=7),
    "crowded": recipe(
        key={"bits": 3, "outliers": {"fraction": 0.05, "max_per_token": 3}},
        value={"bits": 2, "outliers": {"fraction": 0.05, "max_per_token": 2}},
        sink_tokens=3,
        recent_tokens=0,
    ),
    "trellis": recipe(
        key=trellis(3, error_compensation={}, token_weighting=True), value=trellis(4), recent_tokens=40
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_by_themselves(machine: Machine, name: str) -> None:
    """Over the ends of blocks and pages, and the block in which the sinks stand; then the cache goes on as ever."""
    cache = Cache(machine, STEPS[name], geometry(64, 2, 3), 2)
    short = name == "outliers"
    cache.step(5 if short else 230)
    for count in (290 if short else 60, 3):
        steps = Steps(cache)
        for _ in range(count):
            steps.step()
        steps.close()
        cache.step(1)
        cache.step(40)


def test_steps_with_padding_and_after_a_crop(machine: Machine) -> None:
    cache = Cache(machine, SMALL, geometry(64, 2, 3), 2)
    mask = torch.arange(150, device=machine.device) >= torch.tensor([[0], [41]], device=machine.device)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache.step(150, mask.long(), positions=positions)
    cache.crop(100)
    steps = Steps(cache, mask=mask[:, :100].long())
    for _ in range(80):
        steps.step()
    steps.close()


def test_steps_with_a_window(machine: Machine) -> None:
    cache = Cache(machine, SMALL, geometry(64, 1, 2, window=70), 1)
    cache.step(340, window=70)
    steps = Steps(cache, window=70)
    for _ in range(100):
        steps.step()
    steps.close()


def test_steps_note_what_is_wrong(machine: Machine) -> None:
    """A number that is not finite, and positions that jump; neither is looked at until somebody does."""
    cache = Cache(machine, SMALL, geometry(64, 2, 2), 1)
    cache.step(70)

    def faults() -> list[int]:
        return list(StepState.from_buffer_copy(steps.state.cpu().numpy().tobytes()).faults)

    steps = Steps(cache)
    x = cache.layer.tokens("key", 1, 1)
    for number in range(3):
        steps.positions.fill_(70 + number)
        steps.context.advance()
        steps.layer.store(x, torch.full_like(x, 1e30 if number == 2 else 1.0, dtype=torch.float32))
        assert faults()[:2] == [0, int(number == 2)]
    steps = Steps(cache)
    steps.pages.before_block()
    for number in range(34):
        steps.positions.fill_(70 + number + (number > 3))
        steps.context.advance()
    assert faults()[:2] == [1, 0]
