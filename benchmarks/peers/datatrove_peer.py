"""Runs datatrove: an `InferenceRunner` with `server_type="endpoint"` in the local executor.

A document is an image with its path as id. The user-defined rollout function reads the image and posts it
with the schema as `response_format`. Checkpoints and the request cache are stored in `--out`, where a second
run resumes.
"""

import argparse
import base64
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

PROMPT = "Write one sentence that names the main things in view."
CONCURRENCY = 256
SCHEMA = {
    "type": "object",
    "properties": {"caption": {"type": "string"}},
    "required": ["caption"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "caption", "schema": SCHEMA, "strict": True}}


async def ask(document: Any, generate: Callable[[dict], Awaitable[Any]]) -> str:
    """Request the caption for one document's image."""
    picture = base64.b64encode(Path(document.text).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
        {"type": "text", "text": PROMPT},
    ]
    result = await generate({"messages": [{"role": "user", "content": content}], "response_format": FORMAT})
    return result.text


def caption(url: str, paths: list[str], out: Path) -> None:
    """Request one caption per image."""
    os.environ |= {"HOME": str(out / "home"), "HF_HUB_OFFLINE": "1"}
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
    from datatrove.pipeline.writers import JsonlWriter

    config = InferenceConfig(
        server_type="endpoint",
        endpoint_url=url.removesuffix("/v1"),  # datatrove adds the path
        model_name_or_path="model",
        max_concurrent_generations=CONCURRENCY,
        default_generation_params={"temperature": 0, "max_tokens": 256},
    )
    runner = InferenceRunner(
        rollout_fn=ask,
        config=config,
        output_writer=JsonlWriter(
            str(out / "captions"), "${rank}_chunk_${chunk_index}.jsonl", compression=None
        ),
        checkpoints_local_dir=str(out / "checkpoints"),
    )
    documents = [Document(text=path, id=Path(path).stem) for path in paths]
    LocalPipelineExecutor(pipeline=[documents, runner], logging_dir=str(out / "logs"), tasks=1).run()
    rows = sum(text.read_bytes().count(b"\n") for text in (out / "captions").glob("*.jsonl"))
    assert rows == len(paths), f"{rows} of {len(paths)} rows came back"


def main() -> None:
    """Parse the arguments and run datatrove."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    paths = [str(path.resolve()) for path in sorted(arguments.images.glob("*.jpg"))[: arguments.rows]]
    caption(arguments.url, paths, arguments.out.resolve())


if __name__ == "__main__":
    main()
