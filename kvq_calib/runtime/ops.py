"""The protocol of a layer's operations (packing and attention), the backends, and the choice of one."""

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
from kvq_calib.runtime.closing import LayersCloser
from kvq_calib.runtime.cuda.ops import make_cuda_ops
from kvq_calib.runtime.native_ops import can_run, make_native_ops
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.runtime.visibility import AttentionRequest
from kvq_calib.schema.spec import Kind

__all__ = ["Backend", "LayerQuantizers", "Ops", "backends", "choose_ops", "register"]

#: Environment variable that names a backend, if no argument does.
VARIABLE = "KVQ_CALIB_OPS"
AUTO = "auto"

#: Quantizers of one layer, on the device of the model.
LayerQuantizers = Mapping[Kind, Quantizer]


class Ops(Protocol):
    """Packing and attention of one layer. All backends store the same bits."""

    @property
    def name(self) -> str:
        """Name of the backend."""

    @property
    def rope(self) -> RopeTable | None:
        """The rotary embedding to apply to keys on every read; ``None`` if they are stored as attention uses them."""

    @property
    def closer(self) -> LayersCloser | None:
        """Packs blocks of all layers in one call; the layers share it. ``None`` if each packs its own."""

    def join(
        self, storage: LayerStorage, keys: Tensor, values: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor] | None:
        """The tail of a storage with new tokens appended, for :meth:`LayerStorage.hold`.

        Args:
            storage: of this layer.
            keys, values: the new tokens, ``[B, H, T, D]``, any float dtype.
            rotation: rotation to undo in the keys, or ``None``.

        Returns:
            ``None`` if torch should do it.

        Raises:
            RuntimeMismatchError: a number does not fit the storage dtype.
        """

    def pack(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Code whole blocks and store them.

        Args:
            storage: storage of this layer; its ``key`` and ``value`` get the blocks.
            keys, values: ``[B, H, 32 * n, D]`` in the storage dtype, with keys un-rotated if there is a :attr:`rope`.
        """

    def attend(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        """Attend to all tokens: ``[B, T, Hq, D]``, with ``D`` of the values, contiguous, in the query's dtype."""

    def forget(self) -> None:
        """Drop everything derived from tokens, because the cache was reset."""

    def tables(self) -> list[Tensor]:
        """Tensors beside the artifact's parameters, to count their memory."""


@dataclass(frozen=True)
class Backend:
    """A way to run a cache's operations.

    Attributes:
        name: name for ``KVQCache(..., backend=name)`` and ``KVQ_CALIB_OPS``.
        make: makes the operations of every layer of a cache, from their quantizers. Raises
            :class:`~kvq_calib.errors.RuntimeMismatchError`, with the reason in one line, if it cannot run.
        serves: whether ``"auto"`` tries it for a cache on a device.
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
    """Names of the backends, in the order in which ``"auto"`` tries them; ``"torch"``, which always runs, is last."""
    return tuple(_backends)


def register(backend: Backend) -> None:
    """Add a backend. It is tried before torch and after the others. A backend of the same name is replaced."""
    _backends.pop(_TORCH.name)
    _backends[backend.name] = backend
    _backends[_TORCH.name] = _TORCH


def choose_ops(
    quantizers: Sequence[LayerQuantizers], device: torch.device, backend: str | None = None
) -> tuple[Sequence[Ops], str]:
    """Choose the operations of every layer. Also returns a remark for the log on the reason.

    Args:
        quantizers: quantizers of the layers, in order.
        device: device of the model.
        backend: a name, or ``"auto"`` for the first one that serves the device and can run. The default is the
            environment variable ``KVQ_CALIB_OPS``, or ``"auto"``.

    Raises:
        RuntimeMismatchError: there is no such backend, or the named one cannot run.
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
    warnings.warn(text, RuntimeWarning, stacklevel=4)  # points to the caller that makes the cache


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
