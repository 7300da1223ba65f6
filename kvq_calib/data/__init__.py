"""Text for calibration and evaluation: published data sets, Python's own manual, or any local text."""

from kvq_calib.data.files import DATA_SETS
from kvq_calib.data.records import DEFAULT_FIELD
from kvq_calib.data.windows import (
    Convention,
    Split,
    TokenWindows,
    check_dataset,
    load_windows,
    windows_beside,
)

__all__ = [
    "DATA_SETS",
    "DEFAULT_FIELD",
    "Convention",
    "Split",
    "TokenWindows",
    "check_dataset",
    "load_windows",
    "windows_beside",
]
