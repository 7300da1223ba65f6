"""The operations of a cache on a CPU: native kernels where they apply, else torch."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvq_calib.codec.native_reading import CODECS, code_tables
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.errors import ConfigError, RuntimeMismatchError
from kvq_calib.model.rope import Rotation
from kvq_calib.native.attend import DecodeStep, LayerKernel, PageRows
from kvq_calib.native.dequantize import Dequantizer
from kvq_calib.native.join import Joiner
from kvq_calib.native.loader import library
from kvq_calib.runtime.dense import attend_dense
from kvq_calib.runtime.exact_tokens import ExactTokens
from kvq_calib.runtime.native_closing import NativeCloser
from kvq_calib.runtime.native_pages import PageAddresses
from kvq_calib.runtime.native_steps import StepView
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage, not_finite
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.runtime.visibility import AttentionRequest
from kvq_calib.schema.spec import Kind

__all__ = ["NativeOps", "can_run", "make_native_ops"]


class NativeOps:
    """Packing and attention of one layer; see :class:`kvq_calib.runtime.ops.Ops`. It stores the same bits as torch.

    Args:
        key, value: quantizers of the layer, on the CPU.
        view: step view, which the layers of a cache share.
        closer: packs blocks of all layers of the cache; the layers share it.
    """

    #: Name of the backend.
    name = "native"

    def __init__(self, key: Quantizer, value: Quantizer, view: StepView, closer: NativeCloser) -> None:
        self.view, self.closer = view, closer
        self._quantizers = key, value
        self._torch = TorchOps(key, value)
        self.rope = self._torch.rope
        rope = key.read_rope
        self._rope = rope
        self._turns = None if rope is None else view.turns(rope)
        turns = None if self._turns is None else self._turns.turns
        library, tables = view.library, (code_tables(key), code_tables(value))
        self.kernel = LayerKernel(library, *tables, turns, key.pair_angle)
        self._readers = (
            Dequantizer(library, tables[0], turns, key.pair_angle),
            Dequantizer(library, tables[1]),
        )
        self._joiner = Joiner(view.library, key.storage, None if turns is None else turns.pair)
        #: The last rotation, and whether the kernel can undo it.
        self._rotation: weakref.ref[Rotation] | None = None
        self._undoes = False
        self._pages: tuple[PageAddresses, PageAddresses] | None = None

    def forget(self) -> None:
        """Drop the addresses of pages, and shared tables of positions."""
        self._pages = None
        self.view.forget()

    def tables(self) -> list[Tensor]:
        """Tensors beside the artifact's parameters, to count their memory."""
        rope = [] if self.rope is None else self.rope.tensors()
        pages = [addresses.rows.tensor for addresses in self._pages or ()]
        derived = [tensor for quantizer in self._quantizers for tensor in quantizer.derived()]
        derived += [quantizer.layout.width_table for quantizer in self._quantizers]
        read = [tensor for reader in self._readers for tensor in reader.tensors()]
        return [*derived, *self.kernel.tensors(), *read, *self.view.tensors(), *pages, *rope]

    def join(
        self, storage: LayerStorage, keys: Tensor, values: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor] | None:
        """The tail with new tokens appended; see :meth:`kvq_calib.runtime.ops.Ops.join`."""
        angles = None
        if rotation is not None:
            if (
                self._rotation is None or rotation is not self._rotation()
            ):  # the same for all layers of a pass
                self._rotation, rope = weakref.ref(rotation), self._rope
                self._undoes = rope is not None and rotation.turns(rope.pairs, keys.shape[-1])
            if not self._undoes:
                return None
            angles = rotation.inverse
        tail = storage.tail_key, storage.tail_value
        joined = self._joiner.join(tail, (_as_rows(keys), _as_rows(values)), angles)
        if joined is None:
            raise not_finite(storage.tail_key.dtype)
        return joined

    def pack(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Code whole blocks, ``[B, H, 32 * n, D]`` each, and store them."""
        self._torch.pack(storage, keys, values)

    def attend(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        """Attend to all tokens: ``[B, T, Hq, D]``, contiguous, in the dtype of the query."""
        if request.query.shape[2] == 1:
            step = self.view.step(request.visibility, table, self._turns)
            if step is not None:
                return self._decode(request, storage, table, step)
        elif request.softcap is None and request.sinks is None:
            return self._attend_dense(request, storage, table)
        return self._torch.attend(request, storage, table)

    def _page_rows(self, storage: LayerStorage) -> tuple[PageRows, PageRows]:
        pages = self._pages
        if pages is None or pages[0].packed is not storage.key:
            kernel = self.kernel
            pages = PageAddresses(storage.key, kernel.key), PageAddresses(storage.value, kernel.value)
            self._pages = pages
        return pages[0].refresh(), pages[1].refresh()

    def _attend_dense(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        keys, values = self._page_rows(storage)
        dtype = request.query.dtype

        def decode(first: int, count: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
            angles = None
            if self._turns is not None:
                if positions is None:  # there is nothing to read
                    positions = torch.empty(keys.batch, 0, dtype=torch.int32)
                angles = self._turns.of_positions(positions)
            key, value = self._readers
            return key.read(keys, first, count, angles).to(dtype), value.read(values, first, count).to(dtype)

        return attend_dense(request, storage, table, self.rope, decode)

    def _decode(
        self, request: AttentionRequest, storage: LayerStorage, table: SlotTable, step: DecodeStep
    ) -> Tensor:
        query = request.query
        out = self.kernel.attend(
            query[:, :, 0].float().contiguous(),
            step,
            self._page_rows(storage),
            ExactTokens(table).parts(storage),
            scaling=request.scaling,
            first_page=storage.key.dropped_pages,
            softcap=request.softcap,
            sink_logits=request.sinks,
        )
        return out.to(query.dtype)[:, None]


def _as_rows(x: Tensor) -> Tensor:
    """Convert to float32 with contiguous coordinates."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def can_run(device: torch.device) -> bool:
    """Whether to try this backend for a cache on a device: on the CPU, if there is a library."""
    return device.type == "cpu" and library() is not None


def make_native_ops(quantizers: Sequence[Mapping[Kind, Quantizer]], device: torch.device) -> list[NativeOps]:
    """Make the operations of every layer of a cache on the CPU.

    Raises:
        RuntimeMismatchError: the cache is not on the CPU, no library runs here, or a layer is not supported.
    """
    if device.type != "cpu":
        raise RuntimeMismatchError(f"the cache is on {device}")
    for index, pair in enumerate(quantizers):
        other = [q.codec for q in pair.values() if q.codec not in CODECS]
        if other:
            raise RuntimeMismatchError(f"layer {index}: the codec {other[0]!r} has no native kernels")
    try:
        found = library()
    except ConfigError as error:
        raise RuntimeMismatchError(str(error)) from error
    if found is None:
        ops = os.environ.get("KVQ_CALIB_OPS")
        why = "no native library is there; install the package with a C++ compiler"
        raise RuntimeMismatchError("KVQ_CALIB_OPS is 'torch'" if ops == "torch" else why)
    view = StepView(found)
    layers = [(pair["key"], pair["value"]) for pair in quantizers]
    closer = NativeCloser(found, layers)
    return [NativeOps(key, value, view, closer) for key, value in layers]
