"""Drives bespokelabs-curator: `curator.LLM` on its online OpenAI backend with a base URL, as in its multimodal guide.

Images go in by path and the schema is its `response_format`. Its working directory under `--out` keeps every response, and a
second run asks only what is missing there.
"""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

PROMPT = "Write one sentence that names the main things in view."
CONCURRENCY = 256
NO_LIMIT = 1_000_000_000


def caption(url: str, paths: list[str], out: Path) -> None:
    """Ask for one caption of each image."""
    os.environ |= {
        "HOME": str(out / "home"),
        "HF_HOME": str(out / "huggingface"),
        "CURATOR_DISABLE_RICH_DISPLAY": "1",
        "TELEMETRY_ENABLED": "false",
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    import tiktoken
    from bespokelabs import curator
    from bespokelabs.curator.request_processor.online.openai_online_request_processor import OpenAIOnlineRequestProcessor
    from datasets import Dataset
    from pydantic import BaseModel

    # Without network it fails when it is made, as it downloads a vocabulary. It only counts tokens with it, for rate limits
    # that are off here.
    tiktoken.get_encoding = lambda _: SimpleNamespace(encode=lambda text, **_: text.split())
    # Before the rows it posts a request without messages, to read rate limits from the reply's headers, and one whose schema
    # the mock endpoint cannot know, to see whether schemas are obeyed. The endpoint would count both as rows.
    OpenAIOnlineRequestProcessor.get_header_based_rate_limits = lambda self: (NO_LIMIT, NO_LIMIT)
    OpenAIOnlineRequestProcessor.check_structured_output_support = lambda self: True

    class Caption(BaseModel):
        caption: str

    class Captioner(curator.LLM):
        response_format = Caption

        def prompt(self, input: dict) -> tuple:  # noqa: A002 - the name that curator's documentation gives it
            return PROMPT, curator.types.Image(url=input["image"])

        def parse(self, input: dict, response: Caption) -> dict:  # noqa: A002
            return {"image": input["image"], "caption": response.caption}

    captioner = Captioner(
        model_name="model",
        backend="openai",
        generation_params={"temperature": 0, "max_tokens": 256},
        backend_params={
            "base_url": url,
            "api_key": "none",
            "max_concurrent_requests": CONCURRENCY,
            "max_requests_per_minute": NO_LIMIT,
            "max_tokens_per_minute": NO_LIMIT,
        },
    )
    rows = captioner(Dataset.from_list([{"image": path} for path in paths]), working_dir=str(out / "curator")).dataset
    assert len(rows) == len(paths), f"{len(rows)} of {len(paths)} rows came back"


def main() -> None:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    paths = [str(path.resolve()) for path in sorted(arguments.images.glob("*.jpg"))[: arguments.rows]]
    caption(arguments.url, paths, arguments.out.resolve())


if __name__ == "__main__":
    main()
