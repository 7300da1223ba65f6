"""One layer's packed cache with random contents, for the GPU benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpu_recipes import OUTLIERS, Recipe
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, COORDINATE_BITS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.codec.registry import codec_of
from kvq_calib.runtime.cuda.append import append_blocks
from kvq_calib.runtime.cuda.decode import DecodeKernel, DecodeStep
from kvq_calib.runtime.cuda.decode_tables import KernelTables
from kvq_calib.runtime.cuda.launcher import Launcher
from kvq_calib.runtime.slot_view import DecodeContext
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.schema.geometry import LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KINDS, Kind


@dataclass(frozen=True)
class Shape:
    """Shape of one layer's attention."""

    query_heads: int
    kv_heads: int
    head_dim: int = 128

    def cache_bytes(self, tokens: int, batch: int, bits: float) -> int:
        """Bytes of keys and values with this number of bits."""
        return int(2 * batch * tokens * self.kv_heads * self.head_dim * bits / 8)


SHAPES = {"LLaMA-7B": Shape(32, 32), "Llama-3-8B": Shape(32, 8)}


class LayerKernels:
    """A recipe's objects for one layer. They do not depend on the length, so they are made once.

    Args:
        recipe: widths, and whether there are outliers.
        shape: shape of the layer.
        launcher, device: where the kernels run.
    """

    def __init__(self, recipe: Recipe, shape: Shape, launcher: Launcher, device: torch.device) -> None:
        self.launcher, self.recipe, self.shape, self.device = launcher, recipe, shape, device
        half = shape.head_dim // 2
        rope = RopeSpec(
            pairs=tuple((i, i + half) for i in range(half)),
            inv_freq=tuple(500000.0 ** (-i / half) for i in range(half)),
        )
        geometry = LayerGeometry(
            num_query_heads=shape.query_heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, rope=0
        )
        self.quantizers = {
            kind: codec_of(spec)(
                spec,
                recipe.params(kind, geometry.shape(kind), rope).to(device),
                geometry.shape(kind),
                rope if kind == "key" else None,
            )
            for kind, spec in recipe.specs().items()
        }
        self.tables = {kind: KernelTables(q, kind) for kind, q in self.quantizers.items()}
        self.decode = DecodeKernel(launcher, self.tables["key"], self.tables["value"])

    def storage(self, batch: int) -> LayerStorage:
        """An empty storage."""
        return LayerStorage(self.quantizers["key"], self.quantizers["value"], batch, 0, self.device)

    def append(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Pack whole blocks, ``[B, H, 32 n, D]``."""
        append_blocks(self.launcher, self.tables["key"], self.tables["value"], storage, keys, values)


class PackedLayer:
    """A layer's packed keys and values with random contents: full pages, positions in order.

    Args:
        kernels: kernels of the recipe.
        tokens, batch: number of tokens, a multiple of 256, and of sequences.
    """

    def __init__(self, kernels: LayerKernels, tokens: int, batch: int) -> None:
        self.kernels, self.tokens, self.batch = kernels, tokens, batch
        shape, device = kernels.shape, kernels.device
        self.held: list[Tensor] = []
        self.pages = {kind: self._pages(kind, device) for kind in KINDS}
        start = torch.arange(0, tokens, BLOCK_TOKENS, dtype=torch.int32, device=device)
        blocks = torch.stack((start, torch.full_like(start, -1)), dim=-1).expand(batch, -1, -1).contiguous()
        self.context = DecodeContext(blocks, torch.empty(batch, 0, dtype=torch.int32, device=device))
        none = torch.empty(batch, shape.kv_heads, 0, shape.head_dim, dtype=torch.float16, device=device)
        self.exact = [(none, none), (none, none)]

    def _pages(self, kind: Kind, device: torch.device) -> Tensor:
        kernels, batch, count = self.kernels, self.batch, self.tokens // PAGE_TOKENS
        shape = kernels.shape
        layout = kernels.quantizers[kind].layout
        words = PAGE_BLOCKS * layout.words_per_block
        codes = torch.empty(count, batch * words, dtype=torch.int32, device=device)
        codes.random_(-(2**31), 2**31 - 1)
        self.held.append(codes)
        index = residual = starts = params = None
        if layout.outlier_cap:
            lists = PAGE_BLOCKS * batch * shape.kv_heads
            each = round(OUTLIERS * BLOCK_TOKENS * shape.head_dim)
            place = torch.randint(0, BLOCK_TOKENS * shape.head_dim, (count, lists, each), device=device)
            place = place.sort(-1).values
            index = (
                (place // shape.head_dim << COORDINATE_BITS | place % shape.head_dim)
                .to(torch.int16)
                .view(count, -1)
            )
            residual = torch.randn(count, lists * each, device=device).half()
            starts = each * torch.arange(lists + 1, dtype=torch.int32, device=device)
            starts = starts.expand(count, -1).contiguous()
            self.held += [index, residual, starts]
        if layout.token_params:
            params = torch.rand(count, batch, PAGE_TOKENS, 2, device=device).half()
            self.held.append(params)

        def address(tensor: Tensor | None) -> Tensor:
            if tensor is None:
                return torch.zeros(count, dtype=torch.int64)
            stride = tensor[0].numel() * tensor.element_size()
            return tensor.data_ptr() + stride * torch.arange(count, dtype=torch.int64)

        columns = [address(tensor) for tensor in (codes, params, index, residual, starts)]
        columns.append(torch.full((count,), 4 if starts is None else starts.element_size()))
        return torch.stack(columns, dim=-1).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes that one decode step reads."""
        return sum(tensor.nbytes for tensor in self.held)

    def attend(self, query: Tensor) -> Tensor:
        """Decode attention of queries ``[B, Hq, D]``. The result has the same shape."""
        pages, scaling = self.pages, self.kernels.shape.head_dim**-0.5
        step = DecodeStep(query, pages["key"], pages["value"], self.exact, self.context, scaling)
        return self.kernels.decode.attend(step)
