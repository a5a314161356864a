"""Package a captioner for the Hub: the files with which it loads in transformers, and a page for it."""

import ast
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import TrainError
from pipeline.hub.package import Package, build_checkpoint_package, build_space_package
from pipeline.storage.files import json_text, read_json
from trainer.config import DECODERS, ENCODERS
from trainer.runtime.checkpoint_folder import PUBLISHED_TYPE, require_checkpoint
from trainer.tokenizer import preferred_style

HERE = Path(__file__).parent
ROOT = HERE.parents[1]  # of the project's packages
MODULE = "modeling_synth_captioner"
DEFINITIONS = {  # by module of this project: what replaces an import from it in a published file
    "pipeline.images.upright": ("BAND_PX", "upright_rgb", "over_white"),
    "trainer.model.decoder": (
        "DecoderConfig", "TensorPair", "Seen", "BlockCache", "Block", "Attention", "attend_apart", "rope_table", "apply_rope",
    ),
    "trainer.model.encoder": ("BEFORE_PATCHES", "layer_states", "choose_states", "patch_grid"),
    "trainer.tokenizer": (
        "ANSWER", "STYLES", "preferred_style", "preferred_source", "choose_prompt", "prompt_parts", "prompt_ids",
    ),
}  # fmt: skip
NEEDED_IMPORTS = {  # of the definitions of a module
    "trainer.tokenizer": "from collections.abc import Callable\n",
    "pipeline.images.upright": "from PIL import ImageOps\n",
    "trainer.model.decoder": "import math\nfrom dataclasses import dataclass, field\nfrom torch.nn import functional\n",
}
GRADIO = "6.31.0"  # that the page was tested with; a Space installs this one
SPACE_REQUIREMENTS = ("torch", "transformers>=5.17", "pillow")
HEADER = "# This file comes with the captioner and needs torch, transformers and Pillow; it is written by `synth push`.\n"


def transformers_files(folder: Path) -> dict[str, bytes]:
    """Return the files, by name, that make a checkpoint folder a model of transformers; config.json among them.

    Raises TrainError if the folder holds no captioner.
    """
    require_checkpoint(folder)
    try:
        config, tokenizer = read_json(folder / "config.json"), read_json(folder / "tokenizer.json")
        eos_token = next(token["content"] for token in tokenizer["added_tokens"] if token["id"] == config["eos_id"])
        is_scratch = "language_model" not in config["decoder"]
        pad_id, pad_token = (0, tokenizer["added_tokens"][0]["content"]) if is_scratch else (config["eos_id"], eos_token)
        processor = config["encoder"]["processor"]
        beams = int(config["data"].get("num_beams", 1))  # with which it was scored
    except (KeyError, TypeError, StopIteration, ValueError) as error:
        raise TrainError(f"{folder} is not a captioner: {error!r}", hint="train one: `synth train`") from None
    classes = {"AutoConfig": "SynthCaptionerConfig", "AutoModelForImageTextToText": "SynthCaptioner"}
    values: dict[str, dict[str, Any]] = {
        "config.json": {
            **config,
            "model_type": PUBLISHED_TYPE,
            "architectures": ["SynthCaptioner"],
            "auto_map": {name: f"{MODULE}.{kind}" for name, kind in classes.items()},
            "dtype": "float32",
        },
        "generation_config.json": {
            "eos_token_id": config["eos_id"],
            "pad_token_id": pad_id,
            "max_new_tokens": config["max_caption_tokens"],
            "do_sample": False,
            **({"num_beams": beams, "early_stopping": "never"} if beams > 1 else {}),
        },
        "preprocessor_config.json": processor,
        "processor_config.json": {
            "processor_class": "SynthCaptionerProcessor",
            "auto_map": {"AutoProcessor": f"{MODULE}.SynthCaptionerProcessor"},
            "prompts": config["prompts"],
            "kind": "scratch" if is_scratch else "pretrained",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos_token,
            "pad_token": pad_token,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    }
    files = {name: json_text(value).encode() for name, value in values.items()}
    return files | {f"{MODULE}.py": (HEADER + standalone_source("modeling")).encode()}


def space_files(folder: Path, repo: str, revision: str) -> dict[str, bytes]:
    """Return the files of a Space that shows the captioner of a checkpoint folder, once it is in `repo` at a revision."""
    require_checkpoint(folder)
    styles, answers = page_options(read_json(folder / "config.json")["prompts"])
    about = {"model": repo, "revision": revision, "styles": styles, "answers": answers}
    header = {
        "title": repo.rpartition("/")[2],
        "emoji": "\N{FRAME WITH PICTURE}",
        "colorFrom": "gray",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "models": [repo],
        "pinned": False,
    }
    text = f"A page for the captioner [{repo}](https://huggingface.co/{repo}), at {revision}.\n"
    return {
        "app.py": (HERE / "space.py").read_bytes(),
        "requirements.txt": "".join(f"{name}\n" for name in SPACE_REQUIREMENTS).encode(),
        "space.json": json_text(about).encode(),
        "README.md": f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{text}".encode(),
    }


def page_options(prompts: list[tuple[str, str]]) -> tuple[list[str], bool]:
    """Return the styles that a page offers, the default first, and whether its captioner answers questions."""
    usual = preferred_style(prompts)
    styles = list(dict.fromkeys([usual, *(style for _, style in prompts if style)])) if usual else [""]
    return styles, any(not style for _, style in prompts)


def standalone_source(name: str) -> str:
    """Return a module of this package in which definitions stand in place of their import from the project."""
    text = (HERE / f"{name}.py").read_text(encoding="utf-8")
    needed = ""
    for module, names in DEFINITIONS.items():
        for line in [line for line in text.splitlines() if line.startswith(f"from {module} import")]:
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            defined = "\n\n\n".join(_source_of(source, name) for name in names)
            text = text.replace(line, f"\n{defined}\n")
            needed += NEEDED_IMPORTS.get(module, "")
    return text.replace("from typing import Any\n", f"{needed}from typing import Any\n", 1)


def _source_of(text: str, name: str) -> str:
    """Return the source of a class, a function or a constant of a module, with its decorators."""
    (node,) = [node for node in ast.parse(text).body if name in _defined(node)]
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    return {target.id for target in node.targets if isinstance(target, ast.Name)} if isinstance(node, ast.Assign) else set()


def package_captioner(folder: Path, repo: str) -> Package:
    """Return the package of a checkpoint folder to push to `repo`. Raises TrainError for a damaged captioner."""
    if (folder / "model.safetensors").is_file():
        from trainer.model.checkpoint import load_checkpoint  # imports torch

        load_checkpoint(folder)  # a damaged captioner would be published for good
    return build_checkpoint_package(folder, repo, transformers_files, {**ENCODERS, **DECODERS})


def package_space(package: Package, folder: Path, repo: str, revision: str) -> Package:
    """Return the package of a page for a captioner that is in `repo` at a revision."""
    return build_space_package(package, space_files(folder, repo, revision))
