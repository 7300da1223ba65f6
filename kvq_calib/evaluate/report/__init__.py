"""The report of ``kvq-eval report``: what was measured before, what is measured for it, and the page."""
