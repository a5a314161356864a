"""Prompt templates as package data: `<task>/vN.j2`. A released file never changes; a new wording is a new file."""
