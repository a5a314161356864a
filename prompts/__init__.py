"""Prompt templates as package data: `<task>/v1.j2`."""
