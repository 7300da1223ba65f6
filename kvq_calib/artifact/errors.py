"""The ways in which an artifact can be wrong."""

from kvq_calib.errors import KVQError


class ArtifactError(KVQError):
    """An artifact that cannot be used."""


class ArtifactFileError(ArtifactError):
    """Not a readable safetensors file: missing, truncated, or a header that lies."""


class ArtifactVersionError(ArtifactError):
    """Written by another format version than this reader knows."""


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


class ArtifactHubError(ArtifactError):
    """No such artifact in a folder or on the hub, or the hub does not take it."""
