"""Drives distilabel: `LoadDataFromDicts >> TextGenerationWithImage` over an `OpenAILLM` with a base URL, as its example does.

Images go in as base64, as it takes no paths, in batches of as many rows as it may ask at once. The schema goes along as a
`response_format` in the LLM's `extra_body`. The pipeline's cache lies under `--out`; a second run should resume there, and
after a kill was seen to wait for ever (distilabel issue 1065).
"""

import argparse
import base64
import os
from pathlib import Path

PROMPT = "Write one sentence that names the main things in view."
CONCURRENCY = 256
SCHEMA = {
    "type": "object",
    "properties": {"caption": {"type": "string"}},
    "required": ["caption"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "caption", "schema": SCHEMA, "strict": True}}


def caption(url: str, paths: list[Path], out: Path) -> None:
    """Ask for one caption of each image."""
    os.environ |= {
        "HOME": str(out / "home"),
        "HF_HOME": str(out / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "DISTILABEL_LOG_LEVEL": "WARNING",  # at its default, a line for each request is formatted and written
    }
    from distilabel.models.llms import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGenerationWithImage

    rows = [{"instruction": PROMPT, "image": base64.b64encode(path.read_bytes()).decode()} for path in paths]
    with Pipeline(name="captions", cache_dir=out / "pipelines") as pipeline:
        llm = OpenAILLM(
            model="model",
            base_url=url,
            api_key="none",
            timeout=600,
            # Its `structured_output` can only ask for tool calls (setting another mode fails, as it turns the mode into a
            # string), and its `response_format` takes no nested values.
            generation_kwargs={"temperature": 0, "max_new_tokens": 256, "extra_body": {"response_format": FORMAT}},
        )
        task = TextGenerationWithImage(
            llm=llm,
            image_type="base64",
            input_batch_size=CONCURRENCY,
            # Otherwise it keeps one more copy of every image.
            add_raw_input=False,
            add_raw_output=False,
        )
        LoadDataFromDicts(data=rows, batch_size=CONCURRENCY) >> task
    found = pipeline.run(use_cache=True)["default"]["train"]["generation"]
    # It fills the rows of a failed batch with None, and goes on.
    kept = sum(generation is not None for generation in found)
    assert kept == len(paths), f"{kept} of {len(paths)} rows came back"


def main() -> None:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    caption(arguments.url, sorted(arguments.images.glob("*.jpg"))[: arguments.rows], arguments.out.resolve())


if __name__ == "__main__":
    main()
