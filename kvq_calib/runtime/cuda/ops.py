"""The operations of a cache on a GPU, with kernels where possible, and else with torch on the same device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.rope import Rotation
from kvq_calib.runtime.cuda.append import append_blocks
from kvq_calib.runtime.cuda.decode import DecodeKernel, DecodeStep
from kvq_calib.runtime.cuda.decode_tables import KernelTables, unsupported
from kvq_calib.runtime.cuda.dequantize import dequantize
from kvq_calib.runtime.cuda.launcher import Launcher, launcher_for
from kvq_calib.runtime.cuda.pages import PageTable
from kvq_calib.runtime.cuda.structs import TYPES
from kvq_calib.runtime.cuda.tables import CODECS
from kvq_calib.runtime.dense import attend_dense
from kvq_calib.runtime.exact_tokens import ExactTokens
from kvq_calib.runtime.slot_view import DecodeContext, SlotView
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.runtime.visibility import AttentionRequest
from kvq_calib.schema.spec import Kind

__all__ = ["CudaOps", "make_cuda_ops", "ops_with"]


class CudaOps:
    """Packing and attention of one layer; see :class:`kvq_calib.runtime.ops.Ops`. It stores the same bits as torch.

    Args:
        key, value: quantizers of the layer, on the device of the model, for heads of the same size.
        launcher: runs the kernels.
        view: view of the slots, shared by the layers of a cache.
    """

    #: Name of the backend.
    name = "cuda"
    #: Every layer packs its own blocks.
    closer = None

    def __init__(self, key: Quantizer, value: Quantizer, launcher: Launcher, view: SlotView) -> None:
        self.launcher = launcher
        self.view = view
        self.key_tables = KernelTables(key, "key")
        self.value_tables = KernelTables(value, "value")
        #: Why decode steps use torch, or an empty string.
        self.reason = unsupported(self.key_tables, self.value_tables)
        self._torch = TorchOps(key, value)
        self.rope = self._torch.rope
        self._pages: tuple[PageTable, PageTable] | None = None

    def forget(self) -> None:
        """Drop the addresses of pages."""
        self._pages = None

    def tables(self) -> list[Tensor]:
        """Tensors held besides the artifact's parameters, for the accounting of memory."""
        pages = [table.tensor for table in self._pages or ()]
        rope = [] if self.rope is None else self.rope.tensors()
        return [*self.key_tables.tensors(), *self.value_tables.tensors(), *pages, *rope]

    def join(self, storage: LayerStorage, keys: Tensor, values: Tensor, rotation: Rotation | None) -> None:
        """Do nothing. Torch joins tokens."""

    def pack(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Code and store whole blocks, ``[B, H, 32 * n, D]`` each."""
        append_blocks(self.launcher, self.key_tables, self.value_tables, storage, keys, values)

    def attend(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        """Attend to all stored tokens: ``[B, T, Hq, D]``, contiguous, in the dtype of the query."""
        query = request.query
        if query.shape[2] == 1 and query.dtype in (torch.float16, torch.bfloat16) and not self.reason:
            context = self.view.context(request.visibility, table)
            if context is not None:
                try:
                    return self._decode(request, storage, table, context)
                except RuntimeMismatchError as error:  # nvcc fails, or the GPU is too small
                    self.reason = str(error)
                    warnings.warn(f"{error}; torch decodes from here on", RuntimeWarning, stacklevel=2)
        plain = request.softcap is None and request.sinks is None and query.dtype in TYPES
        if plain and query.shape[2] > 1 and self.key_tables.head_dim % 2 == 0:
            return self._attend_dense(request, storage, table)
        return self._torch.attend(request, storage, table)

    @cached_property
    def kernel(self) -> DecodeKernel:
        """The decode kernel of a layer without a :attr:`reason`."""
        return DecodeKernel(self.launcher, self.key_tables, self.value_tables)

    def _page_tables(self, storage: LayerStorage) -> tuple[Tensor, Tensor]:
        if self._pages is None or self._pages[0].packed is not storage.key:
            self._pages = PageTable(storage.key), PageTable(storage.value)
        return self._pages[0].refresh(), self._pages[1].refresh()

    def _decode(
        self, request: AttentionRequest, storage: LayerStorage, table: SlotTable, context: DecodeContext
    ) -> Tensor:
        key_pages, value_pages = self._page_tables(storage)
        step = DecodeStep(
            query=request.query[:, :, 0].contiguous(),
            key_pages=key_pages,
            value_pages=value_pages,
            exact=ExactTokens(table).parts(storage),
            context=context,
            scaling=request.scaling,
            first_page=storage.key.dropped_pages,
            softcap=request.softcap,
            sink_logits=request.sinks,
        )
        return self.kernel.attend(step)[:, None]

    def _attend_dense(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        batch, dtype = request.query.shape[0], request.query.dtype
        key_pages, value_pages = self._page_tables(storage)

        def decode(first: int, count: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
            blocks = range(first, first + count)
            return (
                dequantize(self.launcher, self.key_tables, key_pages, batch, blocks, dtype, positions),
                dequantize(self.launcher, self.value_tables, value_pages, batch, blocks, dtype),
            )

        return attend_dense(request, storage, table, self.rope, decode)


def make_cuda_ops(quantizers: Sequence[Mapping[Kind, Quantizer]], device: torch.device) -> list[CudaOps]:
    """Make the operations of all layers of a cache on a GPU.

    Raises:
        RuntimeMismatchError: a GPU, a driver, a package to call it, or a compiler is missing; the GPU is too old; or
            there are no kernels for a layer.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeMismatchError("there is no CUDA device")
    _check_layers(quantizers)
    launcher = launcher_for(device)
    for source in ("append.cu", "dequantize.cu"):  # fails early if the compiler does not work
        launcher.prepare(source)
    return ops_with(quantizers, launcher)


def ops_with(quantizers: Sequence[Mapping[Kind, Quantizer]], launcher: Launcher) -> list[CudaOps]:
    """Make the operations of all layers, run by ``launcher``. One warning per reason names a layer that torch decodes.

    Raises:
        RuntimeMismatchError: there are no kernels for a layer.
    """
    _check_layers(quantizers)
    view = SlotView()
    ops = [CudaOps(pair["key"], pair["value"], launcher, view) for pair in quantizers]
    reasons = {layer.reason: index for index, layer in reversed(list(enumerate(ops))) if layer.reason}
    for reason, index in reasons.items():
        warnings.warn(f"layer {index}: {reason}; torch decodes it", RuntimeWarning, stacklevel=5)
    return ops


def _check_layers(quantizers: Sequence[Mapping[Kind, Quantizer]]) -> None:
    for index, pair in enumerate(quantizers):
        other = [q.codec for q in pair.values() if q.codec not in CODECS]
        if other:
            raise RuntimeMismatchError(f"layer {index}: there are no CUDA kernels for the codec {other[0]!r}")
        sizes = [pair[kind].layout.head_dim for kind in ("key", "value")]
        if sizes[0] != sizes[1]:
            raise RuntimeMismatchError(
                f"layer {index} has heads of {sizes[0]} channels in keys and {sizes[1]} in values; "
                "the kernels need the same size for both"
            )
