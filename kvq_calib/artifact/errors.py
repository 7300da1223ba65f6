"""Errors of artifacts."""

from kvq_calib.errors import KVQError


class ArtifactError(KVQError):
    """An artifact that cannot be used."""


class ArtifactFileError(ArtifactError):
    """Not a readable safetensors file: missing, truncated, or with a false header."""


class ArtifactVersionError(ArtifactError):
    """The file has a format version that this release does not read."""


class ArtifactMetadataError(ArtifactError):
    """Metadata that is missing, malformed or contradicts itself."""


class ArtifactTensorError(ArtifactError):
    """A tensor that is missing, unknown, or has the wrong shape or dtype."""


class ArtifactValueError(ArtifactError):
    """A tensor with impossible values: NaN, unsorted levels, widths out of range, ..."""


class ArtifactDigestError(ArtifactError):
    """The content does not match the digest: the file was damaged or edited."""


class ArtifactModelError(ArtifactError):
    """The artifact was calibrated for another model."""


class ArtifactHubError(ArtifactError):
    """The artifact was not found in a folder or on the hub, or the hub refused an upload."""
