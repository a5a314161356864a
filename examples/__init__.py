"""Worked examples, which are not installed."""
