"""Build the requests about one image; the id of a request is a digest of everything that its reply depends on."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.config import Config
from pipeline.config.sections import ANY_LANGUAGE, GenerateConfig
from pipeline.digests import digest
from pipeline.errors import ConfigError, did_you_mean
from pipeline.tasks import TASKS, find_task, tasks_making, wire_schema
from pipeline.tasks.base import Task
from pipeline.tasks.checks import ANSWER, CHECKING, CLAIMS, COVERS, RATE, REPAIR
from pipeline.tasks.own import build_task
from pipeline.tasks.prompts import DRAWS, Results, check_names, check_prompt_dir, render
from pipeline.text.language_codes import language_name
from pipeline.types import Context, Reply, Request, SampleBatch, Sampling, SourceTexts

NO_RESULTS: Mapping[str, str] = MappingProxyType({})
RETRY_TEMPERATURE_STEP = 0.5  # added to the temperature at each retry, up to 1: equal sampling may give an equal reply
FEEDBACK = "That reply cannot be used ({flaw}). Reply again, exactly as told above.\n{task_line}"


def build_requests(
    sample_id: str,
    config: Config,
    revision: str,
    context: Context = (),
    results: Mapping[str, str] = NO_RESULTS,
    asked: Sequence[tuple[str, str]] | None = None,
) -> Iterator[Request]:
    """Yield the requests for one sample, in the order of the config's tasks and styles, or of those that are `asked` alone.

    They are without images: see `with_images`.

    Prompts may use its `context`, and `results` of other tasks (JSON by name). A task is left out if what it needs is missing,
    or its prompt cannot be rendered with it. Several captions to choose from are several requests (`count_replies`).
    """
    row = {"row": tuple(map(tuple, context))} if context else {}
    for name, style in requests_per_sample(config) if asked is None else asked:
        task = find_task(name, config.own_tasks)
        if any(need not in results for need in task.needs):
            continue
        used = {"results": tuple((need, results[need]) for need in task.needs)} if task.needs else {}
        generate = with_max_tokens(config.generate, task.max_tokens) if task.max_tokens else config.generate
        values = row | used | _values_of(sample_id, config, task)
        temperature = task.temperature(config.generate)
        for number in range(count_replies(task, config.generate)):
            of_number = {} if number == 0 else {"number": number}
            if number:
                temperature = max(temperature, config.generate.sample_temperature)
            try:
                fields, about = shared_fields(
                    task, temperature, config.prompt_dirs, generate, config.seed, revision, style=style, **values
                )
            except ConfigError:
                if not task.needs:
                    raise
                break  # this result does not fit the prompt, which was tried with others
            without_image: dict[str, Any] = {} if task.shows_image else {"pages": ()}
            request_id = digest({"image": sample_id, "about": about} | without_image | of_number)
            yield Request(id=request_id, sample_id=sample_id, style=style, **without_image, **fields)


def with_images(requests: Sequence[Request], batch: SampleBatch) -> list[Request]:
    """Return requests about samples of a batch with the images that they show; without any, none are read."""
    if not any(request.shows_image for request in requests):
        return list(requests)
    images_of = dict(zip(batch.ids, batch.read_images(), strict=True))
    return [replace(one, images=one.pages_of(images_of[one.sample_id])) if one.shows_image else one for one in requests]


def count_replies(task: Task, generate: GenerateConfig) -> int:
    """Return how many replies a task gets about an image: one, or as many captions as are wanted to choose from."""
    return generate.samples if task.text_field and not task.rows_field else 1


def count_requests(config: Config, asked: Sequence[tuple[str, str]]) -> int:
    """Return the number of requests about one sample that is asked these (task, style) pairs."""
    return sum(count_replies(find_task(name, config.own_tasks), config.generate) for name, _ in asked)


@lru_cache(64)
def with_max_tokens(generate: GenerateConfig, max_tokens: int) -> GenerateConfig:
    """Return the settings with another limit of tokens."""
    return generate.model_copy(update={"max_tokens": max_tokens})


def _values_of(sample_id: str, config: Config, task: Task) -> dict[str, Any]:
    """Return the values of templates that depend on the image, so that wordings and question types are spread over images."""
    code = task.language or config.filter.language
    language = language_name(None if code == ANY_LANGUAGE else code)
    return {"draw": int(sample_id[:8], 16) % DRAWS, "words": config.generate.caption_words, "language": language}


def check_prompts(config: Config) -> None:
    """Render every prompt once: a broken template is a ConfigError before anything is written."""
    if config.generate.prompt_dir:
        asked = [find_task(name, config.own_tasks) for name in config.tasks]
        check_prompt_dir(config.generate.prompt_dir, [*asked, *(CHECKING if config.verify.is_asked else ())])
    folders, own = config.prompt_dirs, config.generate.style_prompts
    context = tuple((name, "") for name in config.context)
    check_needs(config)
    replies = [count_replies(find_task(name, config.own_tasks), config.generate) for name in config.tasks]
    if config.generate.samples > 1 and max(replies, default=1) == 1:
        raise ConfigError("no captions are asked for of which the best could be chosen", hint="leave --samples out")
    for name, style in requests_per_sample(config):
        task = find_task(name, config.own_tasks)
        check_names(task, folders, config.context, own, style)
        for nulls in (False, True):  # a result may lack what is not required
            render(task, folders, context, own, _results_to_try(config, task, nulls=nulls), style=style)
    if config.verify.is_asked:
        render(ANSWER, folders, question="?")
        render(CLAIMS, folders, caption="")
        render(COVERS, folders, caption="", question="?")
        render(RATE, folders, caption="", question="?", answer="")
        render(REPAIR, folders, caption="", answers=())


def requests_per_sample(config: Config) -> tuple[tuple[str, str], ...]:
    """Return the (task, style) pairs of the requests about every sample, in order; most tasks have the style ""."""
    return tuple((name, style) for name in config.tasks for style in _styles_of(config, name))


def requests_about(config: Config, texts: SourceTexts) -> tuple[tuple[str, str], ...]:
    """Return the (task, style) pairs of the requests about a sample, in order.

    Where the model only fills what is missing, an image with a caption is not captioned, and one with a question is not asked
    about. Captions that a task of the user's own needs are asked for in any case.
    """
    asked = requests_per_sample(config)
    if config.human_texts != "fill":
        return asked
    needed = {need for task in config.own_tasks for need in task.needs}
    done = tasks_making("captions") if texts.has_captions else frozenset[str]()
    done |= tasks_making("questions") if texts.has_questions else frozenset()
    return tuple(pair for pair in asked if pair[0] not in done or result_name(*pair) in needed)


def _styles_of(config: Config, name: str) -> tuple[str, ...]:
    if find_task(name, config.own_tasks).has_styles:
        return config.generate.caption_styles
    own = next((task for task in config.own_tasks if task.name == name), None)
    return (own.name.replace("_", "-"),) if own and own.kind == "caption" else ("",)


def result_name(name: str, style: str) -> str:
    """Return the name by which other tasks need the result of a request: that of the task, or of the style of a caption."""
    return style if TASKS.get(name) and TASKS[name].has_styles else name


def rounds(config: Config) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Return the (task, style) pairs in the rounds in which they are asked: a task follows those whose results it needs.

    Raises ConfigError if tasks need each other in a circle.
    """
    waiting, done = [*requests_per_sample(config)], set[str]()
    in_order = []
    while waiting:
        ready = tuple(pair for pair in waiting if done.issuperset(find_task(pair[0], config.own_tasks).needs))
        if not ready:
            names = ", ".join(name for name, _ in waiting)
            raise ConfigError(f"tasks need each other in a circle: {names}", hint="take one of their needs out")
        in_order.append(ready)
        done |= {result_name(*pair) for pair in ready}
        waiting = [pair for pair in waiting if pair not in ready]
    return tuple(in_order)


def check_needs(config: Config) -> None:
    """Build the user's own tasks. Raise ConfigError if one cannot be used, or needs a result that no other task gives."""
    given = {result_name(*pair) for pair in requests_per_sample(config)}
    for task in config.own_tasks:
        if task.name in TASKS or {task.name, task.name.replace("_", "-")} & {*config.generate.caption_styles}:
            raise ConfigError(
                f"{task.name} is the name of a built-in task or of a caption style", hint="give your task another"
            )
        if not task.show_image and not task.needs and not config.context:
            hint = "needs names tasks whose results the prompt uses; --columns context=NAME columns of the source"
            raise ConfigError(f"the task {task.name} shows no image and nothing else of it", hint=hint)
        for need in build_task(task).needs:
            if need not in given:
                names = sorted(given - {task.name})
                asked = f"asked are {', '.join(names)}; " if names else ""
                hint = did_you_mean(need, names) or f"{asked}built-in ones are asked with --tasks caption"
                raise ConfigError(f"the task {task.name} needs {need}, which is not asked", hint=hint)
    rounds(config)


def _results_to_try(config: Config, task: Task, *, nulls: bool) -> Results:
    """Return results without content, with which a template is tried before anything is asked."""
    own = {settings.name: build_task(settings).empty_result(nulls=nulls) for settings in config.own_tasks}
    lists = {name for name in TASKS if TASKS[name].rows_field}
    return [(need, json.dumps(own.get(need, [] if need in lists else ""))) for need in task.needs]


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
    task: Task,
    temperature: float,
    prompt_dirs: tuple[Path, ...],
    generate: GenerateConfig,
    seed: int,
    revision: str,
    **values: Any,
) -> tuple[dict[str, Any], str]:
    """Return the fields of a request that all images share, and a digest of all that a reply depends on, except the images.

    `values` are those of the prompt's template. Never rename the keys of the digest: replies would be paid again.
    """
    prompt = render(task, prompt_dirs, own_styles=generate.style_prompts, **values)
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
    fields = {
        "task": task.name,
        "prompt_id": prompt.id,
        "system": prompt.system,
        "text": prompt.text,
        "schema": _schema_text(task),
        "sampling": sampling,
    }
    return fields, digest(identity)


@cache
def _schema_text(task: Task) -> str:
    return json.dumps(wire_schema(task))
