"""The artifact: one safetensors file that says everything a reader needs. ``docs/format.md`` is normative.

Tensors are named ``layers.{i}.{key|value}.{name}`` as :func:`kvq_calib.schema.spec.expected_tensors` lists them. The
safetensors metadata holds one entry, ``kvq``: a JSON object with sorted keys (one entry, because the order of
several is not defined and the same inputs must give the same bytes).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from kvq_calib.codec.packing import packed_tokens, shared_bytes, storage_bytes
from kvq_calib.codec.quantizer import Quantizer, QuantParams, pack_codebooks
from kvq_calib.errors import KVQError
from kvq_calib.files import write_atomically
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, cache_elements
from kvq_calib.schema.problem import first_problem
from kvq_calib.schema.spec import (
    KINDS,
    MAX_CODEBOOKS,
    Kind,
    KVCacheSpec,
    LayerSpec,
    QuantSpec,
    TensorShape,
    expected_tensors,
)

FORMAT_VERSION = 6
METADATA_KEY = "kvq"
#: Largest file a reader accepts. An artifact of a 405B model is under 1 GB.
MAX_FILE_BYTES = 8 << 30


class ArtifactError(KVQError):
    """An artifact that cannot be used."""


class ArtifactFileError(ArtifactError):
    """Not a readable safetensors file: missing, truncated, or a header that lies."""


class ArtifactVersionError(ArtifactError):
    """Written by a later format version than this reader knows."""


class ArtifactMetadataError(ArtifactError):
    """Metadata that is missing, malformed or contradicts itself."""


class ArtifactTensorError(ArtifactError):
    """A tensor that is missing, unknown, or has the wrong shape or dtype."""


class ArtifactValueError(ArtifactError):
    """A tensor with values no quantizer can have: NaN, unsorted levels, widths out of range, ..."""


class ArtifactDigestError(ArtifactError):
    """Content that does not match its own digest: the file was damaged or edited."""


class ArtifactModelError(ArtifactError):
    """The artifact was calibrated for another model."""


@dataclass(frozen=True)
class LayerParams:
    """The calibrated numbers of one layer."""

    key: QuantParams
    value: QuantParams

    def of(self, kind: Kind) -> QuantParams:
        """The numbers of ``kind``."""
        return self.key if kind == "key" else self.value


def reference_quantizers(
    spec: KVCacheSpec,
    geometry: KVGeometry,
    layers: Sequence[LayerParams],
    device: torch.device | str = "cpu",
) -> list[dict[Kind, Quantizer]]:
    """One reference quantizer per layer and kind, of what is or will be an artifact."""
    return [
        {
            kind: Quantizer(
                own.of(kind),
                params.of(kind),
                geometry.layers[number],
                geometry.rope_of(number),
                spec.storage_dtype,
            ).to(device)
            for kind in KINDS
        }
        for number, (own, params) in enumerate(zip(spec.resolved(len(layers)), layers, strict=True))
    ]


@dataclass(frozen=True)
class KVArtifact:
    """A calibrated key-value cache.

    Attributes:
        spec: what is quantized how.
        geometry: shapes and rotary embeddings of the model's attention layers.
        layers: the numbers of each layer.
        model: the model it is for: ``id`` (as the user named it) and ``config``, the fields a model must share.
        calibration: where the numbers come from: data, hashes, window, seed, settings, library versions.
        outliers_per_token: expected outliers of one token, per kind and layer, measured at calibration.
        older_sha256: of the file it was read from, if that is of an older format version: caches that were saved then
            name their artifact by it. Not taken over by a changed copy.
    """

    spec: KVCacheSpec
    geometry: KVGeometry
    layers: tuple[LayerParams, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    outliers_per_token: Mapping[Kind, Sequence[float]] = field(default_factory=dict)
    older_sha256: str | None = field(default=None, init=False, compare=False)

    # ------------------------------------------------------------------ use

    def quantizers(self, device: torch.device | str = "cpu") -> list[dict[Kind, Quantizer]]:
        """One reference quantizer per layer and kind."""
        return reference_quantizers(self.spec, self.geometry, self.layers, device)

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
            recent_tokens: exact window; the spec's by default.
            outliers_per_token: measured outliers per token, layer and kind; those of calibration by default.
        """
        recent = self.spec.recent_tokens if recent_tokens is None else recent_tokens
        rates = self.outliers_per_token if outliers_per_token is None else outliers_per_token
        sinks = self.spec.sink_tokens
        total: dict[str, float] = {}
        for index, quantizers in enumerate(self.quantizers()):
            window = self.geometry.layers[index].sliding_window
            first, stop = packed_tokens(context, recent, window)
            for kind, quantizer in quantizers.items():
                rate = rates[kind][index] if kind in rates else 0.0
                sizes = storage_bytes(
                    quantizer.layout,
                    context=context,
                    batch=batch,
                    sink_tokens=sinks,
                    recent_tokens=recent,
                    sliding_window=window,
                    outliers=rate * (stop - first) * batch,
                )
                sizes["parameters"] = quantizer.params.held_bytes
                for name, size in sizes.items():
                    total[name] = total.get(name, 0.0) + size
        total.update(shared_bytes(context, batch, sinks, recent))
        return total

    def elements(self, context: int, batch: int = 1) -> int:
        """Numbers an unquantized cache would hold: keys and values of every layer, a sliding window's where it has one."""
        return cache_elements(self.geometry.layers, context, batch)

    def bits_per_element(
        self,
        context: int,
        batch: int = 1,
        outliers_per_token: Mapping[Kind, Sequence[float]] | None = None,
    ) -> float:
        """Everything stored for ``context`` tokens, in bits, over the numbers an unquantized cache would hold."""
        total = sum(self.storage(context, batch, outliers_per_token=outliers_per_token).values())
        return 8 * total / self.elements(context, batch)

    # ---------------------------------------------------------------- write

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        specs = self.spec.resolved(len(self.layers))
        for index, params in enumerate(self.layers):
            for kind in KINDS:
                stored = params.of(kind).tensors()
                spec = specs[index].of(kind)
                if not spec.variable_bits:
                    bits, row = stored.pop("bits"), stored.pop("codebook_index")
                    if bool((bits != spec.bits).any()) or bool(row.any()):
                        raise ArtifactValueError(
                            f"layers.{index}.{kind} needs variable_bits: its channels have widths or codebooks of their own"
                        )
                elif int(stored["codebook_index"].max()) >= MAX_CODEBOOKS:
                    raise _too_many_codebooks(f"layers.{index}.{kind}.", stored["codebook_index"])
                for name, tensor in stored.items():
                    tensors[f"layers.{index}.{kind}.{name}"] = tensor.detach().cpu().contiguous()
        return tensors

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
        """The file's content; a pure function of this object.

        Raises:
            ArtifactError: this object breaks a rule that :meth:`load` checks.
        """
        tensors, metadata = self._tensors(), self._metadata()
        _validate(self.spec, self.geometry, tensors)
        metadata["digest"] = _digest(metadata, tensors)
        return safetensors.torch.save(tensors, {METADATA_KEY: _canonical(metadata)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact: whole, or not at all."""
        write_atomically(path, self.to_bytes())

    # ----------------------------------------------------------------- read

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KVArtifact:
        """Read and check an artifact.

        Raises:
            ArtifactError: its subclass and message say what is wrong with the file.
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
        """Check and build an artifact from a file's content; ``name`` is used in messages."""
        metadata, tensors = _parse(data, name)
        version = metadata.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ArtifactMetadataError(f"{name}: format_version is {version!r}, not a positive number")
        if version > FORMAT_VERSION:
            raise ArtifactVersionError(
                f"{name} has format version {version}, this release reads up to {FORMAT_VERSION}; update kvq-calib"
            )
        stated = metadata.pop("digest", None)
        try:
            actual = _digest(metadata, tensors)
        except (ValueError, RecursionError) as error:  # 1e999, or nested deeper than can be written again
            raise ArtifactMetadataError(
                f"{name}: its metadata is not plain JSON ({_one_line(error)})"
            ) from error
        if stated != actual:
            raise ArtifactDigestError(
                f"{name} is damaged: its content does not match its digest; copy it again"
            )
        try:
            spec = KVCacheSpec.model_validate(metadata.get("spec"))
            geometry = KVGeometry.model_validate(metadata.get("geometry"))
        except ValidationError as error:
            raise ArtifactMetadataError(f"{name}: {first_problem(error)}") from error
        unknown = metadata.keys() - {
            "format_version", "spec", "geometry", "model", "calibration", "outliers_per_token"
        }  # fmt: skip
        if unknown:
            raise ArtifactMetadataError(f"{name}: unknown metadata {sorted(unknown)[0]!r}")
        for section in ("model", "calibration"):
            if not isinstance(metadata.get(section), dict):
                raise ArtifactMetadataError(f"{name}: metadata {section!r} is not an object")
        rates = _check_rates(metadata.get("outliers_per_token"), len(geometry.layers), name)
        try:
            if version < 3:
                tensors = _packed(spec, geometry, tensors)
            _validate(spec, geometry, tensors)
        except ArtifactError as error:
            raise type(error)(f"{name}: {error}") from None
        specs = spec.resolved(len(geometry.layers))
        layers = tuple(
            LayerParams(
                **{
                    kind: _params(specs[index].of(kind), layer, f"layers.{index}.{kind}.", tensors)
                    for kind in KINDS
                }
            )
            for index, layer in enumerate(geometry.layers)
        )
        artifact = cls(spec, geometry, layers, metadata["model"], metadata["calibration"], rates)
        if version < FORMAT_VERSION:
            object.__setattr__(artifact, "older_sha256", hashlib.sha256(data).hexdigest())
        return artifact


def _params(
    spec: QuantSpec, geometry: LayerGeometry, prefix: str, tensors: Mapping[str, Tensor]
) -> QuantParams:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if spec.variable_bits:
        return QuantParams(**own)
    return QuantParams.uniform(spec.bits, geometry.channels, **own)


def _canonical(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the canonical metadata without its digest and, sorted by name, every tensor."""
    state = hashlib.sha256(_canonical(metadata).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _parse(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        tensors = safetensors.torch.load(data)
        header_size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_size])
    # A hostile header can fail anywhere between the parser and the tensor constructor.
    except Exception as error:
        raise ArtifactFileError(f"{name} is not a readable safetensors file: {_one_line(error)}") from error
    text = (header.get("__metadata__") or {}).get(METADATA_KEY)
    if text is None:
        raise ArtifactMetadataError(f"{name} is a safetensors file, but not an artifact of kvq-calib")
    try:
        metadata = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactMetadataError(f"{name}: its metadata is not JSON ({_one_line(error)})") from error
    if not isinstance(metadata, dict):
        raise ArtifactMetadataError(f"{name}: its metadata is not a JSON object")
    return metadata, tensors


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_rates(rates: object, layers: int, name: str) -> dict[Kind, list[float]]:
    if not isinstance(rates, dict) or set(rates) != set(KINDS):
        raise ArtifactMetadataError(f"{name}: outliers_per_token must have 'key' and 'value'")
    checked: dict[Kind, list[float]] = {}
    for kind in KINDS:
        values = rates[kind]
        if not isinstance(values, list) or len(values) != layers:
            raise ArtifactMetadataError(f"{name}: outliers_per_token.{kind} must have {layers} numbers")
        for value in values:
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ArtifactMetadataError(f"{name}: outliers_per_token.{kind} has {value!r}")
        checked[kind] = [float(value) for value in values]
    return checked


def _resolved(spec: KVCacheSpec, geometry: KVGeometry) -> tuple[LayerSpec, ...]:
    try:
        return spec.resolved(len(geometry.layers))
    except ValueError as error:
        raise ArtifactMetadataError(str(error)) from error


def _checked(tensors: Mapping[str, Tensor], name: str, expected: TensorShape) -> Tensor:
    """The tensor ``name``, if it is there and as expected."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ArtifactTensorError(f"tensor {name} is missing")
    shape, dtypes = expected
    actual, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    fits = len(actual) == len(shape) and all(
        size >= 1 if wanted is None else size == wanted for size, wanted in zip(actual, shape, strict=True)
    )
    if not fits or dtype not in dtypes:
        wanted_shape = ["any" if size is None else size for size in shape]
        raise ArtifactTensorError(
            f"tensor {name} is {dtype} {list(actual)}, not {' or '.join(dtypes)} {wanted_shape}"
        )
    return tensor


def _value_error(name: str, what: str) -> ArtifactValueError:
    return ArtifactValueError(f"tensor {name} {what}")


def _too_many_codebooks(prefix: str, index: Tensor) -> ArtifactValueError:
    what = (
        f"names {int(index.max()) + 1} codebooks, at most {MAX_CODEBOOKS} can be stored; calibrate with fewer"
    )
    return _value_error(prefix + "codebook_index", what)


def _packed(spec: KVCacheSpec, geometry: KVGeometry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file of version 1 or 2, where rows of a codebook are padded float32 and channels of several widths
    may share one, with the codebooks of version 3. Every reader computes what it did."""
    found = dict(tensors)
    for index, layer in enumerate(_resolved(spec, geometry)):
        for kind in KINDS:
            prefix, quant = f"layers.{index}.{kind}.", layer.of(kind)
            if not quant.variable_bits:
                continue
            per_channel = (geometry.layers[index].channels,)
            bits = _checked(tensors, prefix + "bits", (per_channel, ("uint8",)))
            row_of = _checked(tensors, prefix + "codebook_index", (per_channel, ("int32",)))
            table = _checked(tensors, prefix + "codebook", ((None, None), ("float32",)))
            _validate_widths(prefix, quant, bits)
            needed = quant.level_count(int(bits.max()))
            if not needed <= table.shape[1] <= 256:
                raise _value_error(prefix + "codebook", f"has {table.shape[1]} columns for {needed} levels")
            if int(row_of.min()) < 0 or int(row_of.max()) >= len(table):
                raise _value_error(prefix + "codebook_index", f"points outside the {len(table)} codebooks")
            if not bool(torch.isfinite(table).all()):
                raise _value_error(prefix + "codebook", "has values that are not finite")
            if bool((table[:, 1:] < table[:, :-1]).any()):
                raise _value_error(prefix + "codebook", "has unsorted levels")
            try:
                codebook, packed = pack_codebooks(quant, bits, table, row_of)
            except ValueError as error:
                raise _value_error(prefix + "codebook", f"{error}; calibrate again") from None
            if packed.dtype != torch.uint8:
                raise _too_many_codebooks(prefix, packed)
            found[prefix + "codebook"], found[prefix + "codebook_index"] = codebook, packed
    return found


def _validate(spec: KVCacheSpec, geometry: KVGeometry, tensors: Mapping[str, Tensor]) -> None:
    """Check names, shapes, dtypes and ranges of every tensor against spec and geometry."""
    unknown = set(tensors)
    for index, layer in enumerate(_resolved(spec, geometry)):
        rope = geometry.rope_of(index)
        for kind in KINDS:
            prefix = f"layers.{index}.{kind}."
            quant = layer.of(kind)
            for name, expected in expected_tensors(quant, geometry.layers[index], rope).items():
                _checked(tensors, prefix + name, expected)
                unknown.discard(prefix + name)
            _validate_values(prefix, quant, tensors)
    if unknown:
        raise ArtifactTensorError(f"tensor {sorted(unknown)[0]} is unknown")


def _validate_widths(prefix: str, spec: QuantSpec, bits: Tensor) -> None:
    if int(bits.max()) > spec.bits:
        raise _value_error(prefix + "bits", f"has widths over {spec.bits}")


def _validate_codebooks(prefix: str, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> None:
    """Rows of a codebook of ``variable_bits``: each used, by channels of one width, and sorted."""
    codebook, bits = tensors[prefix + "codebook"], tensors[prefix + "bits"]
    index = tensors[prefix + "codebook_index"].to(torch.int64)
    _validate_widths(prefix, spec, bits)
    widths: dict[int, int] = {}
    for row, width in zip(index.tolist(), bits.tolist(), strict=True):
        if widths.setdefault(row, width) != width:
            what = f"gives codebook {row} to channels of {widths[row]} and of {width} bits"
            raise _value_error(prefix + "codebook_index", what)
    rows = max(widths) + 1
    if len(widths) < rows:
        unused = min(set(range(rows)) - widths.keys())
        raise _value_error(prefix + "codebook_index", f"gives codebook {unused} to no channel")
    counts = [spec.level_count(widths[row]) for row in range(rows)]
    if len(codebook) != sum(counts):
        what = f"has {len(codebook)} levels, the widths of its channels need {sum(counts)}"
        raise _value_error(prefix + "codebook", what)
    if any(bool((row[1:] < row[:-1]).any()) for row in codebook.split(counts)):
        raise _value_error(prefix + "codebook", "has unsorted levels")


def _validate_values(prefix: str, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> None:
    for name in (
        *("codebook", "scale", "zero_point", "phase", "rotation"),
        *("feedback_scale", "feedback_weight", "importance", "importance_unit"),
    ):
        tensor = tensors.get(prefix + name)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise _value_error(prefix + name, "has values that are not finite")
    codebook = tensors[prefix + "codebook"]
    if spec.variable_bits:
        _validate_codebooks(prefix, spec, tensors)
    elif bool((codebook[:, 1:] < codebook[:, :-1]).any()):
        raise _value_error(prefix + "codebook", "has unsorted levels")
    for name in ("scale", "importance_unit"):
        tensor = tensors.get(prefix + name)
        if tensor is not None and bool((tensor <= 0).any()):
            raise _value_error(prefix + name, "must be positive")
    for name in ("feedback_scale", "feedback_weight", "importance"):
        tensor = tensors.get(prefix + name)
        if tensor is not None and bool((tensor < 0).any()):
            raise _value_error(prefix + name, "must not be negative")
    if spec.feedback_rank:
        if bool((tensors[prefix + "feedback_weight"] == 0).any()):
            raise _value_error(prefix + "feedback_weight", "must be positive with a feedback_rank")
        scale, entries = tensors[prefix + "feedback_scale"].double(), tensors[prefix + "feedback"].double()
        factor = (scale[:, None] * entries).unflatten(1, (-1, spec.feedback_rank))
        if bool((factor.square().sum(-1) >= 1).any()):
            raise _value_error(prefix + "feedback", "leaves a coordinate nothing of its own")
    rotation = tensors.get(prefix + "rotation")
    if rotation is not None:
        identity = torch.eye(rotation.shape[-1])
        if bool(((rotation @ rotation.mT - identity).abs() > 1e-3).any()):
            raise _value_error(prefix + "rotation", "is not orthogonal")
