"""The calibrated numbers of one layer's keys or values, as tensors by name; each codec has a class of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from kvq_calib.schema.geometry import HeadShape, Kind
from kvq_calib.schema.spec import QuantSpec

__all__ = ["LayerParams", "Params", "StoredTensor", "TensorProblem"]


class StoredTensor(NamedTuple):
    """What a tensor of an artifact must be.

    Attributes:
        shape: ``None`` for "any, at least 1".
        dtypes: names of the allowed ones, that of new artifacts first.
    """

    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...]


class TensorProblem(ValueError):
    """A tensor with values that no quantizer can have.

    Attributes:
        name: of the tensor.
    """

    def __init__(self, name: str, what: str) -> None:
        super().__init__(what)
        self.name = name


@dataclass(frozen=True)
class Params:
    """Tensors by name; the base of what each codec stores."""

    #: Names of tensors that all heads share; of the others the first dimension goes over heads or channels.
    shared: ClassVar[frozenset[str]] = frozenset()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @property
    def held_bytes(self) -> int:
        """Bytes of these tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def of_heads(self, spec: QuantSpec, shape: HeadShape, first: int, count: int) -> Self:
        """What belongs to some heads, the basis of shards.

        Args:
            spec: of the tensor.
            shape: of all heads.
            first, count: of the heads to keep.
        """
        part: dict[str, Any] = {}
        for name, tensor in self.tensors().items():
            if name not in self.shared:
                step = tensor.shape[0] // shape.heads  # channels of a head, or 1
                part[name] = tensor[first * step : (first + count) * step]
        return replace(self, **part)


@dataclass(frozen=True)
class LayerParams:
    """The calibrated numbers of one layer."""

    key: Params
    value: Params

    def of(self, kind: Kind) -> Params:
        """The numbers of ``kind``."""
        return self.key if kind == "key" else self.value
