"""Charts of the report and of the comparison; they need matplotlib (the extra ``report``)."""
