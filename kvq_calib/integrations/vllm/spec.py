"""What vLLM's scheduler needs: the bytes of a page, and that sequences need a page ahead.

Importing this module needs vLLM, and registers the spec with its manager.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvq_calib.codec.packing import PAGE_TOKENS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.vllm.pages import AHEAD, pages_of

__all__ = ["PackedManager", "PackedSpec"]


@dataclass(frozen=True, kw_only=True)
class PackedSpec(FullAttentionSpec):  # type: ignore[misc]
    """The pages of one layer."""

    @classmethod
    def of(cls, spec: Any, page_bytes: int) -> PackedSpec:
        """The spec that replaces vLLM's.

        Args:
            spec: vLLM's spec from the model's configuration.
            page_bytes: bytes of a page of this layer.

        Raises:
            RuntimeMismatchError: the layer does not have full attention, or pages have another size.
        """
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            raise RuntimeMismatchError(
                f"a layer has {type(spec).__name__}, and only full attention is served"
            )
        if spec.block_size != PAGE_TOKENS:
            raise RuntimeMismatchError(
                f"pages hold {spec.block_size} tokens, those of the packed cache {PAGE_TOKENS}"
            )
        known = {each.name: getattr(spec, each.name) for each in fields(spec) if each.init}
        known |= {"dtype": torch.uint8, "num_head_slots": 1, "tokens_per_state": PAGE_TOKENS}
        known |= {"state_content_bytes": page_bytes}
        return cls(**known)

    def tokens_with_room(self, tokens: int) -> int:
        """Number of tokens that fill as many pages as a sequence of ``tokens`` needs."""
        return (pages_of(tokens) + AHEAD) * PAGE_TOKENS

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest sequence."""
        pages = pages_of(vllm_config.model_config.max_model_len) + AHEAD
        return int(pages * self.page_size_bytes)

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Length of a row of the block table."""
        return int(super().max_num_blocks_per_req(vllm_config, self.tokens_with_room(max_len)))

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for equal layers.

        If layers differ, vLLM expects an ``AssertionError``, and then gives layers different page sizes.
        """
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers with pages of different sizes")
        return specs[0]


class PackedManager(FullAttentionManager):  # type: ignore[misc]
    """Allocates a page ahead of the tokens. It is never full, so it is never shared."""

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """As vLLM's own, for more tokens."""
        tokens = self.kv_cache_spec.tokens_with_room(num_tokens)
        return int(super().get_num_blocks_to_allocate(request_id, tokens, *args, **kwargs))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        """As vLLM's own, for more tokens."""
        tokens = self.kv_cache_spec.tokens_with_room(num_tokens)
        return super().allocate_new_blocks(request_id, tokens, num_tokens_main_model)


# vLLM registers its specs only if there are none.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(PackedSpec, PackedManager, uniform_type_base_spec=FullAttentionSpec)
