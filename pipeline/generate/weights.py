"""The name of a folder of weights: a digest of all that changes what the model says."""

from pathlib import Path

from pipeline.fingerprint import digest, file_digest


def weights_revision(folder: Path) -> str:
    """Return a digest over all files of a model folder but its card."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("README"))
    return digest([[path.name, file_digest(path)] for path in files])[:16]
