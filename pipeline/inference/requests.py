"""Build the requests about one image; the id of a request is a digest of everything that its reply depends on."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from pipeline.config import Config, GenerateConfig
from pipeline.digests import digest
from pipeline.tasks import ANSWER, CHECKING, CLAIMS, COVERS, RATE, REPAIR, find_task, wire_schema
from pipeline.tasks.prompts import DRAWS, check_context, check_prompt_dir, render
from pipeline.text.language import language_name
from pipeline.types import Context, Reply, Request, Sampling

RETRY_TEMPERATURE_STEP = 0.5  # added to the temperature at each retry, up to 1: equal sampling may give an equal reply
FEEDBACK = "That reply cannot be used ({flaw}). Reply again, exactly as told above.\n{task_line}"


def build_requests(
    sample_id: str, images: tuple[bytes, ...], config: Config, revision: str, context: Context = ()
) -> Iterator[Request]:
    """Yield the requests for one sample, in the order of the config's tasks and styles. Prompts may use its `context`."""
    row = {"row": tuple(map(tuple, context))} if context else {}
    for task, style in requests_per_sample(config):
        temperature: float = getattr(config.generate, find_task(task).temperature_key)
        fields, shared_digest = shared_fields(
            task, temperature, config.generate, config.seed, revision, style=style, **row, **_values_of(sample_id, config)
        )
        request_id = digest({"image": sample_id, "about": shared_digest})
        yield Request(id=request_id, sample_id=sample_id, style=style, images=images, **fields)


def _values_of(sample_id: str, config: Config) -> dict[str, Any]:
    """Return the values of templates that depend on the image, so that wordings and question types are spread over images."""
    language = language_name(config.filter.language)
    return {"draw": int(sample_id[:8], 16) % DRAWS, "words": config.generate.caption_words, "language": language}


def check_prompts(config: Config) -> None:
    """Render every prompt once: a broken template is a ConfigError before anything is written."""
    if config.generate.prompt_dir:
        check_prompt_dir(config.generate.prompt_dir, (*config.tasks, *(CHECKING if config.verify.is_asked else ())))
    folder, version, own = config.generate.prompt_dir, config.generate.prompt_version, config.generate.style_prompts
    context = tuple((name, "") for name in config.context)
    for task, style in requests_per_sample(config):
        check_context(task, folder, version, config.context, own, style)
        render(task, folder, version, context, own, style=style)
    if config.verify.is_asked:
        render(ANSWER, folder, version, question="?")
        render(CLAIMS, folder, version, caption="")
        render(COVERS, folder, version, caption="", question="?")
        render(RATE, folder, version, caption="", question="?", answer="")
        render(REPAIR, folder, version, caption="", answers=())


def requests_per_sample(config: Config) -> tuple[tuple[str, str], ...]:
    """Return the (task, style) pairs of the requests about every sample, in order; most tasks have the style ""."""
    styles = {name: config.generate.caption_styles if find_task(name).has_styles else ("",) for name in config.tasks}
    return tuple((name, style) for name in config.tasks for style in styles[name])


def build_retry(request: Request, reply: Reply, flaw: str) -> Request:
    """Return the next attempt after an unusable reply: at a higher temperature, the first retry with twice the tokens,
    later ones with the last reply and its flaw shown to the model, unless that reply was cut off (it may be endless).
    """
    attempt = reply.attempt + 1
    steps = attempt - request.attempt  # more than one if the run resumes from the journal
    warmest = max(request.sampling.temperature, 1.0)
    sampling = Sampling(
        temperature=min(request.sampling.temperature + RETRY_TEMPERATURE_STEP * steps, warmest),
        max_tokens=request.sampling.max_tokens * (2 if request.attempt == 0 else 1),
    )
    show = attempt > 1 and reply.finish_reason == "stop"
    feedback = FEEDBACK.format(flaw=flaw.replace("_", " "), task_line=request.text.splitlines()[-1])
    return replace(request, attempt=attempt, sampling=sampling, failed=(reply.text, feedback) if show else None)


@lru_cache(maxsize=1 << 14)  # of `answer`, a prompt for each question
def shared_fields(
    task: str, temperature: float, generate: GenerateConfig, seed: int, revision: str, **values: Any
) -> tuple[dict[str, Any], str]:
    """Return the fields of a request that all images share, and a digest of all that a reply depends on, except the images.

    `values` are those of the prompt's template. Never rename the keys of the digest: replies would be paid again.
    """
    prompt = render(task, generate.prompt_dir, generate.prompt_version, own=generate.style_prompts, **values)
    sampling = Sampling(temperature=temperature, max_tokens=generate.max_tokens)
    identity = {
        "prompt": hashlib.sha256(f"{prompt.system}\0{prompt.text}".encode()).hexdigest(),
        "schema": wire_schema(task),
        "model": revision,  # not its name: equal weights give equal replies
        "sampling": [temperature, generate.max_tokens],
        "max_pixels": generate.max_pixels,
    }
    # A greedy reply does not depend on the seed: another seed must not pay for it again.
    identity |= {"seed": seed} if temperature > 0 else {}
    fields = {"task": task, "prompt_id": prompt.id, "system": prompt.system, "text": prompt.text, "sampling": sampling}
    return fields, digest(identity)
