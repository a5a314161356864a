"""The report: pages that show a dataset to the people who decide about it."""
