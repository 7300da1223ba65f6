"""Checks when a server starts. Each error is one line that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.shard import shard
from kvq_calib.codec.packing import PAGE_TOKENS
from kvq_calib.errors import ConfigError, RuntimeMismatchError
from kvq_calib.integrations.vllm.pages import LayerPages, page_bytes_of_ranks
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.schema.geometry import KVGeometry

__all__ = [
    "ARTIFACT_KEY",
    "TESTED",
    "artifact_name",
    "artifact_of",
    "check_artifact",
    "check_attention",
    "check_configuration",
    "check_layer",
    "is_installed",
]

#: Key in ``--additional-config``.
ARTIFACT_KEY = "kvq_artifact"
#: Minor versions of vLLM that are tested.
TESTED = ("0.32",)


def is_installed() -> bool:
    """Whether vLLM would find the plug-in here. Without it, vLLM's CPU platform silently ignores ``CUSTOM``."""
    return any(point.name == "kvq_calib" for point in metadata.entry_points(group="vllm.general_plugins"))


@lru_cache(maxsize=4)
def artifact_of(name: str, rank: int = 0, ranks: int = 1) -> KVArtifact:
    """The artifact, or the shard of one rank; read once per process.

    Args:
        name: file, folder or hub id.
        rank, ranks: rank and number of ranks of tensor parallelism.
    """
    whole = KVArtifact.from_pretrained(name)
    return whole if ranks == 1 else shard(whole, rank, ranks)


def artifact_name(config: Any) -> str:
    """The artifact that ``--additional-config`` names.

    Raises:
        ConfigError: it names none, or is malformed.
    """
    given = config.additional_config
    name = given.get(ARTIFACT_KEY) if isinstance(given, dict) else None
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "the packed cache needs an artifact: "
            f"""--additional-config '{{"{ARTIFACT_KEY}": "model.kvq.safetensors"}}', a file or a hub id"""
        )
    return name


def check_configuration(config: Any, version: str, platform: str) -> None:
    """Refuse a configuration that the packed cache cannot serve.

    Args:
        config: vLLM's ``VllmConfig``; only its attributes are read.
        version: version of vLLM.
        platform: vLLM's name of the device, such as ``"cpu"``.

    Raises:
        KVQError: the configuration is refused; the message says why and what to change.
    """
    problem = next(_problems(config, version, platform), None)
    if problem is not None:
        raise ConfigError(problem)
    artifact = artifact_of(artifact_name(config))
    artifact.check_model(model_fingerprint(SimpleNamespace(config=config.model_config.hf_config)))  # type: ignore[arg-type]
    check_artifact(artifact)
    page_bytes_of_ranks(artifact, config.parallel_config.tensor_parallel_size)


def _problems(config: Any, version: str, platform: str) -> Iterator[str]:
    if not version.startswith(tuple(f"{minor}." for minor in TESTED)):
        yield (
            f"the packed cache is tested with vLLM {' and '.join(TESTED)}, this is {version}; "
            "install one of those, or serve without --attention-backend CUSTOM"
        )
    if platform not in ("cpu", "cuda"):
        yield (
            f"the packed cache runs on vLLM's platforms 'cpu' and 'cuda', this is {platform!r}; "
            "serve without --attention-backend CUSTOM"
        )
    dtype = config.model_config.dtype
    if platform == "cuda" and dtype not in (torch.float16, torch.bfloat16):
        yield f"--dtype is {dtype}, and the CUDA kernels take 16-bit queries; use float16 or bfloat16"
    cache, parallel = config.cache_config, config.parallel_config
    if cache.cache_dtype != "auto":
        yield (
            f"--kv-cache-dtype is {cache.cache_dtype!r}, and the artifact says how the cache is stored; leave it out"
        )
    if cache.user_specified_block_size and cache.block_size != PAGE_TOKENS:
        yield f"--block-size is {cache.block_size}, pages of the packed cache hold {PAGE_TOKENS} tokens; leave it out"
    if config.speculative_config is not None:
        yield "speculative decoding takes tokens back, and packed blocks stay packed; leave out --speculative-config"
    if config.kv_transfer_config is not None:
        yield "KV connectors do not know packed pages; leave out --kv-transfer-config and --kv-offloading-size"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield (
            "context parallelism divides a sequence's tokens, and blocks of 32 are coded together; "
            "use --tensor-parallel-size alone"
        )


def check_artifact(artifact: KVArtifact) -> None:
    """Refuse artifacts that do not fit vLLM's pages.

    Raises:
        ConfigError: the artifact is refused; the message says why and what to change.
    """
    problem = next(_geometry_problems(artifact.geometry), None) or next(_recipe_problems(artifact), None)
    if problem is not None:
        raise ConfigError(problem)


def check_attention(**options: Any) -> None:
    """Refuse options of attention that the packed cache does not support.

    Args:
        options: vLLM's arguments for every implementation that are in ``_UNSERVED``.

    Raises:
        RuntimeMismatchError: an option is used.
    """
    for name, what in _UNSERVED.items():
        if options[name] is not None:
            raise RuntimeMismatchError(
                f"the model has {what}, which the packed cache does not serve in vLLM; "
                "serve it without --attention-backend CUSTOM"
            )


_UNSERVED = {
    "alibi_slopes": "alibi slopes",
    "sliding_window": "sliding windows",
    "sinks": "attention sinks in the softmax",
    "kv_sharing_target_layer_name": "layers that share their cache",
}


def check_layer(geometry: KVGeometry, index: int, query_heads: int, heads: int, size: int) -> None:
    """Refuse a layer of the model that does not match the artifact.

    Args:
        geometry: geometry of this rank.
        index: number of the layer.
        query_heads, heads, size: numbers of query heads, key-value heads, and channels of a head in the model's layer.

    Raises:
        RuntimeMismatchError: there is no such layer, or it has other heads.
    """
    layers = geometry.layers
    if index >= len(layers):
        raise RuntimeMismatchError(f"the artifact has {len(layers)} layers, and the model a layer {index}")
    found = layers[index].num_query_heads, layers[index].num_kv_heads, layers[index].head_dim
    wanted = query_heads, heads, size
    if found != wanted:
        raise RuntimeMismatchError(
            f"layer {index} of the artifact has {found} query heads, key-value heads and channels, "
            f"that of the model {wanted}"
        )


_ELSEWHERE = "use KVQCache with transformers"


def _geometry_problems(geometry: KVGeometry) -> Iterator[str]:
    if geometry.state_bytes or None in geometry.attends_to:
        yield f"layers keep a state beside keys and values, which is not served in vLLM yet; {_ELSEWHERE}"
    if any(geometry.is_shared(index) for index in range(len(geometry.layers))):
        yield f"layers share their keys and values, which is not served in vLLM yet; {_ELSEWHERE}"
    for number, layer in enumerate(geometry.layers):
        if layer.swapped:
            yield (
                f"layer {number} caches a latent (multi-head latent attention), which vLLM keeps in pages of another "
                f"kind; {_ELSEWHERE}"
            )
        if layer.value_head_dim not in (None, layer.head_dim):
            yield (
                f"layer {number} has heads of {layer.head_dim} channels in keys and {layer.value_head_dim} in values, "
                f"which is not served in vLLM yet; {_ELSEWHERE}"
            )
        if layer.sliding_window is not None:
            yield f"layers with sliding windows are not served in vLLM yet; {_ELSEWHERE}"
    if any(rope.length_dependent for rope in geometry.ropes):
        yield (
            "the model changes its rotary embedding with the length of the text, and keys are turned when they are read; "
            "serve it without the packed cache"
        )


def _recipe_problems(artifact: KVArtifact) -> Iterator[str]:
    spec, geometry = artifact.spec, artifact.geometry
    recipe = str(artifact.calibration.get("recipe", ""))
    if spec.recent_tokens:
        yield (
            f"the artifact keeps {spec.recent_tokens} newest tokens exact, and vLLM's pages hold fewer than 32; "
            "calibrate with --set cache.recent_tokens=0"
        )
    for number, pair in enumerate(artifact.quantizers()):
        key = pair["key"]
        if key.read_rope is None and geometry.layers[number].rope is not None:
            yield (
                f"layer {number} quantizes keys after RoPE (pre_rope: false), which is not served in vLLM; "
                "calibrate with --set cache.key.pre_rope=true"
            )
        for quantizer in pair.values():
            if (reason := quantizer.cannot_stream()) is not None:
                yield f"layer {number}: {reason}"
        if any(quantizer.outlier_cap for quantizer in pair.values()):
            dense = recipe.removesuffix("-1p") if recipe.endswith("-1p") else "kvq3"
            yield (
                f"the recipe {recipe or 'of the artifact'} keeps outliers, whose number differs from page to page; "
                f"calibrate with --config {dense}, or kvq3, which has none"
            )
        try:
            LayerPages(key, pair["value"], spec.sink_tokens)
        except RuntimeMismatchError as error:
            yield f"layer {number}: {error}"
