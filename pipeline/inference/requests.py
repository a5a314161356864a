"""Build the requests about one image; the id of a request is a digest of everything that its reply depends on."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.config import Config
from pipeline.config.sections import ANY_LANGUAGE, GenerateConfig
from pipeline.digests import digest
from pipeline.errors import ConfigError, did_you_mean
from pipeline.tasks import TASKS, Tasks, tasks_making, wire_schema
from pipeline.tasks.base import Task
from pipeline.tasks.checks import ANSWER, CHECKING, CLAIMS, COVERS, RATE, REPAIR
from pipeline.tasks.own import OwnTask
from pipeline.tasks.prompts import DRAWS, Results, check_names, check_prompt_dir, prompt_texts, render
from pipeline.text.language_codes import language_name
from pipeline.types import Context, Reply, Request, SampleBatch, Sampling, SourceTexts

NO_RESULTS: Mapping[str, str] = MappingProxyType({})
RETRY_TEMPERATURE_STEP = 0.5  # added to the temperature at each retry, up to 1: equal sampling may give an equal reply
FEEDBACK = "That reply cannot be used ({flaw}). Reply again, exactly as told above.\n{task_line}"
FILTER_KEYS = ("min_words", "max_words")  # settings of an own task that the step filter reads, and no request
Pair = tuple[str, str]  # a task and a style; most tasks have the style ""


@dataclass(frozen=True)
class RequestPlan:
    """What a model is asked about every image, and all that the replies depend on, resolved once from the settings."""

    tasks: Tasks
    generate: GenerateConfig
    prompt_dirs: tuple[Path, ...]
    context: tuple[str, ...]  # columns of the source that prompts may use
    language: str | None  # of the texts
    seed: int
    is_filling: bool  # asks only for what people have not written about an image
    revision: str  # of the model

    @classmethod
    def of(cls, config: Config, tasks: Tasks, revision: str) -> "RequestPlan":
        """Resolve the settings of a run."""
        fills = config.human_texts == "fill"
        return cls(
            tasks, config.generate, config.prompt_dirs, config.context, config.filter.language, config.seed, fills, revision
        )

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The (task, style) pairs of the requests about every sample, in order."""
        return tuple((task.name, style) for task in self.tasks.asked for style in self._styles_of(task))

    @cached_property
    def needed(self) -> frozenset[str]:
        """The names of results that own tasks need."""
        return frozenset(need for task in self.tasks.own for need in task.needs)

    @cached_property
    def rounds(self) -> tuple[tuple[Pair, ...], ...]:
        """The pairs in the rounds in which they are asked: a task follows those whose results it needs.

        Raises ConfigError if tasks need each other in a circle.
        """
        waiting, done = [*self.pairs], set[str]()
        in_order = []
        while waiting:
            ready = tuple(pair for pair in waiting if done.issuperset(self.tasks[pair[0]].needs))
            if not ready:
                names = ", ".join(name for name, _ in waiting)
                raise ConfigError(f"tasks need each other in a circle: {names}", hint="take one of their needs out")
            in_order.append(ready)
            done |= {result_name(*pair) for pair in ready}
            waiting = [pair for pair in waiting if pair not in ready]
        return tuple(in_order)

    def describe(self, *checks: Task) -> list[Any]:
        """Return everything that the replies about an image depend on, except the image; with the prompts of `checks`."""
        prompts = prompt_texts([*self.tasks.asked, *checks], self.prompt_dirs, self.generate.style_prompts)
        values = [self.context, self.language, self.seed, self.is_filling, self.revision]
        return [self.tasks.describe(FILTER_KEYS), self.generate.model_dump(mode="json"), prompts, values]

    def wanted(self, texts: SourceTexts) -> tuple[Pair, ...]:
        """Return the (task, style) pairs of the requests about a sample, in order.

        Where the model only fills what is missing, an image with a caption is not captioned, and one with a question is not
        asked about. Captions that a task of the user's own needs are asked for in any case.
        """
        if not self.is_filling:
            return self.pairs
        done = tasks_making("captions") if texts.has_captions else frozenset[str]()
        done |= tasks_making("questions") if texts.has_questions else frozenset()
        return tuple(pair for pair in self.pairs if pair[0] not in done or result_name(*pair) in self.needed)

    def count_replies(self, task: Task) -> int:
        """Return how many replies a task gets about an image: one, or as many captions as are wanted to choose from."""
        return self.generate.samples if task.text_field and not task.rows_field else 1

    def count(self, pairs: Sequence[Pair]) -> int:
        """Return the number of requests about one sample that is asked these (task, style) pairs."""
        return sum(self.count_replies(self.tasks[name]) for name, _ in pairs)

    def fields(
        self, task: Task, temperature: float = 0.0, max_tokens: int | None = None, **values: Any
    ) -> tuple[dict[str, Any], str]:
        """Return what all requests share that ask a task with these `values` of its template; see `shared_fields`."""
        generate = with_max_tokens(self.generate, max_tokens) if max_tokens else self.generate
        return shared_fields(task, temperature, self.prompt_dirs, generate, self.seed, self.revision, **values)

    def _styles_of(self, task: Task) -> tuple[str, ...]:
        if task.has_styles:
            return self.generate.caption_styles
        is_caption = isinstance(task, OwnTask) and task.settings.kind == "caption"
        return (task.name.replace("_", "-"),) if is_caption else ("",)


def build_requests(
    sample_id: str,
    plan: RequestPlan,
    context: Context = (),
    results: Mapping[str, str] = NO_RESULTS,
    asked: Sequence[Pair] | None = None,
) -> Iterator[Request]:
    """Yield the requests about one sample, in the order of tasks and styles, or of those that are `asked` alone.

    They are without images: see `with_images`.

    Prompts may use its `context`, and `results` of other tasks (JSON by name). A task is left out if what it needs is missing,
    or its prompt cannot be rendered with it. Several captions to choose from are several requests.
    """
    row = {"row": tuple(map(tuple, context))} if context else {}
    for name, style in plan.pairs if asked is None else asked:
        task = plan.tasks[name]
        if any(need not in results for need in task.needs):
            continue
        used = {"results": tuple((need, results[need]) for need in task.needs)} if task.needs else {}
        values = row | used | _values_of(sample_id, plan, task)
        temperature = task.temperature(plan.generate)
        for number in range(plan.count_replies(task)):
            of_number = {} if number == 0 else {"number": number}
            if number:
                temperature = max(temperature, plan.generate.sample_temperature)
            try:
                fields, about = plan.fields(task, temperature, task.max_tokens, style=style, **values)
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


@lru_cache(64)
def with_max_tokens(generate: GenerateConfig, max_tokens: int) -> GenerateConfig:
    """Return the settings with another limit of tokens."""
    return generate.model_copy(update={"max_tokens": max_tokens})


def _values_of(sample_id: str, plan: RequestPlan, task: Task) -> dict[str, Any]:
    """Return the values of templates that depend on the image, so that wordings and question types are spread over images."""
    code = task.language or plan.language
    language = language_name(None if code == ANY_LANGUAGE else code)
    return {"draw": int(sample_id[:8], 16) % DRAWS, "words": plan.generate.caption_words, "language": language}


def check_prompts(plan: RequestPlan, *, has_checks: bool) -> None:
    """Render every prompt once, also those of checks if the run `has_checks`: a broken template is a ConfigError."""
    if plan.generate.prompt_dir:
        check_prompt_dir(plan.generate.prompt_dir, [*plan.tasks.asked, *(CHECKING if has_checks else ())])
    folders, own = plan.prompt_dirs, plan.generate.style_prompts
    context = tuple((name, "") for name in plan.context)
    check_needs(plan)
    if plan.generate.samples > 1 and max(map(plan.count_replies, plan.tasks.asked), default=1) == 1:
        raise ConfigError("no captions are asked for of which the best could be chosen", hint="leave --samples out")
    for name, style in plan.pairs:
        task = plan.tasks[name]
        check_names(task, folders, plan.context, own, style)
        for nulls in (False, True):  # a result may lack what is not required
            render(task, folders, context, own, _results_to_try(plan, task, nulls=nulls), style=style)
    if has_checks:
        render(ANSWER, folders, question="?")
        render(CLAIMS, folders, caption="")
        render(COVERS, folders, caption="", question="?")
        render(RATE, folders, caption="", question="?", answer="")
        render(REPAIR, folders, caption="", answers=())


def result_name(name: str, style: str) -> str:
    """Return the name by which other tasks need the result of a request: that of the task, or of the style of a caption."""
    return style if TASKS.get(name) and TASKS[name].has_styles else name


def check_needs(plan: RequestPlan) -> None:
    """Raise ConfigError if an own task has a name that is taken, shows nothing, or needs a result that no other task gives."""
    given = {result_name(*pair) for pair in plan.pairs}
    for task in plan.tasks.own:
        if task.name in TASKS or {task.name, task.name.replace("_", "-")} & {*plan.generate.caption_styles}:
            raise ConfigError(
                f"{task.name} is the name of a built-in task or of a caption style", hint="give your task another"
            )
        if not task.shows_image and not task.needs and not plan.context:
            hint = "needs names tasks whose results the prompt uses; --columns context=NAME columns of the source"
            raise ConfigError(f"the task {task.name} shows no image and nothing else of it", hint=hint)
        for need in task.needs:
            if need not in given:
                names = sorted(given - {task.name})
                asked = f"asked are {', '.join(names)}; " if names else ""
                hint = did_you_mean(need, names) or f"{asked}built-in ones are asked with --tasks caption"
                raise ConfigError(f"the task {task.name} needs {need}, which is not asked", hint=hint)
    _ = plan.rounds  # raises for tasks that need each other


def _results_to_try(plan: RequestPlan, task: Task, *, nulls: bool) -> Results:
    """Return results without content, with which a template is tried before anything is asked."""
    own = {task.name: task.empty_result(nulls=nulls) for task in plan.tasks.own}
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
