"""The HTML page of ``kvq-eval report``: earlier results, measurements per layer, and how to repeat them."""
