"""Data parallelism under torchrun: ranks share the windows, statistics are added, and one rank writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kvq_calib.calibrate.statistics import Reduction, Statistics
from kvq_calib.errors import CalibrationError, one_line

S = TypeVar("S", bound=Statistics)

#: How long a rank waits for the others. It is longer than any window takes.
_PATIENCE = timedelta(minutes=30)

#: Store that the ranks share. It outlives the process group, so that ranks can agree on which one reports a failure.
_store: Any = None
_reports: bool | None = None


def world() -> tuple[int, int]:
    """The rank of this process, and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_over_ranks(tensor: Tensor, reduction: Reduction) -> None:
    """Replace a tensor by its elementwise sum, minimum or maximum over all ranks."""
    if world()[1] == 1:
        return
    operations = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    dist.all_reduce(tensor, op=operations[reduction])


def added_over_ranks(statistics: S) -> S:
    """Sum of the statistics of all ranks.

    Each rank also keeps its own statistics, so that its checkpoint does not depend on other ranks. With one rank, the
    result is the same object.
    """
    if world()[1] == 1:
        return statistics
    total = statistics.copied()

    def largest(tensor: Tensor) -> Tensor:
        found = tensor.clone()
        reduce_over_ranks(found, "max")
        return found

    total.align(largest)
    for name, tensor in total.state().items():
        reduce_over_ranks(tensor, total.reductions[name])
    return total


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the ranks that torchrun started, if any.

    Gloo adds statistics on the CPU, so ranks on GPUs need no other backend. Only rank 0 logs warnings.

    Yields:
        Rank and number of ranks.

    Raises:
        CalibrationError: the ranks do not find each other, or one of them ended early.
    """
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield world()
        return
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    try:
        _store, rank, ranks = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        store = dist.PrefixStore("kvq", _store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", timeout=_PATIENCE, store=store, rank=rank, world_size=ranks)
    except (RuntimeError, ValueError) as error:
        raise CalibrationError(
            f"the ranks did not find each other ({one_line(error)}); start them with torchrun"
        ) from error
    if rank > 0:
        logging.disable(logging.WARNING)
    try:
        yield rank, ranks
    except BaseException as error:
        first_to_report()  # before the other ranks notice that this one has ended
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise CalibrationError(
                "another rank ended, or kept the others waiting for half an hour; start all ranks again with --resume"
            ) from error
        raise
    finally:
        logging.disable(logging.NOTSET)
        dist.destroy_process_group()


def first_to_report() -> bool:
    """Whether this rank is the first to call it. That rank reports why the run ended.

    Before the ranks have met, it is the first rank of each machine.
    """
    global _reports
    if _store is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    if _reports is None:
        mine = os.environ["RANK"]
        try:
            _reports = _store.compare_set("kvq.reported_by", "", mine).decode() == mine
        except RuntimeError:  # the rank that hosts the store has ended, and has reported
            _reports = False
    return _reports


def local_device(device: str) -> str:
    """The device of this rank. With several ranks and GPUs, ``auto`` and ``cuda`` mean the GPU of this rank."""
    if device in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def check_agreement(identity: str, windows: int) -> None:
    """Refuse a run whose ranks have different settings, data or models.

    Args:
        identity: digest of settings, data and model of this rank, in hexadecimal.
        windows: number of windows of all ranks.

    Raises:
        CalibrationError: the ranks differ, or there are too few windows; raised on every rank.
    """
    _, ranks = world()
    if ranks == 1:
        return
    mine = torch.frombuffer(bytearray.fromhex(identity), dtype=torch.uint8)
    identities = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(identities, mine)
    different = [rank for rank, other in enumerate(identities) if not torch.equal(other, identities[0])]
    if different:
        raise CalibrationError(
            f"rank {different[0]} has other settings, data or model than rank 0; start all ranks with the same command"
        )
    if windows < ranks:
        raise CalibrationError(
            f"{windows} windows cannot be split over {ranks} ranks; use more samples or fewer ranks"
        )
