"""Download a model from the Hub. This happens before a server starts, because its start has a time limit."""

import shutil
from pathlib import Path

from pipeline.errors import EngineError
from pipeline.hub_errors import translate_hub_errors
from pipeline.progress import Progress

# Formats that neither vLLM nor transformers loads here, or copies of the same weights.
IGNORED_FILES = ("*.gguf", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx*", "original/*", "consolidated*")


def download_model(model: str, commit: str, progress: Progress) -> Path:
    """Return the folder of a Hub model in the local cache. An interrupted download resumes.

    Raises EngineError if the Hub does not answer, or if the disk is too small.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    hint = "run the same command again: the download resumes"
    with translate_hub_errors(model, "model", EngineError, hint, or_folder=True):
        files = snapshot_download(model, revision=commit, ignore_patterns=[*IGNORED_FILES], dry_run=True)
        has_safetensors = any(file.filename.endswith(".safetensors") for file in files)
        ignored = [*IGNORED_FILES, *(["*.bin"] if has_safetensors else [])]
        missing = [
            file.file_size or 0
            for file in files
            if file.will_download and not (has_safetensors and file.filename.endswith(".bin"))
        ]
        if missing:
            cache = Path(HF_HUB_CACHE)
            disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
            free_gb, size_gb = shutil.disk_usage(disk).free / 1e9, sum(missing) / 1e9
            if free_gb < size_gb:
                problem = f"{model} needs {size_gb:.1f} GB in {cache}, but the disk has {free_gb:.1f} GB free"
                raise EngineError(problem, hint="free some space, or set HF_HOME to a folder on another disk")
            progress.message(f"downloading {model}: {len(missing)} files, {size_gb:.1f} GB, to {cache}")
        return Path(snapshot_download(model, revision=commit, ignore_patterns=ignored))
