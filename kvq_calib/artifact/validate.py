"""Checks of a file before it is used: names, shapes, dtypes and values of tensors, and metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from kvq_calib.artifact.errors import ArtifactMetadataError, ArtifactTensorError, ArtifactValueError
from kvq_calib.codec.params import StoredTensor, TensorProblem
from kvq_calib.codec.registry import codec_of
from kvq_calib.schema.geometry import KINDS, Kind, KVGeometry
from kvq_calib.schema.spec import KVCacheSpec, QuantSpec

__all__ = ["check_rates", "check_tensors", "prefix_of"]


def prefix_of(layer: int, kind: Kind) -> str:
    """The prefix of tensor names for the keys or the values of one layer."""
    return f"layers.{layer}.{kind}."


def check_tensors(spec: KVCacheSpec, geometry: KVGeometry, tensors: Mapping[str, Tensor]) -> None:
    """Check every tensor against the spec and the geometry.

    Raises:
        ArtifactError: a tensor is missing, unknown or invalid, or spec and geometry do not fit each other.
    """
    unknown = set(tensors)
    for layer, kind, own in _specs(spec, geometry):
        prefix = prefix_of(layer, kind)
        rope = geometry.rope_of(layer) if kind == "key" else None
        pairs = 0 if rope is None else len(rope.pairs)
        codec = codec_of(own)
        expected = codec.stored_tensors(own, geometry.layers[layer].shape(kind), pairs)
        found = {name: _checked(tensors, prefix + name, wanted) for name, wanted in expected.items()}
        unknown -= {prefix + name for name in expected}
        try:
            codec.check_values(own, found)
        except TensorProblem as problem:
            raise ArtifactValueError(f"tensor {prefix}{problem.name} {problem}") from problem
    if unknown:
        raise ArtifactTensorError(f"tensor {sorted(unknown)[0]} is unknown")


def _specs(spec: KVCacheSpec, geometry: KVGeometry) -> Iterator[tuple[int, Kind, QuantSpec]]:
    try:
        layers = spec.resolved(len(geometry.layers))
    except ValueError as error:
        raise ArtifactMetadataError(str(error)) from error
    for number, layer in enumerate(layers):
        for kind in KINDS:
            yield number, kind, layer.of(kind)


def _checked(tensors: Mapping[str, Tensor], name: str, expected: StoredTensor) -> Tensor:
    """The tensor ``name``. Raises if it is missing or does not have the expected shape and dtype."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ArtifactTensorError(f"tensor {name} is missing")
    actual, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    fits = len(actual) == len(expected.shape) and all(
        wanted is None or size == wanted for size, wanted in zip(actual, expected.shape, strict=True)
    )
    if not fits or dtype not in expected.dtypes:
        wanted = ["any" if size is None else size for size in expected.shape]
        raise ArtifactTensorError(
            f"tensor {name} is {dtype} {list(actual)}, not {' or '.join(expected.dtypes)} {wanted}"
        )
    return tensor


def check_rates(rates: object, layers: int) -> dict[Kind, list[float]]:
    """Check the metadata ``outliers_per_token``: for each kind, one number per layer, none negative.

    Raises:
        ArtifactMetadataError: it does not have this form.
    """
    if not isinstance(rates, dict) or set(rates) != set(KINDS):
        raise ArtifactMetadataError("outliers_per_token must have 'key' and 'value'")
    checked: dict[Kind, list[float]] = {}
    for kind in KINDS:
        values = rates[kind]
        if not isinstance(values, list) or len(values) != layers:
            raise ArtifactMetadataError(f"outliers_per_token.{kind} must have {layers} numbers")
        for value in values:
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ArtifactMetadataError(f"outliers_per_token.{kind} has {value!r}")
        checked[kind] = [float(value) for value in values]
    return checked
