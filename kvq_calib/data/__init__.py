"""Text for calibration and evaluation: published data sets, Python's own manual, or any local text."""

from kvq_calib.data.windows import Convention, Split, TokenWindows, check_dataset, load_windows

__all__ = ["Convention", "Split", "TokenWindows", "check_dataset", "load_windows"]
