"""Errors for users. Each message is one line that says what was wrong and what to do."""


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an exception as one line of at most ``most`` characters; its type's name if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def told_by(error: BaseException | None) -> str:
    """A library's message to its users in brackets; empty if the exception looks like a defect of the library."""
    said = isinstance(error, ValueError | NotImplementedError) and bool(str(error).strip())
    return f" ({one_line(error)})" if error is not None and said else ""


class KVQError(Exception):
    """Base class of all expected failures. The command line prints the message and exits with status 1."""


class ConfigError(KVQError):
    """A configuration key, value or combination that is not allowed."""


class DataError(KVQError):
    """Text that is missing, unreadable or too short."""


class ModelError(KVQError):
    """A model that cannot be loaded, or whose keys and values cannot be captured."""


class NothingToQuantizeError(ModelError):
    """A model that keeps no keys and values in a cache."""


class CalibrationError(KVQError):
    """A calibration run that cannot go on (non-finite activations, disagreeing ranks, ...)."""


class RuntimeMismatchError(KVQError):
    """A cache, a model and an artifact that do not belong together."""
