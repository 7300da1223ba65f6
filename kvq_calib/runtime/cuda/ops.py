"""The CUDA kernels: their compilation, their launch, and :class:`CudaOps`, which puts them to use.

``kernels/cuda/*.cu`` know raw pointers only. Here every kernel has one typed function that checks what it is given;
``docs/kernels.md`` states layouts, streams and the compile cache. pycuda is imported in one place,
:class:`PyCudaLauncher`, and only when a cache on a GPU asks for kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.codec.quantizer import Quantizer, importance_edges, reciprocal
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.files import shipped_folder
from kvq_calib.runtime.storage import LayerStorage, PackedTensor, Page, SlotTable
from kvq_calib.runtime.torch_ops import AttentionRequest, ReferenceOps, Visibility
from kvq_calib.schema.spec import Kind

__all__ = ["CudaOps", "DecodeVariant", "Launcher", "PyCudaLauncher", "make_ops"]

#: Oldest architecture the kernels run on.
MIN_CAPABILITY = (8, 0)
#: Query heads one thread block serves; larger groups are divided.
MAX_GROUP = 8
MAX_HEAD_DIM = 256
#: Second and third dimension of a grid.
MAX_GRID = 65535
#: Pages that one launch of the append kernel fills: bounds its work space.
APPEND_PAGES = 64
#: Exact tokens (sinks and tail) one thread block attends to.
EXACT_TOKENS = 64
#: Queries one call of torch's attention takes beside a packed cache: bounds the mask.
_QUERY_ROWS = 256
_DECODE_THREADS, _APPEND_THREADS, _DEQUANTIZE_THREADS = 128, 512, 128
_MASKED = -(2**31)
_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


# ---- compilation and launch ----------------------------------------------------------------------------------


class Launcher(Protocol):
    """Runs kernels: on a GPU, or in tests on the host."""

    @property
    def multiprocessors(self) -> int:
        """How many thread blocks run side by side, about."""

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory a thread block can have."""

    def constant(self, source: str, defines: tuple[str, ...], name: str) -> int:
        """An ``int`` that the compiled ``source`` declares."""

    def launch(
        self,
        source: str,
        defines: tuple[str, ...],
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        params: ctypes.Structure,
    ) -> None:
        """Run ``kernel`` of ``kernels/cuda/<source>``, compiled with ``-D`` ``defines``, after all work of torch's
        current stream and before what is enqueued there later."""


def kernel_folder() -> Path:
    """Where the sources stand: inside the wheel, or beside the package in a checkout."""
    return shipped_folder("kernels") / "cuda"


def compile_cubin(source: str, defines: tuple[str, ...], arch: str, cache: Path, nvcc: str = "nvcc") -> bytes:
    """Machine code of ``kernels/cuda/<source>``, from the cache or from ``nvcc``.

    The key of the cache is everything that changes the result: all sources, options, compiler version and
    architecture. A file is written elsewhere in the folder, then renamed: nobody ever reads half of one.

    Raises:
        RuntimeMismatchError: no compiler, or it refuses.
    """
    folder = kernel_folder()
    found = shutil.which(nvcc)
    if found is None:
        raise RuntimeMismatchError("no nvcc on the PATH; install the CUDA toolkit to use the kernels")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    options = ["-std=c++17", "-arch", arch, "-cubin", f"-I{folder}", *(f"-D{define}" for define in defines)]
    digest = hashlib.sha256()
    for part in (version, source, *options[:3], *defines):
        digest.update(part.encode() + b"\0")
    for path in sorted([*folder.glob("*.cuh"), folder / source]):
        digest.update(path.read_bytes() + b"\0")
    target = cache / f"{Path(source).stem}-{arch}-{digest.hexdigest()[:32]}.cubin"
    if target.is_file():
        return target.read_bytes()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / target.name
        done = subprocess.run(
            [found, *options, str(folder / source), "-o", str(built)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not built.is_file():
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            first = next(
                (line for line in lines if "error" in line.lower()), lines[0] if lines else "no output"
            )
            raise RuntimeMismatchError(f"nvcc could not compile {source} for {arch}: {first.strip()}")
        os.replace(built, target)
    return target.read_bytes()


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$KVQ_CALIB_CACHE``, or the user's cache folder."""
    named = os.environ.get("KVQ_CALIB_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvq-calib" / "kernels"


class PyCudaLauncher:
    """Runs kernels through pycuda, in the primary context that torch uses.

    Args:
        device: a CUDA device.

    Raises:
        RuntimeMismatchError: no pycuda, no driver, or a GPU that is too old.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pycuda.driver as driver
        except ImportError as error:
            raise RuntimeMismatchError(f"pycuda cannot be imported ({error}); pip install pycuda") from error
        self._driver = driver
        self.device = torch.device(
            device.type, torch.cuda.current_device() if device.index is None else device.index
        )
        capability = torch.cuda.get_device_capability(self.device)
        if capability < MIN_CAPABILITY:
            raise RuntimeMismatchError(
                f"this GPU is sm_{capability[0]}{capability[1]}; the kernels need sm_80 or newer"
            )
        self.arch = f"sm_{capability[0]}{capability[1]}"
        torch.empty(1, device=self.device)  # torch makes the primary context first
        try:
            driver.init()
            self._context = driver.Device(self.device.index).retain_primary_context()
        except driver.Error as error:
            raise RuntimeMismatchError(f"the CUDA driver refuses: {error}") from error
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._functions: dict[tuple[str, tuple[str, ...], str], Any] = {}
        self._constants: dict[tuple[str, tuple[str, ...], str], int] = {}
        self._side: tuple[Any, torch.cuda.Stream] | None = None

    @cached_property
    def multiprocessors(self) -> int:
        """Of the device."""
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    @cached_property
    def shared_limit(self) -> int:
        """Of the device, for blocks that ask for more than the default."""
        attribute = self._driver.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        return int(self._driver.Device(self.device.index).get_attribute(attribute))

    def _module(self, source: str, defines: tuple[str, ...]) -> Any:
        key = (source, defines)
        if key not in self._modules:
            code = compile_cubin(source, defines, self.arch, cache_folder())
            self._context.push()
            try:
                self._modules[key] = self._driver.module_from_buffer(code)
            finally:
                self._context.pop()
        return self._modules[key]

    def prepare(self, source: str) -> None:
        """Compile and load a source that has no variants.

        Raises:
            RuntimeMismatchError: it cannot be compiled or loaded.
        """
        self._module(source, ())

    def constant(self, source: str, defines: tuple[str, ...], name: str) -> int:
        """An ``int`` that the compiled ``source`` declares."""
        key = (source, defines, name)
        if key not in self._constants:
            module = self._module(source, defines)
            value = bytearray(4)
            self._context.push()
            try:
                self._driver.memcpy_dtoh(value, module.get_global(name)[0])
            finally:
                self._context.pop()
            self._constants[key] = int.from_bytes(value, "little", signed=True)
        return self._constants[key]

    def _function(self, source: str, defines: tuple[str, ...], kernel: str, size: int) -> Any:
        key = (source, defines, kernel)
        if key not in self._functions:
            function = self._module(source, defines).get_function(kernel)
            function.prepare([f"{size}s"])
            self._functions[key] = function
        return self._functions[key]

    def launch(
        self,
        source: str,
        defines: tuple[str, ...],
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        params: ctypes.Structure,
    ) -> None:
        """See :class:`Launcher`."""
        driver = self._driver
        with torch.cuda.device(self.device):
            function = self._function(source, defines, kernel, ctypes.sizeof(params))
            if shared_bytes > 48 * 1024:
                function.set_attribute(driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            current = torch.cuda.current_stream(self.device)
            block = (threads, 1, 1)
            try:
                if current.cuda_stream == 0:
                    # The legacy default stream is the same for both libraries.
                    function.prepared_async_call(grid, block, None, bytes(params), shared_size=shared_bytes)
                    return
                # pycuda cannot adopt torch's stream, but torch can adopt pycuda's.
                if self._side is None:
                    self._context.push()
                    try:
                        own = driver.Stream()
                    finally:
                        self._context.pop()
                    self._side = own, torch.cuda.ExternalStream(own.handle, device=self.device)
                own, seen_by_torch = self._side
                seen_by_torch.wait_stream(current)
                function.prepared_async_call(grid, block, own, bytes(params), shared_size=shared_bytes)
                current.wait_stream(seen_by_torch)
            except driver.Error as error:
                raise RuntimeMismatchError(f"{kernel} could not be launched: {error}") from error


# ---- what the kernels are given ------------------------------------------------------------------------------

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _DecodeParams(ctypes.Structure):
    _fields_ = (
        *(
            (name, _P)
            for name in ("query", "key_pages", "value_pages", "blocks", "key_channels", "value_channels")
        ),
        *(
            (name, _P)
            for name in ("key_levels", "value_levels", "key_angles", "key_pair_scale", "value_affine")
        ),
        ("exact_key", _P * 2),
        ("exact_value", _P * 2),
        *(
            (name, _P)
            for name in ("exact_positions", "exact_angles", "exact_pairs", "partial", "partial_sum")
        ),
        ("exact_stride", _L * 4),
        *((name, _I) for name in ("key_words", "value_words", "kv_heads", "query_heads", "subgroups")),
        *((name, _I) for name in ("first_page", "pages", "packed_splits", "splits")),
        ("exact_count", _I * 2),
        ("first_token", _I),
        ("scaling", _F),
        ("softcap", _F),
        ("rope_scaling", _F),
        ("key_rope", _I),
        ("block_stride", _I),
        ("group", _I),
    )


class _ReduceParams(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("partial", "partial_sum", "sink_logits", "out")),
        *((name, _I) for name in ("packed_splits", "splits", "separate", "padding")),
    )


class _AppendSide(ctypes.Structure):
    _fields_ = (
        *(
            (name, _P)
            for name in ("x", "pages", "cosine", "sine", "phase_pair", "scale", "reciprocal", "zero_point")
        ),
        *((name, _P) for name in ("levels", "boundaries", "bits", "word_offset", "feedback", "sweep_share")),
        *((name, _P) for name in ("importance", "importance_edge")),
        *((name, _P) for name in ("outlier_index", "outlier_residual", "outlier_count")),
        ("stride", _L * 3),
        *(
            (name, _I)
            for name in ("type", "words", "level_count", "level_stride", "token", "channel_normalized")
        ),
        *((name, _I) for name in ("per_side", "cap", "capacity", "storage_bfloat")),
        *((name, _I) for name in ("trellis", "boundary_count", "sweeps", "padding")),
    )


class _AppendParams(ctypes.Structure):
    _fields_ = (
        ("side", _AppendSide * 2),
        *((name, _I) for name in ("batch", "heads", "head_dim", "first_block", "fed_warps", "padding")),
    )


class _PlaceParams(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("index", "residual", "count", "page_index", "page_residual", "page_start")),
        *((name, _I) for name in ("capacity", "heads", "blocks", "first_block", "batch", "start_bytes")),
    )


class _DequantizeParams(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("pages", "levels", "scale", "zero_point", "bits", "word_offset")),
        *((name, _P) for name in ("angles", "pairs", "positions", "out")),
        ("rope_scaling", _F),
        *(
            (name, _I)
            for name in ("level_count", "level_stride", "heads", "head_dim", "words", "first_block")
        ),
        *((name, _I) for name in ("token", "channel_normalized", "storage_bfloat", "trellis", "type")),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``tensor``, if it is what a kernel was promised."""
    if tensor.device != device:
        raise RuntimeMismatchError(f"{name} is on {tensor.device}, the cache on {device}; move it there")
    if tensor.dtype != dtype:
        raise RuntimeMismatchError(f"{name} is {tensor.dtype}, expected {dtype}; convert it")
    if tuple(tensor.shape) != shape:
        raise RuntimeMismatchError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise RuntimeMismatchError(f"{name} has strides {tensor.stride()}; make it contiguous")
    return tensor


def _turns(radians: Tensor) -> Tensor:
    """Angles as 32-bit fractions of a turn: float64 radians to int32 of the same shape."""
    units = torch.round(radians.double() / (2 * math.pi) * 2.0**32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(units >= 1 << 31, units - (1 << 32), units).to(torch.int32)


def _planes(levels: Tensor, entries: int) -> Tensor:
    """Halves ``[..., L]`` as the table the kernel reads, bytes ``[..., 2 * entries]``.

    Up to 32 entries the low bytes of all, then the high bytes; more stand as they are.
    """
    padded = torch.zeros(*levels.shape[:-1], entries, dtype=torch.float16, device=levels.device)
    width = min(entries, levels.shape[-1])
    padded[..., :width] = levels[..., :width]
    pairs: Tensor = padded.view(torch.uint8).unflatten(-1, (entries, 2))
    return (pairs.mT if entries <= 32 else pairs).flatten(-2).contiguous()


@dataclass(frozen=True)
class DecodeVariant:
    """The compile-time constants of ``decode.cu``, see there."""

    head_dim: int
    group: int
    key_bits: int
    value_bits: int
    key_entries: int
    value_entries: int
    key_outliers: bool
    value_outliers: bool
    value_token: bool
    rope: bool
    softcap: bool
    query_bfloat: bool
    storage_bfloat: bool
    key_trellis: bool = False
    value_trellis: bool = False

    @property
    def defines(self) -> tuple[str, ...]:
        """As the compiler takes them."""
        return tuple(f"KVQ_{field.name.upper()}={int(getattr(self, field.name))}" for field in fields(self))


class KernelTables:
    """One quantizer's numbers as the kernels read them; made once.

    Args:
        quantizer: keys or values of a layer, on the device of the cache.
        kind: which.

    Attributes:
        bits, word_offset: uint8 and int32 ``[C]``.
        levels, boundaries: float32 ``[C or 1, L]`` and ``[C or 1, L - 1]``, with a trellis ``[C or 1, L - 4]``: between
            neighbours in a subset. ``level_stride`` is 0 where all channels share the row.
        scale, zero_point, reciprocal: float32 ``[C]`` or ``None``.
        feedback, sweep_shares: float32 ``[H, D, D]`` or ``None``.
        importance, importance_edges: float32 ``[H, 32]`` and ``[H, 31]``, or ``None``.
    """

    def __init__(self, quantizer: Quantizer, kind: Kind) -> None:
        params, geometry, layout = quantizer.params, quantizer.geometry, quantizer.layout
        self.quantizer, self.kind = quantizer, kind
        self.device = params.bits.device
        self.heads, self.head_dim = geometry.num_kv_heads, geometry.head_dim
        self.words = PAGE_BLOCKS * layout.words_per_block
        self.token = layout.token_params
        self.trellis = quantizer.spec.trellis
        self.channel_normalized = quantizer.spec.channel_normalized
        self.cap = quantizer.outlier_cap
        self.storage_bfloat = quantizer.storage == torch.bfloat16
        self.bits = params.bits.contiguous()
        self.word_offset = torch.tensor(layout.word_offsets, dtype=torch.int32, device=self.device)
        shared = not bool(params.codebook_index.any()) and len(set(layout.widths)) == 1
        rows = slice(0, 1) if shared else slice(None)
        self.levels = quantizer.levels[rows].contiguous()
        if self.trellis:
            self.boundaries = ((self.levels[:, :-4] + self.levels[:, 4:]) * 0.5).contiguous()
        else:
            self.boundaries = quantizer.boundaries[rows].contiguous()
        self.level_stride = 0 if shared else 1
        self.scale = None if params.scale is None else quantizer.scale.contiguous()
        self.zero_point = None if params.zero_point is None else quantizer.zero_point.contiguous()
        self.reciprocal = None if self.scale is None else reciprocal(self.scale)
        self.feedback = quantizer.feedback.contiguous() if quantizer.spec.feedback else None
        self.sweep_shares = quantizer.sweep_shares.contiguous() if quantizer.spec.sweeps else None
        self.importance = self.importance_edges = None
        if params.importance is not None and params.importance_unit is not None:
            self.importance = params.importance.float().contiguous()
            self.importance_edges = importance_edges(params.importance_unit).contiguous()

    def _tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    @cached_property
    def rope_pairs(self) -> tuple[list[tuple[int, int]], list[float]]:
        """All coordinates of a head in pairs, with radians per token: RoPE's pairs, then the others at 0."""
        rope = self.quantizer.rope if self.kind == "key" and self.quantizer.spec.pre_rope else None
        pairs = [] if rope is None else [(int(a), int(b)) for a, b in rope.pairs]
        frequencies = [] if rope is None else list(rope.inv_freq)
        taken = {coordinate for pair in pairs for coordinate in pair}
        rest = [coordinate for coordinate in range(self.head_dim) if coordinate not in taken]
        pairs += [(rest[i], rest[i + 1]) for i in range(0, len(rest) - 1, 2)]
        return pairs, frequencies + [0.0] * (len(pairs) - len(frequencies))

    @cached_property
    def pairs(self) -> Tensor:
        """int32 ``[D / 2]``: the coordinates of each pair, ``first | second << 16``."""
        return self._tensor([first | second << 16 for first, second in self.rope_pairs[0]])

    @cached_property
    def frequencies(self) -> Tensor:
        """int32 ``[D / 2]``: turns per token of each pair, in 2^-32."""
        return _turns(self._tensor(self.rope_pairs[1], torch.float64))

    @property
    def rope_scaling(self) -> float:
        """The factor on rotated pairs."""
        rope = self.quantizer.rope
        return 1.0 if rope is None or self.kind == "value" else rope.attention_scaling

    @cached_property
    def angles(self) -> Tensor:
        """int32 ``[H, D / 2, 2]``: turns per token, and turns at position 0, which undo the phase."""
        start = torch.zeros(self.heads, self.head_dim // 2, dtype=torch.float64, device=self.device)
        phase = self.quantizer.params.phase
        if phase is not None:
            start[:, : phase.shape[1]] = -phase.double()
        return torch.stack((self.frequencies.expand(self.heads, -1), _turns(start)), dim=-1).contiguous()

    @cached_property
    def phase(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Cosines and sines ``[H, P]``, and per coordinate its partner and pair; then ``P``."""
        phase = self.quantizer.params.phase
        if phase is None:
            return None
        place = [-1] * self.head_dim
        for number, (first, second) in enumerate(self.rope_pairs[0][: phase.shape[1]]):
            place[first] = second | number << 16
            place[second] = first | number << 16 | 1 << 15
        angle = phase.float()
        return angle.cos().contiguous(), angle.sin().contiguous(), self._tensor([*place, phase.shape[1]])

    # Tables of the decode kernel.

    @property
    def uniform_bits(self) -> int:
        """The width of every channel, or 0: each has its own, or all need a wide table."""
        widths = set(self.quantizer.layout.widths)
        return widths.pop() if len(widths) == 1 and max(widths) <= 4 and min(widths) > 0 else 0

    @property
    def entries(self) -> int:
        """Levels in a row of the decode kernel's table: what byte permutes serve, or all."""
        return max(8, self.quantizer.spec.level_count(max(self.quantizer.layout.widths)))

    @cached_property
    def order(self) -> Tensor:
        """int64 ``[H, D]``: coordinates as the decode kernel takes them.

        Keys by RoPE pairs, first and second. Channels of like widths stand side by side.
        """
        widths = self.bits.view(self.heads, self.head_dim).tolist()
        orders = []
        for head in range(self.heads):
            if self.kind == "key":
                numbers = sorted(
                    range(self.head_dim // 2),
                    key=lambda pair: tuple(
                        widths[head][coordinate] for coordinate in self.rope_pairs[0][pair]
                    ),
                )
                orders.append([coordinate for pair in numbers for coordinate in self.rope_pairs[0][pair]])
            else:
                orders.append(sorted(range(self.head_dim), key=lambda coordinate: widths[head][coordinate]))
        return self._tensor(orders, torch.int64)

    @cached_property
    def _pair_order(self) -> Tensor:
        """int64 ``[H, D / 2]``: pairs in the order of :attr:`order`."""
        number = torch.empty(self.head_dim, dtype=torch.int64, device=self.device)
        for index, pair in enumerate(self.rope_pairs[0]):
            number[list(pair)] = index
        return number[self.order[:, ::2]]

    @cached_property
    def channels(self) -> Tensor:
        """int32 ``[H, D, 2]``: word offset, and ``coordinate | bits << 16``, in :attr:`order`."""
        channel = self.order + self.head_dim * torch.arange(self.heads, device=self.device)[:, None]
        packed = self.order | self.bits[channel].to(torch.int64) << 16
        return torch.stack((self.word_offset[channel], packed.to(torch.int32)), dim=-1).contiguous()

    @cached_property
    def ordered_angles(self) -> Tensor:
        """:attr:`angles` in :attr:`order`."""
        return self.angles.gather(1, self._pair_order[..., None].expand(-1, -1, 2)).contiguous()

    @cached_property
    def _ordered_levels(self) -> Tensor:
        """What a code stands for before token scales, float32 ``[H, D, L]`` in :attr:`order`."""
        channels = self.heads * self.head_dim
        values = self.levels.expand(channels, -1)
        if not self.token:
            assert self.scale is not None
            assert self.zero_point is not None
            values = self.zero_point[:, None] + self.scale[:, None] * values
        by_head = values.reshape(self.heads, self.head_dim, -1)
        return by_head.gather(1, self.order[..., None].expand(-1, -1, by_head.shape[-1]))

    @cached_property
    def largest_level(self) -> float:
        """Of :attr:`_ordered_levels`, in magnitude; reads the device once."""
        return float(self._ordered_levels.abs().max())

    @cached_property
    def _pair_norm(self) -> Tensor:
        """float32 ``[H, D / 2]``: the largest level of a pair, which leaves its table in [-1, 1]."""
        norm = self._ordered_levels.abs().amax(-1).unflatten(-1, (-1, 2)).amax(-1)
        return torch.where(norm > 0, norm, 1.0)

    @cached_property
    def pair_scale(self) -> Tensor:
        """float32 ``[H, D / 2, 2]``: what a query is multiplied by for a pair; its levels' reciprocal factor."""
        turned = self.ordered_angles[..., 0] != 0
        factor = self._pair_norm * torch.where(turned, self.rope_scaling, 1.0)
        return torch.stack((factor, 1.0 / self._pair_norm), dim=-1).contiguous()

    @cached_property
    def level_table(self) -> Tensor:
        """The decode kernel's levels, uint8 ``[H, D, 2 * entries]``; keys divided by their pair's norm."""
        levels = self._ordered_levels
        if self.kind == "key":
            levels = levels / self._pair_norm.repeat_interleave(2, dim=-1)[..., None]
        return _planes(levels.to(torch.float16), self.entries)

    @cached_property
    def affine(self) -> Tensor:
        """float32 ``[H, D, 2]``: factor and offset of the mixed output's channels."""
        channels = self.heads * self.head_dim
        pair = torch.stack((torch.ones(channels), torch.zeros(channels)), dim=-1).to(self.device)
        if self.channel_normalized:
            assert self.scale is not None
            assert self.zero_point is not None
            pair = torch.stack((self.scale, self.zero_point), dim=-1)
        return pair.view(self.heads, self.head_dim, 2).contiguous()

    def tensors(self) -> list[Tensor]:
        """Everything held beside the quantizer's parameters."""
        held = [value for value in vars(self).values() if isinstance(value, Tensor)]
        own = {tensor.data_ptr() for tensor in self.quantizer.params.tensors().values()}
        return [tensor for tensor in held if tensor.data_ptr() not in own]


def _page_rows(pages: Sequence[Page]) -> Tensor:
    """Addresses of the buffers of pages and bytes of a list start, int64 ``[n, 6]``: ``PagePointers`` in ``common.cuh``."""
    rows = [
        [
            *(
                _pointer(buffer) or 0
                for buffer in (
                    page.codes,
                    page.token_params,
                    page.outlier_index,
                    page.outlier_residual,
                    page.outlier_start,
                )
            ),
            0 if page.outlier_start is None else page.outlier_start.element_size(),
        ]
        for page in pages
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 6)


class PageTable:
    """Device pointers of a tensor's pages, int64 ``[n, 6]``, kept up to date page by page."""

    def __init__(self, packed: PackedTensor) -> None:
        self.packed = packed
        self._pages: list[Page] = []
        self._host = torch.empty(0, 6, dtype=torch.int64)
        self._state: tuple[Any, ...] = ()
        self.tensor = self._host

    def refresh(self) -> Tensor:
        """The table, int64 ``[pages, 6]`` on the device."""
        pages = self.packed.pages
        last = pages[-1] if pages else None
        state = (
            len(pages),
            self.packed.blocks,
            self.packed.dropped_pages,
            pages,
            last,
            last and last.outlier_index,
        )
        if len(self._state) == len(state) and all(
            a is b or (isinstance(a, int) and a == b) for a, b in zip(state, self._state, strict=True)
        ):
            return self.tensor
        same = 0
        while same < min(len(pages), len(self._pages)) - 1 and pages[same] is self._pages[same]:
            same += 1
        self._host = torch.cat((self._host[:same], _page_rows(pages[same:])))
        self._pages, self._state = list(pages), state
        self.tensor = self._host.to(self.packed.device)
        return self.tensor


# ---- one typed function per kernel ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeContext:
    """What a decode step reads besides packed pages; the same for all layers that see the same slots.

    Attributes:
        blocks: int32 ``[B, 8 * n, 2]``: position of each block's first token, bits of its attended tokens.
        exact_positions: int32 ``[B, sinks + tail]``: positions of the exact tokens, -2^31 where not attended.
        first_token: tokens of blocks before it, counted from block 0 with 32 to a block, have left the window.
    """

    blocks: Tensor
    exact_positions: Tensor
    first_token: int = 0


def decode_attention(
    launcher: Launcher,
    query: Tensor,
    key: KernelTables,
    value: KernelTables,
    key_pages: Tensor,
    value_pages: Tensor,
    exact: Sequence[tuple[Tensor, Tensor]],
    context: DecodeContext,
    *,
    first_page: int = 0,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of one token per sequence over packed pages and exact tokens.

    Args:
        launcher: runs the kernels.
        query: float16 or bfloat16 ``[B, Hq, D]``, contiguous, rotated by the model.
        key, value: the layer's tables.
        key_pages, value_pages: int64 ``[n, 6]``, see :class:`PageTable`.
        exact: two pairs of keys (un-rotated where they are rotated on read) and values: sinks, then tail;
            storage dtype ``[B, H, t, D]`` with contiguous ``D`` and ``t``.
        context: which tokens are attended, and where they stand.
        first_page: number of the first page in ``context.blocks``.
        scaling: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sink_logits: float32 ``[Hq]``, a logit per head without a value; or ``None``.

    Returns:
        ``[B, Hq, D]`` in the dtype of the query.

    Raises:
        RuntimeMismatchError: a shape, dtype, stride or device is not as promised, or has no variant.
    """
    device, heads, size = key.device, key.heads, key.head_dim
    batch, query_heads = query.shape[0], query.shape[1]
    reason = unsupported(key, value)
    if reason:
        raise RuntimeMismatchError(reason)
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeMismatchError(f"queries are {query.dtype}; the kernels take float16 and bfloat16")
    _check("query", query, (batch, query_heads, size), query.dtype, device)
    if query_heads % heads:
        raise RuntimeMismatchError(f"{query_heads} query heads are no multiple of {heads} key-value heads")
    pages = key_pages.shape[0]
    _check("key_pages", key_pages, (pages, 6), torch.int64, device)
    _check("value_pages", value_pages, (pages, 6), torch.int64, device)
    table_blocks = context.blocks.shape[1]
    if table_blocks < (first_page + pages) * PAGE_BLOCKS:
        raise RuntimeMismatchError(f"the block table lists {table_blocks} blocks, the pages hold more")
    _check("blocks", context.blocks, (batch, table_blocks, 2), torch.int32, device)
    storage = key.quantizer.storage
    for keys, values in exact:
        for name, tensor in (("exact keys", keys), ("exact values", values)):
            if tensor.device != device or tensor.dtype != storage or tensor.shape != keys.shape:
                raise RuntimeMismatchError(
                    f"{name} are {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {storage} {tuple(keys.shape)} on {device}"
                )
            strides = tensor.stride() if tensor.numel() else (0, 0, size, 1)
            if strides[2:] != (size, 1) or (tensor.numel() and strides != keys.stride()):
                raise RuntimeMismatchError(f"{name} have strides {strides}; make them contiguous")
    counts = [keys.shape[2] for keys, _ in exact]
    _check("exact_positions", context.exact_positions, (batch, sum(counts)), torch.int32, device)
    group = query_heads // heads
    subgroups = -(-group // MAX_GROUP)
    if heads * subgroups > MAX_GRID or batch > MAX_GRID:
        raise RuntimeMismatchError(f"{batch} sequences of {heads} heads are more than one launch takes")

    variant = DecodeVariant(
        head_dim=size,
        group=-(-group // subgroups),
        key_bits=key.uniform_bits,
        value_bits=value.uniform_bits,
        key_entries=key.entries,
        value_entries=value.entries,
        key_outliers=key.cap > 0,
        value_outliers=value.cap > 0,
        value_token=value.token,
        rope=bool(key.rope_pairs[1]) and any(key.rope_pairs[1]),
        softcap=softcap is not None,
        query_bfloat=query.dtype == torch.bfloat16,
        storage_bfloat=storage == torch.bfloat16,
        key_trellis=key.trellis,
        value_trellis=value.trellis,
    )
    # Two thread blocks share a multiprocessor; a block has four warps, which take a page each.
    packed_splits = min(max(2 * launcher.multiprocessors // (heads * subgroups * batch), 1), -(-pages // 4))
    exact_splits = -(-sum(counts) // EXACT_TOKENS)
    splits = packed_splits + exact_splits
    if splits == 0:
        return torch.zeros_like(query)
    partial = torch.empty(batch, query_heads, splits, size, dtype=torch.float32, device=device)
    partial_sum = torch.empty(batch, query_heads, splits, 2, dtype=torch.float32, device=device)
    rotation = value.quantizer.params.rotation
    separate = rotation is not None
    shape = (2, batch, query_heads, size) if separate else (batch, query_heads, size)
    out = torch.empty(shape, dtype=torch.float32 if separate else query.dtype, device=device)

    params = _DecodeParams(
        query=query.data_ptr(),
        key_pages=_pointer(key_pages),
        value_pages=_pointer(value_pages),
        blocks=_pointer(context.blocks),
        key_channels=key.channels.data_ptr(),
        value_channels=value.channels.data_ptr(),
        key_levels=key.level_table.data_ptr(),
        value_levels=value.level_table.data_ptr(),
        key_angles=key.ordered_angles.data_ptr(),
        key_pair_scale=key.pair_scale.data_ptr(),
        value_affine=value.affine.data_ptr(),
        exact_key=(_P * 2)(*(_pointer(keys) for keys, _ in exact)),
        exact_value=(_P * 2)(*(_pointer(values) for _, values in exact)),
        exact_positions=_pointer(context.exact_positions),
        exact_angles=key.frequencies.data_ptr(),
        exact_pairs=key.pairs.data_ptr(),
        partial=partial.data_ptr(),
        partial_sum=partial_sum.data_ptr(),
        exact_stride=(_L * 4)(*(stride for keys, _ in exact for stride in keys.stride()[:2])),
        key_words=key.words,
        value_words=value.words,
        kv_heads=heads,
        query_heads=query_heads,
        subgroups=subgroups,
        group=group,
        first_page=first_page,
        pages=pages,
        packed_splits=packed_splits,
        splits=splits,
        exact_count=(_I * 2)(*counts),
        first_token=context.first_token,
        scaling=scaling,
        softcap=softcap or 0.0,
        rope_scaling=key.rope_scaling,
        key_rope=int(variant.rope),
        block_stride=table_blocks,
    )
    defines = variant.defines
    shared = launcher.constant("decode.cu", defines, "decode_shared_bytes")
    if shared > launcher.shared_limit:
        raise RuntimeMismatchError(
            f"{variant.group} queries of {size} channels per head need {shared} bytes of shared memory, "
            f"this GPU has {launcher.shared_limit}"
        )
    grid = (splits, heads * subgroups, batch)
    launcher.launch("decode.cu", defines, "decode_attention", grid, _DECODE_THREADS, shared, params)
    sinks = None if sink_logits is None else sink_logits.to(device, torch.float32).contiguous()
    reduce = _ReduceParams(
        partial=partial.data_ptr(),
        partial_sum=partial_sum.data_ptr(),
        sink_logits=_pointer(sinks),
        out=out.data_ptr(),
        packed_splits=packed_splits,
        splits=splits,
        separate=int(separate),
    )
    launcher.launch(
        "decode.cu", defines, "reduce_splits", (query_heads, batch, 1), _DECODE_THREADS, 4 * splits, reduce
    )
    if rotation is None:
        return out
    turned = out[0].view(batch, heads, group, size) @ rotation.mT
    return (turned.flatten(1, 2) + out[1]).to(query.dtype)


def unsupported(key: KernelTables, value: KernelTables) -> str:
    """Why there is no decode kernel for a layer, or an empty string."""
    if key.head_dim % 16 or key.head_dim > MAX_HEAD_DIM:
        return f"heads of {key.head_dim} channels have no kernel; multiples of 16 up to {MAX_HEAD_DIM} do"
    if key.token:
        return "keys with a scale per token have no kernel"
    if value.largest_level > torch.finfo(torch.float16).max:
        return "value thresholds beyond float16 have no kernel"
    return ""


def append_blocks(
    launcher: Launcher,
    key: KernelTables,
    value: KernelTables,
    storage: LayerStorage,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Quantize and pack whole blocks, keys and values in one launch.

    The outliers go to a work space first. One small read by the host then tells how many each page holds, once
    per 32 tokens; their place is allocated exactly and a second kernel moves them there.

    Args:
        launcher: runs the kernels.
        key, value: the layer's tables.
        storage: gets the blocks.
        keys, values: storage dtype ``[B, H, 32 * n, D]`` with contiguous ``D``; as the quantizers take them.
    """
    blocks = keys.shape[2] // BLOCK_TOKENS
    done = 0
    while done < blocks:
        place = storage.key.blocks % PAGE_BLOCKS
        count = min(APPEND_PAGES * PAGE_BLOCKS - place, blocks - done)
        here = slice(done * BLOCK_TOKENS, (done + count) * BLOCK_TOKENS)
        _append_chunk(
            launcher, (key, value), (storage.key, storage.value), (keys[:, :, here], values[:, :, here])
        )
        done += count


def _append_chunk(
    launcher: Launcher,
    tables: tuple[KernelTables, KernelTables],
    packed: tuple[PackedTensor, PackedTensor],
    tokens: tuple[Tensor, Tensor],
) -> None:
    device, heads, size = tables[0].device, tables[0].heads, tables[0].head_dim
    batch, blocks = tokens[0].shape[0], tokens[0].shape[2] // BLOCK_TOKENS
    if batch > MAX_GRID:
        raise RuntimeMismatchError(f"{batch} sequences are more than one launch takes; use smaller batches")
    place = packed[0].blocks % PAGE_BLOCKS
    pages = -(-(place + blocks) // PAGE_BLOCKS)
    sides, counts, held = [], [], []
    for table, tensor, x in zip(tables, packed, tokens, strict=True):
        if x.device != device or x.shape != (batch, heads, blocks * BLOCK_TOKENS, size):
            raise RuntimeMismatchError(
                f"new {table.kind}s are {tuple(x.shape)} on {x.device}, expected "
                f"{(batch, heads, blocks * BLOCK_TOKENS, size)} on {device}"
            )
        parameters, phase = table.quantizer.params, table.phase
        source = x if parameters.rotation is None else x.float() @ parameters.rotation
        if source.stride(3) != 1 or source.dtype not in _TYPES:
            raise RuntimeMismatchError(
                f"new {table.kind}s are {x.dtype} with strides {x.stride()}; make them contiguous"
            )
        new = pages if place == 0 else pages - 1
        tensor.pages.extend(tensor._new_page() for _ in range(new))
        page_table = _page_rows(tensor.pages[len(tensor.pages) - pages :]).to(device)
        side = _AppendSide(
            x=source.data_ptr(),
            pages=page_table.data_ptr(),
            scale=_pointer(table.scale),
            reciprocal=_pointer(table.reciprocal),
            zero_point=_pointer(table.zero_point),
            levels=table.levels.data_ptr(),
            boundaries=_pointer(table.boundaries),
            bits=table.bits.data_ptr(),
            word_offset=table.word_offset.data_ptr(),
            feedback=_pointer(table.feedback),
            sweep_share=_pointer(table.sweep_shares),
            importance=_pointer(table.importance),
            importance_edge=_pointer(table.importance_edges),
            sweeps=table.quantizer.spec.sweeps,
            stride=(_L * 3)(source.stride(0), source.stride(1), source.stride(2)),
            type=_TYPES[source.dtype],
            words=table.words,
            level_count=table.levels.shape[1],
            level_stride=table.level_stride,
            token=int(table.token),
            channel_normalized=int(table.channel_normalized),
            per_side=table.quantizer.spec.outliers.per_side(heads * size),
            cap=table.cap,
            capacity=BLOCK_TOKENS * table.cap,
            storage_bfloat=int(table.storage_bfloat),
            trellis=int(table.trellis),
            boundary_count=table.boundaries.shape[1],
        )
        if phase is not None:
            side.cosine, side.sine, side.phase_pair = (part.data_ptr() for part in phase)
        held += [source, page_table]
        if table.cap:
            capacity = BLOCK_TOKENS * table.cap
            index = torch.empty(blocks, batch, capacity, dtype=torch.int16, device=device)
            residual = torch.empty(blocks, batch, capacity, dtype=table.quantizer.storage, device=device)
            count = torch.empty(blocks, batch, heads, dtype=torch.int32, device=device)
            side.outlier_index, side.outlier_residual = index.data_ptr(), residual.data_ptr()
            side.outlier_count = count.data_ptr()
            counts.append((table, tensor, index, residual, count))
        sides.append(side)
    chunks = -(-size // 32)
    shared = 32 * ctypes.sizeof(_F) * 5 + 4 * heads * (BLOCK_TOKENS + 1) + 4 * BLOCK_TOKENS * heads * chunks
    fed_warps = 0
    if any(table.feedback is not None for table in tables):
        of_head = 4 * (size * (BLOCK_TOKENS + 1) + BLOCK_TOKENS * 4) + 32 * (BLOCK_TOKENS + 4)
        fed_warps = min(heads, _APPEND_THREADS // 32, max(launcher.shared_limit // of_head, 1))
        shared = max(shared, fed_warps * of_head)
    params = _AppendParams(
        side=(_AppendSide * 2)(*sides),
        batch=batch,
        heads=heads,
        head_dim=size,
        first_block=place,
        fed_warps=fed_warps,
    )
    launcher.launch("append.cu", (), "append_blocks", (blocks, batch, 2), _APPEND_THREADS, shared, params)
    if counts:
        per_block = torch.stack([count.flatten(1).sum(1) for *_, count in counts]).tolist()  # the host read
        for (table, tensor, index, residual, count), totals in zip(counts, per_block, strict=True):
            _place_outliers(launcher, table, tensor, index, residual, count, totals, place, pages)
    for tensor in packed:
        tensor.blocks += blocks


def _place_outliers(
    launcher: Launcher,
    table: KernelTables,
    tensor: PackedTensor,
    index: Tensor,
    residual: Tensor,
    count: Tensor,
    totals: list[int],
    place: int,
    pages: int,
) -> None:
    """Give the pages room for the outliers of new blocks and move them there."""
    rows = []
    for number, page in enumerate(tensor.pages[len(tensor.pages) - pages :]):
        first = max(number * PAGE_BLOCKS - place, 0)
        entries = sum(totals[first : (number + 1) * PAGE_BLOCKS - place])
        assert page.outlier_index is not None
        assert page.outlier_residual is not None
        assert page.outlier_start is not None
        # At most the seven blocks before are copied: bounded by the page, not by the cache.
        page.outlier_index = torch.cat((page.outlier_index, page.outlier_index.new_empty(entries)))
        page.outlier_residual = torch.cat((page.outlier_residual, page.outlier_residual.new_empty(entries)))
        rows.append(
            [
                _pointer(page.outlier_index) or 0,
                _pointer(page.outlier_residual) or 0,
                page.outlier_start.data_ptr(),
            ]
        )
    pointers = torch.tensor(rows, dtype=torch.int64).mT.contiguous().to(tensor.device)
    params = _PlaceParams(
        index=index.data_ptr(),
        residual=residual.data_ptr(),
        count=count.data_ptr(),
        page_index=pointers[0].data_ptr(),
        page_residual=pointers[1].data_ptr(),
        page_start=pointers[2].data_ptr(),
        capacity=BLOCK_TOKENS * table.cap,
        heads=table.heads,
        blocks=count.shape[0],
        first_block=place,
        batch=count.shape[1],
        start_bytes=tensor.layout.start_dtype(count.shape[1]).itemsize,
    )
    shared = 4 * (PAGE_BLOCKS * count.shape[1] * (table.heads + 1) + 1)
    launcher.launch("append.cu", (), "place_outliers", (pages, 1, 1), _APPEND_THREADS, shared, params)


def dequantize(
    launcher: Launcher,
    table: KernelTables,
    pages: Tensor,
    batch: int,
    first_block: int,
    blocks: int,
    dtype: torch.dtype,
    positions: Tensor | None = None,
) -> Tensor:
    """Keys or values of whole blocks as an ordinary tensor; a rotation of values is not undone.

    Args:
        launcher: runs the kernel.
        table: of the tensor.
        pages: int64 ``[n, 6]``, see :class:`PageTable`.
        batch: sequences ``B``.
        first_block: the first block wanted, counted from the first of ``pages``.
        blocks: how many.
        dtype: of the result, float16, bfloat16 or float32.
        positions: int32 ``[B, 32 * blocks]``: turn keys there, and undo phases; ``None``: leave both.

    Returns:
        ``[B, H, 32 * blocks, D]``.
    """
    heads, size = table.heads, table.head_dim
    if size % 2:
        raise RuntimeMismatchError(f"heads of {size} channels have no kernel; even numbers do")
    if first_block + blocks > pages.shape[0] * PAGE_BLOCKS:
        raise RuntimeMismatchError(f"block {first_block + blocks - 1} is beyond the {pages.shape[0]} pages")
    if heads > MAX_GRID or batch > MAX_GRID:
        raise RuntimeMismatchError(f"{batch} sequences of {heads} heads are more than one launch takes")
    _check("pages", pages, (pages.shape[0], 6), torch.int64, table.device)
    if positions is not None:
        _check("positions", positions, (batch, BLOCK_TOKENS * blocks), torch.int32, table.device)
    out = torch.empty(batch, heads, BLOCK_TOKENS * blocks, size, dtype=dtype, device=table.device)
    if blocks == 0:
        return out
    params = _DequantizeParams(
        pages=pages.data_ptr(),
        levels=table.levels.data_ptr(),
        scale=_pointer(table.scale),
        zero_point=_pointer(table.zero_point),
        bits=table.bits.data_ptr(),
        word_offset=table.word_offset.data_ptr(),
        angles=None if positions is None else table.angles.data_ptr(),
        pairs=table.pairs.data_ptr(),
        positions=_pointer(positions),
        out=out.data_ptr(),
        rope_scaling=table.rope_scaling,
        level_count=table.levels.shape[1],
        level_stride=table.level_stride,
        heads=heads,
        head_dim=size,
        words=table.words,
        first_block=first_block,
        token=int(table.token),
        channel_normalized=int(table.channel_normalized),
        storage_bfloat=int(table.storage_bfloat),
        trellis=int(table.trellis),
        type=_TYPES[dtype],
    )
    shared = 4 * BLOCK_TOKENS * size
    grid = (blocks, heads, batch)
    launcher.launch("dequantize.cu", (), "dequantize_blocks", grid, _DEQUANTIZE_THREADS, shared, params)
    return out


# ---- the operations of a cache -------------------------------------------------------------------------------


class SlotView:
    """Turns a cache's slots and a step's mask into what the decode kernel reads; one for all layers.

    Without a mask the table of blocks grows with the cache and is never made anew; with one it follows the mask.
    """

    def __init__(self) -> None:
        self._table: tuple[Any, ...] = ()
        self._blocks: Tensor | None = None
        self._regular = True
        self._step: tuple[Any, ...] = ()
        self._context: DecodeContext | None = None

    def context(self, visibility: Visibility, table: SlotTable) -> DecodeContext | None:
        """What to read for one new token per sequence, or ``None`` where the kernel cannot express it: a mask
        per head, one that adds more than "visible" and "hidden", or positions that jump within a block."""
        step = (visibility.mask, visibility.window, table, table.version, table.length)
        if len(self._step) == len(step) and all(
            a is b or (isinstance(a, int) and a == b) for a, b in zip(step, self._step, strict=True)
        ):
            return self._context
        self._step, self._context = step, self._make(visibility, table)
        return self._context

    def _make(self, visibility: Visibility, table: SlotTable) -> DecodeContext | None:
        mask = visibility.mask
        if mask is not None and mask.ndim == 4:
            if mask.shape[1] != 1:
                return None
            if mask.dtype != torch.bool and not bool(
                ((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()
            ):
                return None
        first_token = 0
        if mask is None and not table.ragged:
            if visibility.window is not None:
                first_token = max(visibility.length - visibility.window, 0)
            blocks, regular = self._grown(table)
        else:
            blocks, regular = self._block_range(table, 0, table.blocks, visibility)
        if not regular:
            return None
        return DecodeContext(_whole_pages(blocks), self._exact(visibility, table), first_token)

    def _grown(self, table: SlotTable) -> tuple[Tensor, bool]:
        """All blocks without a mask; only those that came since the last call are looked at."""
        state = (table, table.version)
        known = 0
        if (
            self._blocks is None
            or not self._table
            or self._table[0] is not table
            or self._table[1] != table.version
        ):
            self._blocks, self._regular = None, True
        else:
            known = self._table[2]
        if self._blocks is None or known < table.blocks:
            new, regular = self._block_range(table, known, table.blocks, None)
            self._blocks = new if self._blocks is None else torch.cat((self._blocks, new), dim=1)
            self._regular &= regular
            self._table = (*state, table.blocks)
        return self._blocks, self._regular

    def _block_range(
        self, table: SlotTable, start: int, stop: int, visibility: Visibility | None
    ) -> tuple[Tensor, bool]:
        """Blocks ``start`` to ``stop - 1``, int32 ``[B, n, 2]``, and whether positions run on in each."""
        batch, device = table.batch, table.device
        if start == stop:
            return torch.empty(batch, 0, 2, dtype=torch.int32, device=device), True
        low, high = table.first[start], table.first[stop - 1] + table.fill[stop - 1]
        slots = table.block_slots(start, stop)
        within = (slots - low).clamp(min=0)
        keep = (slots >= 0).expand(batch, -1)
        if visibility is not None:
            keep = keep & _visible(visibility, slots)
        sinks = table.sink_slots.to(torch.int64) - low
        inside = (sinks >= 0) & (sinks < high - low)
        is_sink = torch.zeros(batch, high - low + 1, dtype=torch.bool, device=device)
        is_sink.scatter_(1, torch.where(inside, sinks, high - low), True)
        keep = keep & ~is_sink[:, within]
        token = torch.arange(BLOCK_TOKENS, device=device)
        origin = (table.positions(low, high)[:, within].to(torch.int64)).unflatten(
            1, (-1, BLOCK_TOKENS)
        ) - token
        keep = keep.unflatten(1, (-1, BLOCK_TOKENS))
        highest = origin.masked_fill(~keep, _MASKED).amax(-1)
        lowest = origin.masked_fill(~keep, -_MASKED).amin(-1)
        seen = keep.any(-1)
        bits = (keep.to(torch.int64) << token).sum(-1)
        bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
        blocks = torch.stack((torch.where(seen, highest, 0), bits), dim=-1).to(torch.int32)
        return blocks, bool((~seen | (highest == lowest)).all())

    def _exact(self, visibility: Visibility, table: SlotTable) -> Tensor:
        """Positions of sinks and tail, int32 ``[B, s + t]``."""
        start, device = table.packed_slots, table.device
        tail = torch.arange(start, table.length, device=device)
        slots = torch.cat((table.sink_slots.to(torch.int64), tail.expand(table.batch, -1)), dim=1)
        sinks = table.sink_slots.shape[1]
        slots[:, :sinks].masked_fill_(slots[:, :sinks] >= start, -1)  # those are in the tail
        positions = table.positions(start, table.length)
        first, stop = table.sink_range
        if sinks:
            if first < stop:
                of_sinks = table.positions(first, stop).gather(
                    1, (slots[:, :sinks] - first).clamp(0, stop - first - 1)
                )
            else:
                of_sinks = torch.zeros(table.batch, sinks, dtype=torch.int32, device=device)
            positions = torch.cat((of_sinks, positions), dim=1)
        return positions.masked_fill(~_visible(visibility, slots), _MASKED).to(torch.int32).contiguous()


def _visible(visibility: Visibility, slots: Tensor) -> Tensor:
    """Which ``slots``, ``[S]`` or ``[B, S]``, the one new token of each sequence sees: bool ``[B or 1, S]``."""
    added = visibility.additive(slots)[:, 0, 0]
    mask = visibility.mask
    hidden = (
        -torch.inf
        if mask is None or mask.dtype == torch.bool or mask.ndim == 2
        else torch.finfo(mask.dtype).min / 2
    )
    return added > hidden


def _whole_pages(blocks: Tensor) -> Tensor:
    """``[B, n, 2]`` with unattended blocks up to a whole number of pages."""
    missing = -blocks.shape[1] % PAGE_BLOCKS
    return nn.functional.pad(blocks, (0, 0, 0, missing)).contiguous() if missing else blocks.contiguous()


class CudaOps(ReferenceOps):
    """The kernels where they serve, torch on the same device where not; the cache is the same for both.

    Args:
        key, value: quantizers of the layer, on the device of the model.
        launcher: runs the kernels.
        view: shared by the layers of a cache.
    """

    name = "cuda"

    def __init__(self, key: Quantizer, value: Quantizer, launcher: Launcher, view: SlotView) -> None:
        super().__init__(key, value)
        self.launcher = launcher
        self.view = view
        self.key_tables = KernelTables(key, "key")
        self.value_tables = KernelTables(value, "value")
        #: Why decode steps take the reference, or empty.
        self.reason = unsupported(self.key_tables, self.value_tables)
        self._pages: tuple[PageTable, PageTable] | None = None

    def tables(self) -> list[Tensor]:
        """Tensors held besides the artifact's parameters, for the accounting of memory."""
        pages = [table.tensor for table in self._pages or ()]
        rope = [] if self.rope is None else self.rope.tensors()
        return [*self.key_tables.tensors(), *self.value_tables.tensors(), *pages, *rope]

    def append(self, storage: LayerStorage, keys: Tensor, values: Tensor, table: SlotTable) -> None:
        """Store the newest tokens; whole blocks are packed by the append kernel."""

        def pack(keys: Tensor, values: Tensor) -> None:
            append_blocks(self.launcher, self.key_tables, self.value_tables, storage, keys, values)

        storage.append(keys, values, table, pack)

    def attend(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        """Attend to everything stored: ``[B, T, Hq, D]`` in the dtype of the query."""
        one = request.query.shape[2] == 1 and request.query.dtype in (torch.float16, torch.bfloat16)
        if one and not self.reason:
            context = self.view.context(request.visibility, table)
            if context is not None:
                try:
                    return self._decode(request, storage, context)
                except (
                    RuntimeMismatchError
                ) as error:  # nvcc fails, the GPU is too small: say so once and go on
                    self.reason = str(error)
                    warnings.warn(
                        f"{error}; the reference decodes from here on", RuntimeWarning, stacklevel=2
                    )
        plain = request.softcap is None and request.sinks is None and request.query.dtype in _TYPES
        if plain and request.query.shape[2] > 1:
            return self._attend_dense(request, storage, table)
        return super().attend(request, storage, table)

    def _page_tables(self, storage: LayerStorage) -> tuple[Tensor, Tensor]:
        if self._pages is None or self._pages[0].packed is not storage.key:
            self._pages = PageTable(storage.key), PageTable(storage.value)
        return self._pages[0].refresh(), self._pages[1].refresh()

    def _decode(self, request: AttentionRequest, storage: LayerStorage, context: DecodeContext) -> Tensor:
        key_pages, value_pages = self._page_tables(storage)
        out = decode_attention(
            self.launcher,
            request.query[:, :, 0].contiguous(),
            self.key_tables,
            self.value_tables,
            key_pages,
            value_pages,
            ((storage.sink_key, storage.sink_value), (storage.tail_key, storage.tail_value)),
            context,
            first_page=storage.key.dropped_pages,
            scaling=request.scaling,
            softcap=request.softcap,
            sink_logits=request.sinks,
        )
        return out[:, None]

    def _attend_dense(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        """Many queries at once: blocks become ordinary tensors for torch's own attention, one layer at a time."""
        query, visibility = request.query, request.visibility
        first_page = storage.key.dropped_pages + storage.key.pages_before(visibility.first_slot, table)
        first, stop = first_page * PAGE_BLOCKS, table.blocks
        held = (first_page - storage.key.dropped_pages) * PAGE_BLOCKS
        blocks = max(stop - first, 0)
        slots = (
            table.block_slots(first, stop)
            if blocks
            else torch.empty(0, dtype=torch.int64, device=self.device)
        )
        positions = None
        if blocks and self.rope is not None:
            low = table.first[first]
            high = table.first[stop - 1] + table.fill[stop - 1]
            positions = table.positions(low, high)[:, (slots - low).clamp(min=0)].to(torch.int32).contiguous()
        key_pages, value_pages = self._page_tables(storage)
        batch, dtype = query.shape[0], query.dtype
        keys = dequantize(self.launcher, self.key_tables, key_pages, batch, held, blocks, dtype, positions)
        values = dequantize(self.launcher, self.value_tables, value_pages, batch, held, blocks, dtype)
        if self.value.params.rotation is not None:
            values = values @ self.value.params.rotation.mT.to(dtype)
        exact_keys, exact_values, exact_slots = self._exact_tokens(storage, table)
        keys = torch.cat((keys, exact_keys.to(dtype)), dim=2)
        values = torch.cat((values, exact_values.to(dtype)), dim=2)
        if visibility.tokens == visibility.length and visibility.mask is None and visibility.window is None:
            return self._attend_prompt(request, keys, values, storage, exact_slots)
        packed = slots.expand(batch, -1)
        sinks = exact_slots[:, : storage.sink_key.shape[2]]
        if sinks.shape[1] and blocks:  # attended exactly, not as packed
            packed = packed.masked_fill((packed[..., None] == sinks[:, None]).any(-1), -1)
        columns = torch.cat((packed, exact_slots), dim=1)
        out = []
        for start in range(0, query.shape[2], _QUERY_ROWS):  # bounds the mask
            rows = slice(start, start + _QUERY_ROWS)
            mask = _rows_mask(visibility, columns, rows)
            mask = mask if mask.dtype == torch.bool else mask.to(dtype)
            part = nn.functional.scaled_dot_product_attention(
                query[:, :, rows], keys, values, mask, scale=request.scaling, enable_gqa=True
            )
            out.append(part)
        return torch.cat(out, dim=2).nan_to_num().transpose(1, 2)

    @staticmethod
    def _attend_prompt(
        request: AttentionRequest, keys: Tensor, values: Tensor, storage: LayerStorage, exact_slots: Tensor
    ) -> Tensor:
        """A whole prompt without padding: sinks take their packed places, so that columns are slots."""
        sinks = storage.sink_key.shape[2]
        length = request.visibility.length
        packed = keys.shape[2] - exact_slots.shape[1]
        row, number = (exact_slots[:, :sinks] >= 0).nonzero(as_tuple=True)
        place = exact_slots[row, number]
        sides = []
        for x in (keys, values):
            x[row, :, place] = x[row, :, packed + number]
            sides.append(torch.cat((x[:, :, :packed], x[:, :, packed + sinks :]), dim=2) if sinks else x)
        assert sides[0].shape[2] == length
        out = nn.functional.scaled_dot_product_attention(
            request.query, sides[0], sides[1], is_causal=True, scale=request.scaling, enable_gqa=True
        )
        return out.transpose(1, 2)

    def _exact_tokens(self, storage: LayerStorage, table: SlotTable) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks and tail: keys as attention uses them and values ``[B, H, S, D]``, slots ``[B, S]``, -1 for none."""
        start = table.packed_slots
        keys = torch.cat((storage.sink_key, storage.tail_key), dim=2)
        values = torch.cat((storage.sink_value, storage.tail_value), dim=2)
        sinks = table.sink_slots.to(torch.int64)
        tail = torch.arange(start, table.length, device=self.device).expand(table.batch, -1)
        slots = torch.cat((sinks.masked_fill(sinks >= start, -1), tail), dim=1)
        if self.rope is not None:
            low = min(start, table.sink_range[0]) if table.sink_range[1] else start
            positions = table.positions(low, table.length).gather(1, (slots - low).clamp(min=0))
            turned = self.rope.rotate_(keys.mT.float(), *self.rope.cos_sin(positions))
            keys = self.rope.scale_(turned).mT
        return keys, values, slots


def _rows_mask(visibility: Visibility, slots: Tensor, rows: slice) -> Tensor:
    """The part of a step's mask that belongs to some of its queries.

    Args:
        visibility: of the step.
        slots: int64 ``[B, S]``, -1 for "no such slot".
        rows: the queries.

    Returns:
        ``[B, 1 or Hq, rows, S]``, bool or additive.
    """
    mask = visibility.mask
    if mask is not None and mask.ndim == 4:
        part = Visibility(mask[:, :, rows], visibility.length, visibility.tokens, visibility.window)
        return part.additive(slots)
    start = visibility.length - visibility.tokens
    query = torch.arange(start, visibility.length, device=slots.device)[rows, None]
    seen = slots[:, None, None]
    visible = (seen >= 0) & (seen <= query)
    if visibility.window is not None:
        visible &= seen > query - visibility.window
    if mask is not None:
        columns = slots - (visibility.length - mask.shape[-1])
        real = (mask != 0).gather(-1, columns.clamp(min=0)) & (columns >= 0)
        visible &= real[:, None, None]
    return visible


def make_ops(quantizers: Sequence[dict[Kind, Quantizer]], device: torch.device) -> list[ReferenceOps]:
    """The operations of every layer of a cache on a GPU.

    Raises:
        RuntimeMismatchError: there is no GPU, no driver, no pycuda, no compiler, or the GPU is too old.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeMismatchError("there is no CUDA device")
    launcher = PyCudaLauncher(device)
    for source in ("append.cu", "dequantize.cu"):  # shows early whether the compiler works
        launcher.prepare(source)
    return ops_with(quantizers, launcher)


def ops_with(quantizers: Sequence[dict[Kind, Quantizer]], launcher: Launcher) -> list[ReferenceOps]:
    """The operations of every layer, run by ``launcher``; says once which layers decode without kernels."""
    view = SlotView()
    ops = [CudaOps(pair["key"], pair["value"], launcher, view) for pair in quantizers]
    reasons = {layer.reason: index for index, layer in reversed(list(enumerate(ops))) if layer.reason}
    for reason, index in reasons.items():
        warnings.warn(f"layer {index}: {reason}; the reference decodes it", RuntimeWarning, stacklevel=4)
    return cast("list[ReferenceOps]", ops)
