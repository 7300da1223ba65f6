"""Export of scales for FP8 key-value caches, in the files that vLLM, TensorRT-LLM and SGLang read.

Such a cache holds rotated keys and values in ``float8_e4m3fn``. Each layer has one static scale for keys and one for
values: ``scale = amax / 448``, where ``amax`` is the largest magnitude that must not saturate. Calibration records it
(:func:`recorded_amax`). For an artifact without that record, :func:`amax_of` derives it from the range of the
quantizers. The names of files and keys are those that the three projects document; ``docs/guides/integrations.md``
lists them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.registry import codec_of
from kvq_calib.errors import ConfigError
from kvq_calib.files import WriteError, write_atomically
from kvq_calib.schema.geometry import KINDS, Kind, RopeSpec

__all__ = [
    "DEFAULT_PREFIX",
    "Amax",
    "Format",
    "amax_of",
    "export",
    "losses",
    "read_amax",
    "recorded_amax",
    "write",
]

Format = Literal["fp8-scales", "modelopt", "sglang"]
DEFAULT_PREFIX = "model.layers.{layer}.self_attn"

#: Largest number of ``float8_e4m3fn``.
_FP8_MAX = 448.0
_SMALLEST_AMAX = 1e-9
_PLURAL: dict[Kind, str] = {"key": "keys", "value": "values"}
Amax = Mapping[Kind, Sequence[float]]


def _rotated(reach: Tensor, heads: int, rope: RopeSpec) -> Tensor:
    """Largest magnitude of each channel after RoPE at any position, from that before RoPE; both ``[C]``.

    RoPE rotates a pair, so either coordinate can become as large as the length of the pair.
    """
    by_head = reach.view(heads, -1).clone()
    if rope.pairs:
        first, second = torch.tensor(rope.pairs).T
        length = rope.attention_scaling * torch.hypot(by_head[:, first], by_head[:, second])
        by_head[:, first], by_head[:, second] = length, length
    return by_head.flatten()


def amax_of(artifact: KVArtifact) -> dict[Kind, list[float | None]]:
    """For each layer, the largest magnitude of rotated keys and of values that the artifact's quantizers can represent.

    For keys quantized before RoPE, a pair whose coordinates reach ``a`` and ``b`` reaches ``sqrt(a^2 + b^2)`` times the
    attention scaling, at any position and with any pair rotation. ``None`` where thresholds come from each token or
    from the text.
    """
    found: dict[Kind, list[float | None]] = {kind: [] for kind in KINDS}
    for index, quantizers in enumerate(artifact.quantizers()):
        rope = artifact.geometry.rope_of(index)
        for kind, quantizer in quantizers.items():
            held = quantizer.channel_range()
            if held is None:
                found[kind].append(None)
                continue
            centre, half = held
            reach = centre.abs() + half
            if kind == "key" and quantizer.spec.pre_rope and rope is not None:
                reach = _rotated(reach, quantizer.shape.heads, rope)
            found[kind].append(float(reach.max()))
    return found


def losses(artifact: KVArtifact, amax: Amax | None = None) -> list[str]:
    """The properties of an artifact that an FP8 cache with one scale per layer does not have, in words.

    Args:
        artifact: the artifact.
        amax: measured magnitudes by kind, which replace the estimate; by default those that the artifact records.
    """
    measured = {**recorded_amax(artifact), **(amax or {})}
    lost: dict[str, dict[Kind, None]] = {}
    for kind in KINDS:
        for layer in artifact.spec.resolved(len(artifact.layers)):
            features = layer.of(kind).features()
            if codec_of(layer.of(kind)).range_is_estimated and kind not in measured:
                features.append("a true range (it is estimated from the levels; --amax takes a measured one)")
            for feature in features:
                lost.setdefault(feature, {})[kind] = None
    words = [f"{what} of {' and '.join(_PLURAL[kind] for kind in kinds)}" for what, kinds in lost.items()]
    for count, what in ((artifact.spec.sink_tokens, "first"), (artifact.spec.recent_tokens, "newest")):
        if count:
            words.append(f"{count} exact {what} token{'s' if count > 1 else ''}")
    return words


def read_amax(path: str | os.PathLike[str], layers: int) -> Amax:
    """Read ``{"key": [...], "value": [...]}`` with one magnitude per layer. Either entry may be left out.

    Raises:
        ConfigError: the file cannot be read, or does not have this form.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return _checked(content, layers, str(path))


def recorded_amax(artifact: KVArtifact) -> Amax:
    """The largest magnitude of rotated keys and of values of each layer, measured at calibration over all tokens.

    Empty if the artifact has no such record.

    Raises:
        ConfigError: the record does not have the right form.
    """
    content = artifact.calibration.get("amax")
    return (
        {} if content is None else _checked(content, len(artifact.layers), "calibration.amax of the artifact")
    )


def _checked(content: Any, layers: int, where: str) -> Amax:
    if not isinstance(content, dict) or not content or content.keys() - set(KINDS):
        raise ConfigError(f'{where} must hold an object with "key" or "value" or both')
    for kind, numbers in content.items():
        good = isinstance(numbers, list) and all(
            isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf
            for number in numbers
        )
        if not good or len(numbers) != layers:
            raise ConfigError(
                f"{where}: {kind} must be {layers} numbers that are not negative, one for each layer"
            )
    return content


def _scales(artifact: KVArtifact, amax: Amax | None) -> dict[Kind, list[float]]:
    scales: dict[Kind, list[float]] = {}
    measured = {**recorded_amax(artifact), **(amax or {})}
    for kind, held in amax_of(artifact).items():
        numbers: list[float | None] = list(measured[kind]) if kind in measured else held
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers):
            raise ConfigError(
                f"the artifact does not hold the range of its {_PLURAL[kind]} (layer {numbers.index(None)}): their "
                "thresholds come from the text itself; measure it as docs/guides/integrations.md shows, and give it with "
                "--amax"
            )
        # A layer whose keys or values are all zero still needs a scale, to divide by.
        scales[kind] = [max(number, _SMALLEST_AMAX) / _FP8_MAX for number in known]
    return scales


def export(
    artifact: KVArtifact,
    format: Format,
    *,
    amax: Amax | None = None,
    prefix: str = DEFAULT_PREFIX,
    ranks: int = 1,
) -> dict[str, bytes]:
    """The files of a format, by name.

    Args:
        artifact: the artifact.
        format: ``fp8-scales`` (compressed-tensors, as vLLM reads it), ``modelopt`` (as TensorRT-LLM reads it) or
            ``sglang`` (its ``--quantization-param-path``).
        amax: a magnitude for each layer, by kind; replaces what the artifact records.
        prefix: name of an attention module in the checkpoint, with ``{layer}`` for its number; not for ``sglang``.
        ranks: number of tensor-parallel ranks; only for ``sglang``, whose file lists the scales for each.

    Raises:
        ConfigError: the artifact does not hold a range that is needed, or the prefix has no ``{layer}``.
    """
    scales = _scales(artifact, amax)
    if format == "sglang":
        # Keys and values share one factor: the larger of the two.
        both = [max(pair) for pair in zip(scales["key"], scales["value"], strict=True)]
        by_layer = {str(layer): scale for layer, scale in enumerate(both)}
        content = {
            "model_type": artifact.model.get("config", {}).get("model_type"),
            "kv_cache": {
                "dtype": "float8_e4m3fn",
                "scaling_factor": {str(rank): by_layer for rank in range(ranks)},
            },
        }
        return {"kv_cache_scales.json": _json(content)}
    if "{layer}" not in prefix:
        raise ConfigError(f"the prefix {prefix!r} needs {{layer}}, as in {DEFAULT_PREFIX!r}")
    names = {"key": "k_scale", "value": "v_scale"}
    shape: tuple[int, ...] = (1,)
    if format == "modelopt":
        names, shape = {"key": "k_proj.k_scale", "value": "v_proj.v_scale"}, ()
    tensors = {
        f"{prefix.replace('{layer}', str(layer))}.{names[kind]}": torch.full(shape, scale)
        for kind in KINDS
        for layer, scale in enumerate(scales[kind])
    }
    files = {"kv_cache_scales.safetensors": safetensors.torch.save(tensors, {"format": "pt"})}
    if format == "modelopt":
        # Readers recognise the layout by this producer. The version says who wrote the file.
        files["hf_quant_config.json"] = _json(
            {
                "producer": {"name": "modelopt", "version": "kvq-calib"},
                "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": []},
            }
        )
    else:
        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        files["quantization_config.json"] = _json(
            {
                "quant_method": "compressed-tensors",
                "format": "dense",
                "quantization_status": "compressed",
                "config_groups": {},
                "ignore": [],
                "kv_cache_scheme": scheme,
            }
        )
    return files


def write(files: Mapping[str, bytes], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the files of :func:`export` to a folder, which is created if needed.

    Raises:
        WriteError: the folder or a file cannot be written.
    """
    place = Path(folder)
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise WriteError(
            f"cannot make the folder {place}: {error.strerror or error}; name another one"
        ) from error
    for name, content in files.items():
        write_atomically(place / name, content)
    return [place / name for name in files]


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
