"""What is asked of one image, and the name of each request: a digest of everything that its reply depends on."""

import hashlib
from collections.abc import Iterable, Iterator

from pipeline.config import Config
from pipeline.fingerprint import digest
from pipeline.generate.prompt import Prompt, prompt_id, render
from pipeline.schema import wire_schema
from pipeline.types import Request, Sampling


def build_requests(sample_id: str, image: bytes, config: Config, revision: str) -> Iterator[Request]:
    """Yield the requests for one image, in the order of the config's tasks and styles."""
    for task in config.tasks:
        for style in config.generate.caption_styles if task == "caption" else ("",):
            temperature = config.generate.caption_temperature if task == "caption" else config.generate.qa_temperature
            prompt = render(task, style=style)
            sampling = Sampling(temperature=temperature, max_tokens=config.generate.max_tokens)
            yield Request(
                id=_request_id(sample_id, task, prompt, sampling, revision, config.seed),
                sample_id=sample_id,
                task=task,
                style=style,
                prompt_id=prompt.id,
                system=prompt.system,
                text=prompt.text,
                image=image,
                sampling=sampling,
            )


def prompt_ids(tasks: Iterable[str]) -> list[str]:
    """Return the ids of the prompts that the tasks use, as annotations name them."""
    return [prompt_id(task) for task in tasks]


def _request_id(sample_id: str, task: str, prompt: Prompt, sampling: Sampling, revision: str, seed: int) -> str:
    asked = {
        "image": sample_id,
        "prompt": hashlib.sha256(f"{prompt.system}\0{prompt.text}".encode()).hexdigest(),
        "schema": wire_schema(task),
        "model": revision,  # not its name: equal weights give equal replies
        "sampling": [sampling.temperature, sampling.max_tokens],
    }
    # A greedy reply does not depend on the seed: another seed must not pay for it again.
    return digest(asked | ({"seed": seed} if sampling.temperature > 0 else {}))
