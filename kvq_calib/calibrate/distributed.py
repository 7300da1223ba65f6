"""Data parallelism as torchrun starts it: windows are split over ranks, statistics are added, one rank writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from kvq_calib.errors import CalibrationError

#: How long a rank waits for the others: longer than any window takes, shorter than a night.
_PATIENCE = timedelta(minutes=30)


def world() -> tuple[int, int]:
    """Rank, and number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the ranks that torchrun started, if it did.

    Statistics are added on the CPU by gloo, so ranks on GPUs need nothing else.

    Yields:
        Rank and number of ranks.

    Raises:
        CalibrationError: the ranks do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield world()
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"the ranks did not find each other ({reason}); start them with torchrun"
        ) from error
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """The device of this rank: with several ranks and GPUs, ``auto`` and ``cuda`` are the rank's own GPU."""
    if device in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def check_agreement(identity: str, windows: int) -> None:
    """Refuse a run whose ranks would not compute parts of one thing.

    Args:
        identity: digest of settings, data and model of this rank.
        windows: in all.

    Raises:
        CalibrationError: on every rank alike.
    """
    _, ranks = world()
    if ranks == 1:
        return
    identities: list[str | None] = [None] * ranks
    dist.all_gather_object(identities, identity)
    different = [rank for rank, other in enumerate(identities) if other != identities[0]]
    if different:
        raise CalibrationError(
            f"rank {different[0]} has other settings, data or model than rank 0; start all ranks with the same command"
        )
    if windows < ranks:
        raise CalibrationError(
            f"{windows} windows cannot be split over {ranks} ranks; use more samples or fewer ranks"
        )
