"""The artifact: one safetensors file with everything a reader needs. ``docs/reference/format.md`` is normative.

Tensors are named ``layers.{i}.{key|value}.{name}``. The codec defines which there are
(:meth:`kvq_calib.codec.quantizer.Quantizer.stored_tensors`). The safetensors metadata has one entry, ``kvq``: a JSON
object with sorted keys. It is a single entry because safetensors does not define an order of entries, and the same
inputs must give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kvq_calib.artifact.errors import (
    ArtifactDigestError,
    ArtifactError,
    ArtifactFileError,
    ArtifactMetadataError,
    ArtifactModelError,
    ArtifactVersionError,
)
from kvq_calib.artifact.hub import Shareable, find_artifact
from kvq_calib.artifact.sealed import SealError, seal, unseal
from kvq_calib.artifact.validate import check_rates, check_tensors, prefix_of
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.registry import codec_of, make_quantizers
from kvq_calib.codec.size import CacheShape, TensorShape, cache_bytes
from kvq_calib.files import write_atomically
from kvq_calib.schema.geometry import KINDS, Kind, KVGeometry, cache_elements
from kvq_calib.schema.problem import first_problem
from kvq_calib.schema.spec import KVCacheSpec

__all__ = ["FORMAT_VERSION", "MAX_FILE_BYTES", "METADATA_KEY", "KVArtifact"]

FORMAT_VERSION = 8
METADATA_KEY = "kvq"
#: Largest file that is accepted. An artifact of a 405B model is under 1 GB.
MAX_FILE_BYTES = 8 << 30
_SECTIONS = {"format_version", "spec", "geometry", "model", "calibration", "outliers_per_token"}


@dataclass(frozen=True)
class KVArtifact(Shareable):
    """A calibrated key-value cache.

    Attributes:
        spec: how keys and values are quantized.
        geometry: shapes and rotary embeddings of the model's attention layers.
        layers: the tensors that calibration found for each layer.
        model: the model it is for: ``id``, as the user named it, and ``config``, the fields that a model must match.
        calibration: how it was calibrated: data, hashes, window, seed, settings, library versions.
        outliers_per_token: mean number of outliers of a token, per kind and layer, measured at calibration.
    """

    spec: KVCacheSpec
    geometry: KVGeometry
    layers: tuple[LayerParams, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    outliers_per_token: Mapping[Kind, Sequence[float]] = field(default_factory=dict)

    # ------------------------------------------------------------------ use

    def quantizers(self, device: torch.device | str = "cpu") -> list[dict[Kind, Quantizer]]:
        """One quantizer for each layer and kind."""
        return make_quantizers(self.spec, self.geometry, self.layers, device)

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Refuse a model that this artifact is not for.

        Args:
            config: :func:`kvq_calib.model.fingerprint.model_fingerprint` of the model.

        Raises:
            ArtifactModelError: names the first field that differs.
        """
        expected = dict(self.model.get("config", {}))
        for name in sorted(expected.keys() | config.keys()):
            if expected.get(name) != config.get(name):
                raise ArtifactModelError(
                    f"the artifact is for {self.model.get('id', 'another model')} with {name} = "
                    f"{expected.get(name)!r}, this model has {config.get(name)!r}; calibrate this model first"
                )

    def sizes(
        self, outliers_per_token: Mapping[Kind, Sequence[float]] | None = None
    ) -> list[dict[Kind, TensorShape]]:
        """What determines the bytes of the keys and the values of each layer.

        Args:
            outliers_per_token: measured outliers per token, kind and layer; by default those of calibration.
        """
        rates = self.outliers_per_token if outliers_per_token is None else outliers_per_token
        return [
            {
                kind: TensorShape(
                    quantizer.layout,
                    self.geometry.layers[index].sliding_window,
                    rates[kind][index] if kind in rates else 0.0,
                    quantizer.params.held_bytes,
                )
                for kind, quantizer in own.items()
            }
            for index, own in enumerate(self.quantizers())
        ]

    def cache_shape(self, context: int, batch: int = 1, recent_tokens: int | None = None) -> CacheShape:
        """The sizes of a cache of this artifact. ``recent_tokens`` is the spec's by default."""
        recent = self.spec.recent_tokens if recent_tokens is None else recent_tokens
        return CacheShape(context, batch, self.spec.sink_tokens, recent)

    def storage(
        self,
        context: int,
        batch: int = 1,
        recent_tokens: int | None = None,
        outliers_per_token: Mapping[Kind, Sequence[float]] | None = None,
    ) -> dict[str, float]:
        """Bytes of a packed cache of ``batch`` sequences of ``context`` tokens, by kind of buffer.

        Args:
            context: tokens of one sequence.
            batch: sequences.
            recent_tokens: newest tokens that stay exact; by default the spec's.
            outliers_per_token: measured outliers per token, kind and layer; by default those of calibration.
        """
        tensors = [tensor for layer in self.sizes(outliers_per_token) for tensor in layer.values()]
        return cache_bytes(tensors, self.cache_shape(context, batch, recent_tokens))

    def elements(self, context: int, batch: int = 1) -> int:
        """Numbers in an unquantized cache: keys and values of every layer, within its sliding window."""
        return cache_elements(self.geometry.layers, context, batch)

    def bits_per_element(
        self,
        context: int,
        batch: int = 1,
        outliers_per_token: Mapping[Kind, Sequence[float]] | None = None,
    ) -> float:
        """All bits stored for ``context`` tokens, divided by the numbers in an unquantized cache."""
        total = sum(self.storage(context, batch, outliers_per_token=outliers_per_token).values())
        return 8 * total / self.elements(context, batch)

    # ---------------------------------------------------------------- write

    def _tensors(self) -> dict[str, Tensor]:
        return {
            prefix_of(index, kind) + name: tensor.detach().cpu().contiguous()
            for index, params in enumerate(self.layers)
            for kind in KINDS
            for name, tensor in params.of(kind).tensors().items()
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "spec": self.spec.model_dump(mode="json"),
            "geometry": self.geometry.model_dump(mode="json"),
            "model": dict(self.model),
            "calibration": dict(self.calibration),
            "outliers_per_token": {kind: list(rates) for kind, rates in self.outliers_per_token.items()},
        }

    def to_bytes(self) -> bytes:
        """The content of the file, which depends on nothing but this object.

        Raises:
            ArtifactError: :meth:`load` would refuse this content.
        """
        tensors = self._tensors()
        check_tensors(self.spec, self.geometry, tensors)
        return seal(METADATA_KEY, self._metadata(), tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact atomically."""
        write_atomically(path, self.to_bytes())

    # ----------------------------------------------------------------- read

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> KVArtifact:
        """Read an artifact from a file, a folder or the hub.

        Args:
            name: file, folder, or hub id.
            options: ``filename`` if there are several artifacts; ``revision``, ``token``, ``cache_dir`` and
                ``local_files_only`` as in transformers.

        Raises:
            ArtifactError: there is no artifact, or the file cannot be used.
        """
        return cls.load(find_artifact(name, **options))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KVArtifact:
        """Read and check an artifact.

        Raises:
            ArtifactError: the file cannot be used; the subclass and the message say why.
        """
        file = Path(path)
        try:
            size = file.stat().st_size
            if size > MAX_FILE_BYTES:
                raise ArtifactFileError(f"{file} has {size} bytes: too large to be an artifact")
            data = file.read_bytes()
        except OSError as error:
            raise ArtifactFileError(f"cannot read artifact {file}: {error.strerror or error}") from error
        return cls.from_bytes(data, name=str(file))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "artifact") -> KVArtifact:
        """Check the content of a file and build the artifact. ``name`` is used in messages."""
        try:
            metadata, tensors = unseal(data, METADATA_KEY, lambda found: _check_version(found, name))
        except SealError as error:
            raise _error_of(error, name) from error
        unknown = metadata.keys() - _SECTIONS
        if unknown:
            raise ArtifactMetadataError(f"{name}: unknown metadata {sorted(unknown)[0]!r}")
        for section in ("model", "calibration"):
            if not isinstance(metadata.get(section), dict):
                raise ArtifactMetadataError(f"{name}: metadata {section!r} is not an object")
        try:
            spec = KVCacheSpec.model_validate(metadata.get("spec"))
            geometry = KVGeometry.model_validate(metadata.get("geometry"))
            rates = check_rates(metadata.get("outliers_per_token"), len(geometry.layers))
            check_tensors(spec, geometry, tensors)
        except ValidationError as error:
            raise ArtifactMetadataError(f"{name}: {first_problem(error)}") from error
        except ArtifactError as error:
            raise type(error)(f"{name}: {error}") from None
        layers = _layer_params(spec, tensors, len(geometry.layers))
        return cls(spec, geometry, layers, metadata["model"], metadata["calibration"], rates)


def _layer_params(spec: KVCacheSpec, tensors: Mapping[str, Tensor], layers: int) -> tuple[LayerParams, ...]:
    """The parameters of all layers, from tensors that were checked."""
    found = []
    for number, layer in enumerate(spec.resolved(layers)):
        own = {}
        for kind in KINDS:
            prefix = prefix_of(number, kind)
            named = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            own[kind] = codec_of(layer.of(kind)).params_type(**named)
        found.append(LayerParams(own["key"], own["value"]))
    return tuple(found)


def _check_version(metadata: Mapping[str, Any], name: str) -> None:
    version = metadata.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactMetadataError(f"{name}: format_version is {version!r}, not a positive number")
    if version > FORMAT_VERSION:
        raise ArtifactVersionError(
            f"{name} has format version {version}, this release reads {FORMAT_VERSION}; update kvq-calib"
        )
    if version < FORMAT_VERSION:
        raise ArtifactVersionError(
            f"{name} has format version {version} of an earlier kvq-calib, this release reads only {FORMAT_VERSION}; "
            "calibrate the model again"
        )


#: Faults of a sealed file: the error to raise, and its message.
_FAULTS: Mapping[str, tuple[type[ArtifactError], str]] = {
    "file": (ArtifactFileError, "{name} is not a readable safetensors file: {problem}"),
    "kind": (ArtifactMetadataError, "{name} is a safetensors file, but not an artifact of kvq-calib"),
    "metadata": (ArtifactMetadataError, "{name}: {problem}"),
    "digest": (
        ArtifactDigestError,
        "{name} is damaged: its content does not match its digest; copy it again",
    ),
}


def _error_of(fault: SealError, name: str) -> ArtifactError:
    error, message = _FAULTS[fault.fault]
    return error(message.format(name=name, problem=fault))
