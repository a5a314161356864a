"""Values of a user's own tasks in words, for people: a report, a preview, a card."""

from typing import Any


def in_short(value: Any) -> str:
    """Return a value of JSON in words: `view: frontal; findings: (name: opacity; side: left)`."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {in_short(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(f"({in_short(one)})" if isinstance(one, dict) else in_short(one) for one in value) or "none"
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "unknown"}[value]
    return str(value)
