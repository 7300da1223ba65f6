"""The calibrated parameters of one layer's keys or values: tensors by name, with one class per codec."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from kvq_calib.schema.geometry import HeadShape, Kind
from kvq_calib.schema.spec import QuantSpec

__all__ = ["LayerParams", "Params", "StoredTensor", "TensorProblem"]


class StoredTensor(NamedTuple):
    """The required shape and dtype of a tensor in an artifact.

    Attributes:
        shape: the shape; ``None`` in it stands for any size.
        dtypes: names of the allowed dtypes; new artifacts have the first.
    """

    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...]


class TensorProblem(ValueError):
    """A tensor has invalid values.

    Attributes:
        name: name of the tensor.
    """

    def __init__(self, name: str, what: str) -> None:
        super().__init__(what)
        self.name = name


@dataclass(frozen=True)
class Params:
    """Tensors by name; the base class of each codec's parameters."""

    #: Names of tensors that all heads share. The first dimension of the others is heads or channels.
    shared: ClassVar[frozenset[str]] = frozenset()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not ``None``, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @property
    def held_bytes(self) -> int:
        """Number of bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def of_heads(self, spec: QuantSpec, shape: HeadShape, first: int, count: int) -> Self:
        """The parameters of some heads, for shards.

        Args:
            spec: spec of the keys or values.
            shape: shape with all heads.
            first, count: first head to keep, and number of heads.
        """
        part: dict[str, Any] = {}
        for name, tensor in self.tensors().items():
            if name not in self.shared:
                step = tensor.shape[0] // shape.heads  # the channels of a head, or 1
                part[name] = tensor[first * step : (first + count) * step]
        return replace(self, **part)


@dataclass(frozen=True)
class LayerParams:
    """The calibrated parameters of one layer."""

    key: Params
    value: Params

    def of(self, kind: Kind) -> Params:
        """The parameters of the keys or of the values."""
        return self.key if kind == "key" else self.value
