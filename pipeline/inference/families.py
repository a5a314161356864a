"""What is known of vision-language models that can be asked: their licenses, how they see an image, how they write boxes.

From the models' own cards, configs and papers. What a photo costs is checked by test: by transformers' image processors
with the limits stated here, and for Gemma 3, Pixtral and LLaVA-OneVision by their rules. A server may set other limits, and a
model that is not listed may be asked as well.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.sections import BoxUnit

PHOTO_PX = (640, 480)  # of the photo whose tokens are given


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Models of one architecture, in several sizes."""

    name: str
    pattern: str  # of the names of its models, in small letters and without an organization
    models: tuple[str, ...]  # ids on the Hub
    license: str
    image: str  # how an image becomes tokens, and the limits
    photo_tokens: int  # of a photo of PHOTO_PX
    boxes: BoxUnit | None  # how it writes the corners of boxes; None: it was not trained to, or does not say
    source: str  # where this is from

    def describe(self) -> dict[str, Any]:
        """Return what is known, by name."""
        return {name: value for name, value in asdict(self).items() if name != "pattern"}


FAMILIES = (
    ModelFamily(
        name="Qwen2.5-VL",
        pattern=r"qwen2[._]?5[-_]?vl",
        models=tuple(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")),
        license="3B: Qwen Research License, for no commercial use; 7B, 32B: apache-2.0; 72B: Qwen License",
        image="a token for 28 x 28 px, 4 to 16,384 of them; larger images are scaled down",
        photo_tokens=391,
        boxes="pixels",
        source="arXiv:2502.13923",
    ),
    ModelFamily(
        name="Qwen3-VL",
        pattern=r"qwen3[-_]?vl",
        models=tuple(f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B", "32B")),
        license="apache-2.0",
        image="a token for 32 x 32 px, 64 to 16,384 of them; larger images are scaled down",
        photo_tokens=300,
        boxes="thousandths",
        source="github.com/QwenLM/Qwen3-VL",
    ),
    ModelFamily(
        name="InternVL3",
        pattern=r"internvl[-_]?3(?![._]?5)",
        models=tuple(f"OpenGVLab/InternVL3-{size}-hf" for size in ("1B", "2B", "8B", "14B")),
        license="the code MIT; the language model inside is Qwen2.5, whose license counts",
        image="1 to 12 tiles of 448 x 448 px by the shape of the image, and one of all of it; 256 tokens a tile",
        photo_tokens=3328,
        boxes="thousandths",
        source="internvl.readthedocs.io",
    ),
    ModelFamily(
        name="SmolVLM small",
        pattern=r"smolvlm2?-(256m|500m)",
        models=tuple(f"HuggingFaceTB/SmolVLM-{size}-Instruct" for size in ("256M", "500M")),
        license="apache-2.0",
        image="the longer side becomes 2,048 px, tiles of 512 px with 64 tokens each, and one of all of it",
        photo_tokens=832,
        boxes=None,
        source="arXiv:2504.05299",
    ),
    ModelFamily(
        name="SmolVLM 2.2B",
        pattern=r"smolvlm2?-(2\.2b|instruct)",
        models=("HuggingFaceTB/SmolVLM-Instruct", "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
        license="apache-2.0",
        image="the longer side becomes 1,536 px, tiles of 384 px with 81 tokens each, and one of all of it",
        photo_tokens=1053,
        boxes=None,
        source="arXiv:2504.05299",
    ),
    ModelFamily(
        name="Idefics3",
        pattern=r"idefics3",
        models=("HuggingFaceM4/Idefics3-8B-Llama3",),
        license="apache-2.0; the language model inside is Llama 3.1, whose license counts",
        image="the longer side becomes 1,456 px, tiles of 364 px with 169 tokens each",
        photo_tokens=2197,
        boxes=None,
        source="arXiv:2408.12637",
    ),
    ModelFamily(
        name="Gemma 3",
        pattern=r"(?<![a-z])gemma-?3[-:](4b|12b|27b)",
        models=tuple(f"google/gemma-3-{size}-it" for size in ("4b", "12b", "27b")),
        license="Gemma Terms of Use",
        image="all of it as 896 x 896 px, 256 tokens",
        photo_tokens=256,
        boxes=None,
        source="ai.google.dev/gemma/docs/capabilities/vision",
    ),
    ModelFamily(
        name="Gemma 4",
        pattern=r"(?<![a-z])gemma-?4[-:](e2b|e4b|26b|31b)",
        models=("google/gemma-4-E2B-it", "google/gemma-4-E4B-it", "google/gemma-4-26B-A4B-it", "google/gemma-4-31B-it"),
        license="apache-2.0",
        image="a token for 48 x 48 px, after scaling to at most 280 of them; the server may set 70 to 1,120",
        photo_tokens=266,
        boxes=None,
        source="ai.google.dev/gemma/docs/capabilities/vision",
    ),
    ModelFamily(
        name="LLaVA-OneVision",
        pattern=r"llava[-_]onevision-qwen2-(0\.5b|7b)",
        models=("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        license="apache-2.0",
        image="tiles of 384 x 384 px, up to 6 x 6, and one of all of it; 729 tokens a tile, thinned out above nine tiles",
        photo_tokens=2929,
        boxes=None,
        source="arXiv:2408.03326",
    ),
    ModelFamily(
        name="Pixtral",
        pattern=r"(?<![a-z])pixtral-12b",
        models=("mistral-community/pixtral-12b",),
        license="apache-2.0",
        image="a token for 16 x 16 px, and one a row; the longer side at most 1,024 px",
        photo_tokens=1230,
        boxes=None,
        source="arXiv:2410.07073",
    ),
)


def find_family(model: str) -> ModelFamily | None:
    """Return the family of a model by its name, such as that of a server; None if it is not known."""
    name = model.casefold().rstrip("/").rpartition("/")[2]
    return next((family for family in FAMILIES if re.search(family.pattern, name)), None)
