"""Both of vLLM's model runners give the backend what it needs.

The engine's tests run the first, which is the only one on a CPU. The second runs on GPUs. Here the function by which it
describes a step calls the backend, with its tensors on a simulated device.
"""

from __future__ import annotations

import pytest
import torch
from pretended.device import CUDA, pretended_cuda, watched

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),  # of vLLM and what it imports
]
#: A prompt's chunk, a sequence with one new token, and a place for a sequence that is empty in this step.
STARTS, LENGTHS = [0, 70, 71, 71], [300, 513, 0]
TABLES = torch.tensor([[5, 2, 9, 0], [7, 1, 3, 8], [0, 0, 0, 0]], dtype=torch.int32)


def described(device: torch.device) -> tuple[object, object]:
    """What two layers with pages of different sizes get from the second runner."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
    from vllm.v1.worker.utils import AttentionGroup

    from kvq_calib.integrations.vllm.backend import PackedBackend, PackedBuilder

    groups = []
    for layer in ("first", "second"):
        builder = object.__new__(PackedBuilder)  # its constructor needs an engine
        builder._sink_tokens = 4
        groups.append(AttentionGroup(PackedBackend, [layer], None, 0, metadata_builders=[builder]))
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in (STARTS, LENGTHS))
    config = type("Config", (), {"kv_cache_groups": [None]})
    found = build_attn_metadata(
        attn_groups=[groups],
        num_reqs=3,
        num_tokens=80,  # padded
        query_start_loc_gpu=starts.to(device),
        query_start_loc_cpu=starts,
        max_query_len=70,
        seq_lens=lengths.to(device),
        max_seq_len=513,
        block_tables=[TABLES.to(device)],
        slot_mappings=torch.zeros(1, 80, dtype=torch.int64).to(device),
        kv_cache_config=config,
        seq_lens_cpu_upper_bound=lengths,
    )
    return found["first"], found["second"]


def test_the_second_runner_describes_a_step():
    with pretended_cuda(), watched() as waits:
        one, other = described(CUDA)
        assert waits == []
    assert one is other
    step = one.step
    assert type(step).__name__ == "GpuStep"
    assert step.tokens == 71
    assert [(row.start, row.stop, row.length, row.number) for row in step.rows] == [
        (0, 70, 300, 0),
        (70, 71, 513, 1),
    ]
    assert step.positions.cpu().tolist() == [*range(230, 300), 512]
    assert step.kept.page.cpu().tolist() == [8]
