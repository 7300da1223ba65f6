"""Import of ``quantizers.pickle`` files, which KVQuant's code writes.

Such a file maps ``model.layers.N.self_attn.{k_proj,v_proj}`` to ``(upper, lower, centroids)`` and, with Q-Norm,
``(..., scale, offset)``: the thresholds of every channel, and the centroids after normalisation by them. KVQuant
computes thresholds of values for each token at run time, so for values only the centroids are used.

A pickle is a program. It is not run here, but read as data: see :mod:`kvq_calib.artifact.number_pickle`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.errors import ArtifactFileError
from kvq_calib.artifact.number_pickle import PickleProblem, read_pickle
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.scalar import ScalarParams, ScalarQuantizer
from kvq_calib.errors import ConfigError, one_line
from kvq_calib.fit.levels import storable
from kvq_calib.schema.geometry import KINDS, KVGeometry, LayerGeometry
from kvq_calib.schema.spec import KVCacheSpec, OutlierSpec, ScalarSpec

__all__ = ["import_kvquant", "load_pickle"]

#: Largest pickle that is read, in bytes. For a 65B model it is about 10 MB.
_MAX_BYTES = 1 << 30
#: Most numbers in an array; a layer of a 405B model has 1024 channels of keys.
_MAX_CHANNELS = 1 << 20
_SMALLEST_SCALE = 1e-8


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Load a pickle of numpy arrays, torch tensors, numbers, text and plain containers, without running it.

    Raises:
        ArtifactFileError: not such a file; it needs anything else, or declares more data than it holds.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ArtifactFileError(f"{file} is too large to hold quantizers")
        data = file.read_bytes()
    except OSError as error:
        raise ArtifactFileError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        return read_pickle(data)
    except PickleProblem as problem:
        reason = one_line(problem).encode("ascii", "backslashreplace").decode()
        raise ArtifactFileError(f"{file} {reason}") from problem


def import_kvquant(
    path: str | os.PathLike[str],
    geometry: KVGeometry,
    model: Mapping[str, Any],
    *,
    outliers: float,
    sink_tokens: int = 0,
    max_per_token: int | None = None,
) -> KVArtifact:
    """Make an artifact from the thresholds and centroids of a ``quantizers.pickle``.

    Q-Norm is folded into the levels. KVQuant chooses codes by the levels before Q-Norm and decodes with those after it.
    Here a code is always the nearest stored level, so elements near a boundary may differ by one level.

    Args:
        path: the pickle.
        geometry: geometry of the model it was made for.
        model: ``id`` and ``config`` of that model.
        outliers: share of elements kept exact, which the pickle does not contain: 1 minus KVQuant's
            ``--sparsity-threshold``, or 0 for dense quantizers.
        sink_tokens: number of first tokens kept exact (KVQuant's ``--first_few_fp16``).
        max_per_token: largest number of outliers of a token of keys; ``None`` derives it.

    Raises:
        ArtifactFileError: not such a pickle, or without non-uniform quantizers.
        ConfigError: the pickle does not fit the geometry.
    """
    content = load_pickle(path)
    if not isinstance(content, dict) or not content:
        raise ArtifactFileError(f"{path} holds no quantizers by name")
    found = [_layer(path, content, number, shape) for number, shape in enumerate(geometry.layers)]
    extra = [n for n in content if n.startswith(f"model.layers.{len(geometry.layers)}.")]
    if extra:
        raise ConfigError(
            f"{path} has more layers than the model's {len(geometry.layers)}; name the model it was made for"
        )
    if len({forms for _, forms in found}) != 1 or len(found[0][1]) != 1:
        raise ArtifactFileError(f"{path} mixes quantizers of several kinds")
    ((width, q_norm),) = found[0][1]
    bits = (width - 1).bit_length()
    try:
        spec = KVCacheSpec(
            key=ScalarSpec(
                bits=bits,
                q_norm=q_norm,
                outliers=OutlierSpec(fraction=outliers, max_per_token=max_per_token if outliers else None),
            ),
            value=ScalarSpec(
                bits=bits, thresholds="token", q_norm=q_norm, outliers=OutlierSpec(fraction=outliers)
            ),
            sink_tokens=sink_tokens,
        )
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    return KVArtifact(
        spec,
        geometry,
        tuple(params for params, _ in found),
        model=dict(model),
        calibration={"recipe": "imported", "source": "KVQuant quantizers", "file": Path(path).name},
        outliers_per_token={
            kind: [
                ScalarQuantizer.nominal_outliers(spec.key if kind == "key" else spec.value, shape.shape(kind))
                for shape in geometry.layers
            ]
            for kind in KINDS
        },
    )


def _layer(
    path: str | os.PathLike[str], content: Mapping[Any, Any], number: int, shape: LayerGeometry
) -> tuple[LayerParams, frozenset[tuple[int, bool]]]:
    """The parameters of a layer, the number of levels, and whether its quantizers have Q-Norm."""
    centroids, forms = {}, set()
    for kind, projection in (("key", "k_proj"), ("value", "v_proj")):
        name = f"model.layers.{number}.self_attn.{projection}"
        entry = content.get(name)
        if not isinstance(entry, tuple) or len(entry) < 2:
            raise ConfigError(f"{path} has no quantizer {name}; name the model it was made for")
        if len(entry) < 3:
            raise ArtifactFileError(
                f"{name} has no centroids: only non-uniform quantizers (--nuq) can be imported"
            )
        centroids[kind] = _levels(name, entry)
        forms.add((len(centroids[kind]), len(entry) >= 5))
        if kind == "key":
            upper, lower = (_channels(name, part, shape.shape("key").channels) for part in entry[:2])
    if bool((upper < lower).any()):
        raise ArtifactFileError(f"{path}: upper thresholds of layer {number} are below the lower ones")
    scale = ((upper - lower) / 2).clamp(min=_SMALLEST_SCALE).float()
    key = ScalarParams(centroids["key"][None], scale, ((upper + lower) / 2).float())
    return LayerParams(key, ScalarParams(centroids["value"][None])), frozenset(forms)


def _array(name: str, part: Any, most: int) -> Tensor:
    """An array, a tensor, a number or a flat list of numbers, as float64 ``[n]``; ``n`` is 1 to ``most``."""
    if isinstance(part, int | float):
        part = [part]
    if isinstance(part, list | tuple) and all(isinstance(number, int | float) for number in part):
        size = len(part)
    elif isinstance(part, Tensor | np.ndarray):
        size = part.numel() if isinstance(part, Tensor) else part.size
    else:
        raise ArtifactFileError(f"{name} holds something that is not an array of numbers")
    if size > most:
        raise ArtifactFileError(f"{name} holds {size} numbers where {most} are the most")
    try:
        plain = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part, dtype=np.float64))
    except OverflowError as error:
        raise ArtifactFileError(f"{name} holds a number that is too large") from error
    tensor = plain.double().flatten()
    if not size or not bool(torch.isfinite(tensor).all()):
        raise ArtifactFileError(f"{name} holds numbers that are missing or not finite")
    return tensor


def _channels(name: str, part: Any, channels: int) -> Tensor:
    thresholds = _array(name, part, _MAX_CHANNELS)
    if len(thresholds) != channels:
        raise ConfigError(
            f"{name} has thresholds of {len(thresholds)} channels, the model has {channels}; name the model it was "
            "made for"
        )
    return thresholds


def _levels(name: str, entry: tuple[Any, ...]) -> Tensor:
    """Centroids as stored levels, with Q-Norm applied: float32, sorted, representable in float16."""
    holder = entry[2]
    if not isinstance(holder, list | tuple) or not holder:
        raise ArtifactFileError(f"{name} has no centroids")
    levels = _array(name, holder[0], _MAX_CHANNELS)
    count = len(levels)
    if count & (count - 1) or not 2 <= count <= 256:
        raise ArtifactFileError(f"{name} has {count} centroids, not a power of two from 2 to 256")
    if len(entry) >= 5:
        scale, offset = (_array(name, part, _MAX_CHANNELS) for part in entry[3:5])
        levels = levels * scale[0] + offset[0]
    return torch.from_numpy(storable(levels.numpy())).float()
