"""Timing on a GPU, and the time of attention over float16."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from gpu_layers import Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Smallest number of bytes in a rotation of inputs: several times any second-level cache.
ROTATED_BYTES = 512 << 20
REPEATS, WARM_UP = 21, 3
#: Backends of torch's scaled_dot_product_attention; with the last, torch chooses.
BACKENDS: dict[str, SDPBackend | None] = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa": None,
}
LEFT_OUT = {"left_out": "memory"}


def median_seconds(calls: list[Callable[[], Any]]) -> float:
    """Median device time of one call, over all ``calls`` in turn."""
    for i in range(max(WARM_UP, min(len(calls), REPEATS))):
        calls[i % len(calls)]()
    times = []
    for i in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # lets the host get ahead, so that its time is not measured
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def copies_for(nbytes: int) -> int:
    """Number of inputs in a rotation, at most one per timed call."""
    return max(1, min(-(-ROTATED_BYTES // max(nbytes, 1)), REPEATS))


def fits(nbytes: int) -> bool:
    """Whether this much device memory is free, with a margin of a fifth."""
    free, _ = torch.cuda.mem_get_info()
    return nbytes * 1.25 < free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of a gigabyte, or of a 64th of the free memory."""
    size = min(1 << 30, torch.cuda.mem_get_info()[0] // 64)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds([lambda: target.copy_(source)])


def time_float16(shape: Shape, tokens: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Seconds of attention over float16 keys and values, or the reason for none, for each backend of torch.

    ``matvec`` is the plain pair of matrix products. ``fastest`` names the backend that our kernels are compared with.
    """
    nbytes = shape.cache_bytes(tokens, batch, 16)
    if not fits(nbytes * (copies_for(nbytes) + 1)):
        return dict.fromkeys((*BACKENDS, "matvec"), LEFT_OUT)
    size = (batch, shape.kv_heads, tokens, shape.head_dim)
    sets = [
        tuple(torch.randn(size, device=device, dtype=torch.float16) for _ in range(2))
        for _ in range(copies_for(nbytes))
    ]
    query = torch.randn(batch, shape.query_heads, 1, shape.head_dim, device=device, dtype=torch.float16)
    found: dict[str, Any] = {name: _time_sdpa(query, sets, backend) for name, backend in BACKENDS.items()}
    grouped = query.view(batch, shape.kv_heads, -1, shape.head_dim) * shape.head_dim**-0.5

    def pair(keys: Tensor, values: Tensor) -> Tensor:
        return (grouped @ keys.mT).softmax(-1) @ values

    found["matvec"] = {"seconds": median_seconds([lambda kv=kv: pair(*kv) for kv in sets])}
    timed = {name: each["seconds"] for name, each in found.items() if "seconds" in each}
    return {**found, "fastest": min(timed, key=lambda name: timed[name])}


def _time_sdpa(query: Tensor, sets: list[tuple[Tensor, ...]], backend: SDPBackend | None) -> dict[str, Any]:
    def attend(keys: Tensor, values: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    try:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return {"seconds": median_seconds([lambda kv=kv: attend(*kv) for kv in sets])}
    except RuntimeError as error:  # this backend does not support the shape, or is not built
        return {"left_out": str(error).splitlines()[0][:120]}
