"""The report: an HTML page that shows a dataset and its captioner."""
