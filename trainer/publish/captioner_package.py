"""Package a captioner for the Hub: the files that transformers loads, and a Space with a demo page."""

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
PROJECT_DIR = HERE.parents[1]
MODULE = "modeling_synth_captioner"
# In published files, copies of these definitions replace the imports from this project.
DEFINITIONS = {
    "pipeline.images.upright": "BAND_PX upright_rgb over_white",
    "trainer.model.decoder": (
        "DecoderConfig TensorPair Seen BlockCache Block Attention attend_apart rope_table apply_rope"
    ),
    "trainer.model.encoder": "BEFORE_PATCHES layer_states choose_states patch_grid",
    "trainer.tokenizer": (
        "ANSWER STYLES preferred_style preferred_source choose_prompt prompt_parts prompt_ids"
    ),
}
# Imports that the copied definitions need, by the module that contains the definitions.
NEEDED_IMPORTS = {
    "trainer.tokenizer": "from collections.abc import Callable\n",
    "pipeline.images.upright": "from PIL import ImageOps\n",
    "trainer.model.decoder": (
        "import math\nfrom dataclasses import dataclass, field\nfrom torch.nn import functional\n"
    ),
}
GRADIO_VERSION = "6.31.0"
SPACE_REQUIREMENTS = "torch\ntransformers>=5.17\npillow\n"
HEADER = "# Written by `synth push`. This file needs torch, transformers and Pillow.\n"


def transformers_files(folder: Path) -> dict[str, bytes]:
    """Return the files that transformers needs to load a checkpoint folder, including config.json, by name.

    Raises TrainError if the folder is not a captioner.
    """
    require_checkpoint(folder)
    try:
        config, tokenizer = read_json(folder / "config.json"), read_json(folder / "tokenizer.json")
        tokens = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
        is_scratch = "language_model" not in config["decoder"]
        pad_id = 0 if is_scratch else config["eos_id"]
        eos_token, pad_token = tokens[config["eos_id"]], tokens[pad_id]
        processor = config["encoder"]["processor"]
        num_beams = int(config["data"].get("num_beams", 1))
    except (KeyError, TypeError, ValueError) as error:
        raise TrainError(
            f"{folder} is not a captioner: {error!r}", hint="pass a folder written by `synth train`"
        ) from None
    values: dict[str, dict[str, Any]] = {
        "config.json": {
            **config,
            "model_type": PUBLISHED_TYPE,
            "architectures": ["SynthCaptioner"],
            "auto_map": {
                "AutoConfig": f"{MODULE}.SynthCaptionerConfig",
                "AutoModelForImageTextToText": f"{MODULE}.SynthCaptioner",
            },
            "dtype": "float32",
        },
        "generation_config.json": {
            "eos_token_id": config["eos_id"],
            "pad_token_id": pad_id,
            "max_new_tokens": config["max_caption_tokens"],
            "do_sample": False,
            **({"num_beams": num_beams, "early_stopping": "never"} if num_beams > 1 else {}),
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


def page_options(prompts: list[tuple[str, str]]) -> tuple[list[str], bool]:
    """Return the styles of a captioner (the default first), and whether it answers questions."""
    default = preferred_style(prompts)
    styles = list(dict.fromkeys([default, *(style for _, style in prompts if style)])) if default else [""]
    return styles, any(not style for _, style in prompts)


def standalone_source(name: str) -> str:
    """Return the source of a module in this folder, with definitions in place of imports from the project."""
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    needed_imports = ""
    for module, names in DEFINITIONS.items():
        for line in [line for line in source.splitlines() if line.startswith(f"from {module} import")]:
            text = (PROJECT_DIR / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            nodes = {_defined_name(node): node for node in ast.parse(text).body}
            definitions = "\n\n\n".join(_source_of(text, nodes[defined]) for defined in names.split())
            source = source.replace(line, f"\n{definitions}\n")
            needed_imports += NEEDED_IMPORTS.get(module, "")
    return source.replace("from typing import Any\n", f"{needed_imports}from typing import Any\n", 1)


def _defined_name(node: ast.stmt) -> str | None:
    named = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(named, "name", None) or getattr(named, "id", None)


def _source_of(text: str, node: ast.stmt) -> str:
    first_line = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
    return "\n".join(text.splitlines()[first_line - 1 : node.end_lineno])


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
