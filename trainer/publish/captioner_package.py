"""Package a captioner for the Hub, and a Space with a demo page."""

from pathlib import Path

import yaml

from pipeline.hub.package import Package, build_checkpoint_package, build_space_package
from pipeline.storage.files import json_text, read_json
from trainer.config import DECODERS, ENCODERS
from trainer.prompts import preferred_style
from trainer.publish.transformers_files import transformers_files

HERE = Path(__file__).parent
GRADIO_VERSION = "6.31.0"
SPACE_REQUIREMENTS = "torch\ntransformers>=5.17\npillow\n"


def page_options(prompts: list[tuple[str, str]]) -> tuple[list[str], bool]:
    """Return the styles of a captioner (the default first), and whether it answers questions."""
    default = preferred_style(prompts)
    styles = list(dict.fromkeys([default, *(style for _, style in prompts if style)])) if default else [""]
    return styles, any(not style for _, style in prompts)


def package_captioner(folder: Path, repo: str) -> Package:
    """Return the package to push for a checkpoint folder. Raises TrainError if the captioner is damaged."""
    if (folder / "model.safetensors").is_file():
        from trainer.model.checkpoint import load_checkpoint  # imports torch

        load_checkpoint(folder)
    return build_checkpoint_package(folder, repo, transformers_files, {**ENCODERS, **DECODERS})


def package_space(package: Package, folder: Path, repo: str, revision: str) -> Package:
    """Return the package of a Space for the captioner in `folder`, which was pushed to `repo`."""
    styles, answers = page_options(read_json(folder / "config.json")["prompts"])
    about = {"model": repo, "revision": revision, "styles": styles, "answers": answers}
    header = {
        "title": repo.rpartition("/")[2],
        "emoji": "\N{FRAME WITH PICTURE}",
        "colorFrom": "gray",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "app_file": "app.py",
        "models": [repo],
        "pinned": False,
    }
    front_matter = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    text = f"A demo page for the captioner [{repo}](https://huggingface.co/{repo}), revision {revision}.\n"
    files = {
        "app.py": (HERE / "space.py").read_bytes(),
        "requirements.txt": SPACE_REQUIREMENTS.encode(),
        "space.json": json_text(about).encode(),
        "README.md": f"---\n{front_matter}---\n\n{text}".encode(),
    }
    return build_space_package(package, files)
