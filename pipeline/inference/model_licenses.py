"""Licenses of models by name, as their model cards state them."""

import re

NO_COMMERCIAL_USE = "no commercial use"
UNKNOWN_LICENSE = "license unknown: read its model card"
# Parts of a name that change neither the origin nor the license of the weights, such as -8B-Instruct-FP8.
_VARIANT = r"([-_:.](\d+b|a\d+b|instruct|thinking|latest|awq|gptq|fp8|bf16|int[48]|[48]bit|q\d\w*|gguf))*"
# Licenses by pattern, for lower-case model names without the organization. A license that forbids a use also
# binds fine-tuned copies, so its pattern matches them too. Other licenses are not assumed for copies.
LICENSES = {
    r".*qwen2[._]?5[-_]?vl[-_:]?3b.*": f"Qwen Research License: {NO_COMMERCIAL_USE}",
    rf"qwen2[._]?5[-_]?vl[-_:]?7b{_VARIANT}": "Apache-2.0",
    rf"qwen3[-_]?vl{_VARIANT}": "Apache-2.0",
    "tiny": "Apache-2.0",
}


def license_of(model: str) -> str:
    """Return the license of a model, given by folder, Hub id or served name, or UNKNOWN_LICENSE."""
    name = model.casefold().rstrip("/").rpartition("/")[2].partition("@")[0]
    known = (text for pattern, text in LICENSES.items() if re.fullmatch(pattern, name))
    return next(known, UNKNOWN_LICENSE)
