"""Create the additional files that transformers needs to load a checkpoint folder."""

import ast
from pathlib import Path
from typing import Any

from pipeline.storage.files import json_text, read_json
from trainer.runtime.checkpoint_folder import require_checkpoint

PROJECT_DIR = Path(__file__).parents[2]
MODULE = "modeling_synth_captioner"
# The published file contains copies of these definitions instead of imports from this project.
DEFINITIONS = {
    "pipeline.images.upright": "upright_rgb over_white",
    "trainer.model.decoder": (
        "DecoderConfig TensorPair Seen BlockCache CrossAttentionDecoder Block Attention attend attend_apart"
        " rope_table apply_rope"
    ),
    "trainer.model.encoder": "BEFORE_PATCHES choose_states patch_grid tower_options Tower",
    "trainer.prompts": "",  # all definitions
}
# Imports that the copied definitions need, by source module.
NEEDED_IMPORTS = {
    "trainer.prompts": "import re\nfrom collections.abc import Callable\n",
    "pipeline.images.upright": "from PIL import ImageOps\n",
    "trainer.model.decoder": (
        "from collections.abc import Sequence\nfrom dataclasses import dataclass\n"
        "from torch.nn import functional\nfrom transformers.cache_utils import DynamicLayer\n"
    ),
    "trainer.model.encoder": "from transformers import AutoModel\n",
}
# The text of the last user message names the style or contains the question.
CHAT_TEMPLATE = """\
{%- set user = (messages | selectattr("role", "equalto", "user") | list)[-1] -%}
{%- if user.content is string %}{{ user.content }}{% else -%}
{{ user.content | selectattr("type", "equalto", "text") | map(attribute="text") | join("\\n") }}{% endif -%}
"""
HEADER = "# Written by `synth`. This file needs torch, transformers and Pillow.\n"


def transformers_files(folder: Path) -> dict[str, bytes]:
    """Return the files that transformers needs in a checkpoint folder, by name.

    Raises TrainError if the folder lacks a file.
    """
    require_checkpoint(folder)
    config, tokenizer = read_json(folder / "config.json"), read_json(folder / "tokenizer.json")
    tokens = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    is_scratch = "language_model" not in config["decoder"]
    pad_id = 0 if is_scratch else config["eos_id"]
    decoding = dict(config["data"].get("decoding", {}))
    values: dict[str, dict[str, Any]] = {
        "config.json": {
            **config,
            "model_type": "synth_captioner",
            "architectures": ["SynthCaptioner"],
            "auto_map": {
                "AutoConfig": f"{MODULE}.SynthCaptionerConfig",
                "AutoModel": f"{MODULE}.SynthCaptioner",
                "AutoModelForImageTextToText": f"{MODULE}.SynthCaptioner",
            },
            "dtype": "float32",
        },
        "generation_config.json": {
            "eos_token_id": config["eos_id"],
            "pad_token_id": pad_id,
            "max_new_tokens": config["max_caption_tokens"],
            "do_sample": False,
            **decoding,
            **({"early_stopping": "never"} if decoding.get("num_beams", 1) > 1 else {}),
        },
        "preprocessor_config.json": config["encoder"]["processor"],
        "processor_config.json": {
            "processor_class": "SynthCaptionerProcessor",
            "auto_map": {"AutoProcessor": f"{MODULE}.SynthCaptionerProcessor"},
            "prompts": config["prompts"],
            "kind": "scratch" if is_scratch else "pretrained",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokens[config["eos_id"]],
            "pad_token": tokens[pad_id],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    }
    files = {name: json_text(value).encode() for name, value in values.items()}
    files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    return files | {f"{MODULE}.py": (HEADER + standalone_source()).encode()}


def standalone_source() -> str:
    """Return the source of transformers_model.py with all imported definitions copied into it."""
    source = Path(__file__).with_name("transformers_model.py").read_text(encoding="utf-8")
    needed_imports = ""
    for module, names in DEFINITIONS.items():
        (line,) = [line for line in source.splitlines() if line.startswith(f"from {module} import")]
        text = (PROJECT_DIR / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        nodes = {key: node for node in ast.parse(text).body if (key := _defined_name(node))}
        definitions = "\n\n\n".join(_source_of(text, nodes[key]) for key in names.split() or nodes)
        source = source.replace(line, f"\n{definitions}\n")
        needed_imports += NEEDED_IMPORTS.get(module, "")
    return source.replace("from typing import Any\n", f"{needed_imports}from typing import Any\n", 1)


def _defined_name(node: ast.stmt) -> str | None:
    named = node.targets[0] if isinstance(node, ast.Assign) else node
    return getattr(named, "name", None) or getattr(named, "id", None)


def _source_of(text: str, node: ast.stmt) -> str:
    first_line = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
    return "\n".join(text.splitlines()[first_line - 1 : node.end_lineno])
