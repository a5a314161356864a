"""Worked examples, which are not part of the installed package."""
