"""The attention backend for vLLM.

Importing this module needs vLLM; :func:`kvq_calib.integrations.vllm.plugin.register` names it to vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.packing import PAGE_TOKENS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.vllm.checks import artifact_name, artifact_of, check_attention, check_layer
from kvq_calib.integrations.vllm.decode import NativeDecoding
from kvq_calib.integrations.vllm.gpu_layer import GpuLayer
from kvq_calib.integrations.vllm.gpu_step import GpuStep
from kvq_calib.integrations.vllm.layer import PagedLayer
from kvq_calib.integrations.vllm.pages import page_bytes_of_ranks
from kvq_calib.integrations.vllm.spec import PackedSpec
from kvq_calib.integrations.vllm.step import Step
from kvq_calib.runtime.cuda.ops import CudaOps
from kvq_calib.runtime.ops import LayerQuantizers, Ops, choose_ops

__all__ = ["PackedAttention", "PackedBackend", "PackedMetadata"]


class _Shared:
    """State that the layers of a model share in one process.

    Args:
        artifact: artifact of this rank.
        page_bytes: bytes of a page of each layer, on every rank.
    """

    def __init__(self, artifact: KVArtifact, page_bytes: list[int], device: torch.device) -> None:
        self.artifact, self.page_bytes = artifact, page_bytes
        self.quantizers: list[LayerQuantizers] = list(artifact.quantizers(device))
        found, _ = choose_ops(self.quantizers, device, None if device.type == "cpu" else device.type)
        self.ops: list[Ops] = list(found)
        self.decoding = NativeDecoding()

    def layer(self, index: int, scaling: float, softcap: float | None) -> PagedLayer | GpuLayer:
        """The object that stores and attends in a layer."""
        quantizers, ops, sinks = self.quantizers[index], self.ops[index], self.artifact.spec.sink_tokens
        if isinstance(ops, CudaOps):
            return GpuLayer(quantizers, ops, sinks, scaling, softcap, self.page_bytes[index])
        return PagedLayer(quantizers, ops, sinks, scaling, softcap, self.decoding, self.page_bytes[index])


@lru_cache(maxsize=1)
def _shared(name: str, rank: int, ranks: int) -> _Shared:
    page_bytes = page_bytes_of_ranks(artifact_of(name), ranks)
    return _Shared(artifact_of(name, rank, ranks), page_bytes, _device())


def _device() -> torch.device:
    """The device on which vLLM runs the model in this process."""
    if current_platform.is_cpu():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _of_this_rank(config: Any) -> _Shared:
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return _shared(artifact_name(config), rank, ranks)


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Set torch's default dtype to float32. While vLLM loads a model, it is the model's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class PackedMetadata(AttentionMetadata):  # type: ignore[misc]
    """What a layer gets in a step.

    Args:
        step: the step, the same for all layers.
    """

    def __init__(self, step: Step | GpuStep) -> None:
        self.step = step


class PackedBuilder(AttentionMetadataBuilder[PackedMetadata]):  # type: ignore[misc]
    """Makes the metadata of a step.

    It supports no CUDA graphs of attention, which depends on lengths that the host knows. Then vLLM captures only the
    parts between attention layers.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._sink_tokens = _of_this_rank(vllm_config).artifact.spec.sink_tokens

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PackedMetadata:
        """The metadata. Layers with different page sizes have separate builders, but all get the same object."""
        common = common_attn_metadata
        made: PackedMetadata | None = getattr(common, "_kvq_calib", None)
        if made is None:
            starts, tables = common.query_start_loc_cpu.tolist(), common.block_table_tensor
            if tables.device.type == "cpu":
                step: Step | GpuStep = Step(starts, common.seq_lens.tolist(), tables, self._sink_tokens)
            else:  # the "upper bound" is exact except with speculative decoding, which is refused
                lengths = common.seq_lens_cpu_upper_bound.tolist()
                step = GpuStep(starts, lengths, tables, self._sink_tokens)
            made = common._kvq_calib = PackedMetadata(step)
        return made


class PackedBackend(AttentionBackend):  # type: ignore[misc]
    """The interface of a backend. Each layer gets a subclass with its number (:meth:`PackedAttention`)."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    #: Bytes of a page of the layer; ``None`` until the layer is known.
    page_bytes: ClassVar[int | None] = None

    @staticmethod
    def get_name() -> str:
        """The name that vLLM uses for external backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """The class that computes attention."""
        return PackedAttention

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The class that makes metadata."""
        return PackedBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """The only page size."""
        return [PAGE_TOKENS]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """The pages of a layer are contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Only decoders are supported."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """KV connectors are not supported."""
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Set the page size of the layer."""
        if cls.page_bytes is None or isinstance(spec, PackedSpec):
            return spec
        return PackedSpec.of(spec, cls.page_bytes)


class PackedAttention(AttentionImpl[PackedMetadata]):  # type: ignore[misc]
    """Attention of one layer, with the arguments that vLLM gives every implementation."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **extra: Any,
    ) -> None:
        check_attention(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            sinks=sinks,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
        )
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads = num_kv_heads or num_heads
        self.scale, self.softcap = float(scale), logits_soft_cap or None
        self.kv_cache_dtype = kv_cache_dtype
        self._config = get_current_vllm_config()
        self._layer: PagedLayer | GpuLayer | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find the layer's number, and give the layer a backend with that number.

        This is needed because vLLM asks a backend for the page size without naming the layer.
        """
        for name, module in self._config.compilation_config.static_forward_context.items():
            if getattr(module, "impl", None) is self:
                self._be_layer(extract_layer_index(name), module)
                return
        raise RuntimeMismatchError("the model has an attention layer that vLLM does not list")

    def _be_layer(self, index: int, module: Any) -> None:
        with _float32_by_default():
            self._make_layer(index, module)

    def _make_layer(self, index: int, module: Any) -> None:
        shared = _of_this_rank(self._config)
        check_layer(shared.artifact.geometry, index, self.num_heads, self.num_kv_heads, self.head_size)
        self._layer = shared.layer(index, self.scale, self.softcap)
        known = {"page_bytes": self._layer.pages.page_bytes}
        module.attn_backend = type(f"PackedBackend{index}", (PackedBackend,), known)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PackedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store and attend. The result is zero while vLLM only measures memory."""
        if attn_metadata is None:
            return output.zero_()
        step: Any = (
            attn_metadata.step
        )  # step and layer are of the same kind, because both depend on the device
        assert self._layer is not None
        out = output[: step.tokens].view(step.tokens, self.num_heads, -1)
        pool = kv_cache.view(len(kv_cache), -1)
        self._layer.forward(step, pool, query, key, value, out)
        return output
