"""The name of a folder of weights: a digest of all that changes what the model says."""

from pathlib import Path

from pipeline.fingerprint import digest, file_digest


def weights_revision(folder: Path) -> str:
    """Return a digest over the weights, configs and templates of a model folder."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
    return digest([[path.name, file_digest(path)] for path in files])[:16]
