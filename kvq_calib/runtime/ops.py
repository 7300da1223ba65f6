"""What packs and attends: the protocol of the operations of a layer, the backends there are, and the choice of one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.rope import RopeTable, Rotation
from kvq_calib.runtime.cuda.ops import make_cuda_ops
from kvq_calib.runtime.native_ops import can_run, make_native_ops
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.runtime.visibility import AttentionRequest
from kvq_calib.schema.spec import Kind

__all__ = ["Backend", "LayerQuantizers", "Ops", "backends", "choose_ops", "register"]

#: Names a backend where no argument does.
VARIABLE = "KVQ_CALIB_OPS"
AUTO = "auto"

#: Of one layer, on the device of the model.
LayerQuantizers = Mapping[Kind, Quantizer]


class Ops(Protocol):
    """Packing and attention of one layer. Whatever the backend, what is stored is the same bit for bit."""

    @property
    def name(self) -> str:
        """Of the backend."""

    @property
    def rope(self) -> RopeTable | None:
        """What turns keys on every read; ``None`` where they are stored as attention uses them."""

    def join(
        self, storage: LayerStorage, keys: Tensor, values: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor] | None:
        """The tail of a storage with new tokens behind it, as :meth:`LayerStorage.hold` takes them.

        Args:
            storage: of this layer.
            keys, values: the new tokens, ``[B, H, T, D]``, any float dtype.
            rotation: what is undone in the keys, or ``None``.

        Returns:
            ``None`` where torch is to do it.

        Raises:
            RuntimeMismatchError: a number does not fit the storage dtype.
        """

    def pack(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Code whole blocks and store them.

        Args:
            storage: of this layer; its ``key`` and ``value`` get the blocks.
            keys, values: ``[B, H, 32 * n, D]`` in the storage dtype, keys un-rotated where there is a :attr:`rope`.
        """

    def attend(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        """Attend to everything stored: ``[B, T, Hq, D]``, ``D`` of the values, contiguous, the query's dtype."""

    def forget(self) -> None:
        """Drop what was made of the tokens of a text; the cache was reset."""

    def tables(self) -> list[Tensor]:
        """Tensors held besides the artifact's parameters, for the accounting of memory."""


@dataclass(frozen=True)
class Backend:
    """A way to run a cache.

    Attributes:
        name: as ``KVQCache(..., backend=name)`` and ``KVQ_CALIB_OPS`` give it.
        make: the operations of every layer of a cache, from their quantizers; raises
            :class:`~kvq_calib.errors.RuntimeMismatchError` with the reason, in one line, where it cannot run.
        serves: whether ``"auto"`` tries it for a cache on this device.
    """

    name: str
    make: Callable[[Sequence[LayerQuantizers], torch.device], Sequence[Ops]]
    serves: Callable[[torch.device], bool]


def _make_torch_ops(quantizers: Sequence[LayerQuantizers], device: torch.device) -> Sequence[Ops]:
    return [TorchOps(pair["key"], pair["value"]) for pair in quantizers]


_TORCH = Backend("torch", _make_torch_ops, lambda device: True)
_backends: dict[str, Backend] = {
    "cuda": Backend("cuda", make_cuda_ops, lambda device: device.type == "cuda"),
    "native": Backend("native", make_native_ops, can_run),
    "torch": _TORCH,
}


def backends() -> tuple[str, ...]:
    """Names of the backends in the order in which ``"auto"`` tries them; ``"torch"``, which always runs, is last."""
    return tuple(_backends)


def register(backend: Backend) -> None:
    """Add a backend, tried before torch and after those that are there; one of the same name is replaced."""
    _backends.pop(_TORCH.name)
    _backends[backend.name] = backend
    _backends[_TORCH.name] = _TORCH


def choose_ops(
    quantizers: Sequence[LayerQuantizers], device: torch.device, backend: str | None = None
) -> tuple[Sequence[Ops], str]:
    """The operations of every layer, and a remark for the log on why they were chosen.

    Args:
        quantizers: of the layers in order.
        device: of the model.
        backend: a name, or ``"auto"``: the first that serves the device and can run. By default what the environment
            variable ``KVQ_CALIB_OPS`` says, or ``"auto"``.

    Raises:
        RuntimeMismatchError: there is no such backend, or the one that is named cannot run.
    """
    named = (os.environ.get(VARIABLE) or AUTO) if backend is None else backend
    if named != AUTO:
        return _named(named, quantizers, device, "" if backend is not None else f"{VARIABLE}: "), ""
    note = ""
    for found in _backends.values():
        if not found.serves(device):
            continue
        try:
            return found.make(quantizers, device), note
        except RuntimeMismatchError as error:
            note += f" (no {found.name}: {error})"
            _warn_once(f"{found.name} operations cannot be used here, others take their place: {error}")
    raise RuntimeMismatchError(f"no backend can run on {device}")


@lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)  # whoever makes the cache


def _named(
    name: str, quantizers: Sequence[LayerQuantizers], device: torch.device, origin: str
) -> Sequence[Ops]:
    found = _backends.get(name)
    if found is None:
        known = ", ".join((AUTO, *sorted(_backends)))
        raise RuntimeMismatchError(f"{origin}unknown backend {name!r}; use one of {known}")
    try:
        return found.make(quantizers, device)
    except RuntimeMismatchError as error:
        raise RuntimeMismatchError(f"{origin}the {name} operations cannot be used: {error}") from error
