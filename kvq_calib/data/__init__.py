"""Text for calibration and evaluation, cut into windows of token ids."""
