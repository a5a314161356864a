"""Build the requests about a sample. A request id is a digest of everything that the reply depends on."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.config import JUDGE_MODEL, Config
from pipeline.config.sections import ANY_LANGUAGE, GenerateConfig
from pipeline.digests import digest
from pipeline.errors import ConfigError
from pipeline.sources import find_source, holds_decks
from pipeline.tasks import TASKS, Tasks, wire_schema
from pipeline.tasks.base import MAX_DETAIL_PIXELS, MAX_PIXELS, Task
from pipeline.tasks.caption import STYLE_TOKENS
from pipeline.tasks.checks import CHECKING, RATE, REPAIR
from pipeline.tasks.conditions import HAS_HUMAN_TEXT, Condition, drop_reason, parse_condition
from pipeline.tasks.custom import CustomTask
from pipeline.tasks.prompts import DRAWS, prompt_texts, render
from pipeline.text.language_codes import language_name
from pipeline.types import DEFAULT_MODEL, Reply, Request, SampleBatch, Sampling, SourceTexts

NO_INPUTS = SourceTexts()
NO_RESULTS: Mapping[str, str] = MappingProxyType({})
RETRY_TEMPERATURE_STEP = 0.5
FEEDBACK = "That reply cannot be used ({flaw}). Reply again, exactly as told above.\n{task_line}"
# These settings of a custom task do not change its requests.
FILTER_KEYS = ("min_words", "max_words", "model")
RESULT_MISSING = "result_missing"
IMAGE_SIZE = ("width_px", "height_px")  # conditions may use these like source columns
# This key in `task_models` chooses the model of the tasks that check texts.
CHECKS = "checks"
# A pair is a task and its style, which is "" for most tasks.
Pair = tuple[str, str]


@dataclass(frozen=True)
class RequestPlan:
    """The tasks that a model is asked to do for each sample, and all settings that its replies depend on."""

    tasks: Tasks
    generate: GenerateConfig
    prompt_dirs: tuple[Path, ...]
    context: tuple[str, ...]
    language: str | None
    seed: int
    # If true, built-in tasks are asked only about images without human texts.
    is_filling: bool
    has_decks: bool
    # If true, images are pages, which are sent with more pixels.
    shows_detail: bool
    default_model: str
    ladders: tuple[tuple[str, tuple[str, ...]], ...]
    revisions: tuple[tuple[str, str], ...]
    # Each task asks its model at this position.
    rung: int = 0

    @classmethod
    def of(cls, config: Config, tasks: Tasks, revisions: Mapping[str, str]) -> "RequestPlan":
        """Return the plan for the settings of a run. Raises ConfigError for invalid models of tasks."""
        return cls(
            tasks, config.generate, config.prompt_dirs, config.context, config.filter.language, config.seed,
            is_filling=config.human_texts == "fill", has_decks=holds_decks(config),
            shows_detail=find_source(config.source).image_kind == "graphics",
            default_model=config.default_model, ladders=_ladders_of(config, tasks),
            revisions=tuple(revisions.items()),
        )  # fmt: skip

    def models_of(self, task: str) -> tuple[str, ...]:
        """Return the names of a task's models. Each later model replaces texts that failed a check."""
        return dict(self.ladders).get(task, (self.default_model,))

    def model_of(self, task: str) -> str:
        """Return the name of the task's model at position `rung`, or of its last model."""
        models = self.models_of(task)
        return models[min(self.rung, len(models) - 1)]

    def revision_of(self, task: str) -> str:
        """Return the revision of the model to ask, or "" before it is known."""
        return dict(self.revisions).get(self.model_of(task), "")

    @cached_property
    def num_rungs(self) -> int:
        """The largest number of models of any asked task."""
        return max((len(self.models_of(task.name)) for task in self.tasks.asked), default=1)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The task and style of each request about a sample, in order."""
        styles: dict[str, tuple[str, ...]] = {}
        for task in self.tasks.asked:
            is_caption = isinstance(task, CustomTask) and task.settings.kind == "caption"
            own = task.name.replace("_", "-") if is_caption else ""
            styles[task.name] = self.generate.caption_styles if task.has_styles else (own,)
        return tuple((name, style) for name, own in styles.items() for style in own)

    @cached_property
    def largest_pixels(self) -> int | None:
        """The maximum number of pixels of any image in a request, or None without a limit."""
        if self.generate.max_pixels != "auto":
            return self.generate.max_pixels
        bounds = (self.max_pixels(self.tasks[name], style) for name, style in self.pairs)
        return max(filter(None, bounds), default=MAX_PIXELS)

    def max_pixels(self, task: Task, style: str) -> int | None:
        """Return the pixel limit of a task's images, or None without images. Checks use the largest limit."""
        if not task.shows_image:
            return None
        if self.generate.max_pixels != "auto" or task in CHECKING:
            return self.largest_pixels
        return MAX_DETAIL_PIXELS if self.shows_detail else task.max_pixels(style)

    def max_tokens(self, task: Task, style: str) -> int:
        """Return the token limit of the first reply. Captions get 3 tokens for each requested word."""
        if task.has_styles:
            least = max(STYLE_TOKENS.get(style, 0), 3 * (self.generate.caption_words or 0))
            return max(self.generate.max_tokens, least)
        return task.max_tokens or self.generate.max_tokens

    @cached_property
    def largest_max_tokens(self) -> int:
        """The largest token limit of first replies, at least `generate.max_tokens`."""
        limits = (self.max_tokens(self.tasks[name], style) for name, style in self.pairs)
        return max((self.generate.max_tokens, *limits))

    @cached_property
    def dropping(self) -> dict[Pair, Condition]:
        """The condition `keep_if` of each task that has one. An image for which it is not true is dropped."""
        texts = ((pair, self.tasks[pair[0]].keep_if) for pair in self.pairs)
        return {pair: parse_condition(text) for pair, text in texts if text}

    @cached_property
    def conditions(self) -> dict[Pair, tuple[Condition, ...]]:
        """The conditions of each task and style. The task is asked about an image only if all are true."""
        conditions = {}
        for name, style in self.pairs:
            task = self.tasks[name]
            if isinstance(task, CustomTask):
                texts = [task.settings.when] if task.settings.when else []
            else:
                texts = [text for key, text in self.generate.when if key in (name, style)]
            conditions[name, style] = tuple(map(parse_condition, texts))
        return conditions

    def inputs_of(self, name: str, style: str) -> set[str]:
        """Return the names of the results that must be known before a task is asked."""
        first = () if self.tasks[name].keep_if else self.dropping
        compared = (condition.names_in("results") for condition in self.conditions[name, style])
        return {*self.tasks[name].needs, *(task for task, _ in first)}.union(*compared)

    @cached_property
    def has_conditions(self) -> bool:
        """Whether a task is asked only about some images."""
        return self.is_filling or bool(self.dropping) or any(self.conditions.values())

    @cached_property
    def needed(self) -> frozenset[str]:
        """The names of the results that prompts or conditions need."""
        dropping = (task for task, _ in self.dropping)
        return frozenset(dropping).union(*(self.inputs_of(*pair) for pair in self.pairs))

    @cached_property
    def rounds(self) -> tuple[tuple[Pair, ...], ...]:
        """The pairs of each round. A task is asked in a later round than the tasks whose results it needs.

        Tasks with `keep_if` are asked in the first round. Raises ConfigError if tasks need each other's
        results in a circle.
        """
        waiting, done = [*self.pairs], set[str]()
        rounds = []
        while waiting:
            ready = tuple(pair for pair in waiting if done.issuperset(self.inputs_of(*pair)))
            if not ready:
                names = ", ".join(dict.fromkeys(name for name, _ in waiting))
                hint = "remove one name from the `needs` or `when` of one of them"
                raise ConfigError(f"circular dependency between tasks: {names}", hint=hint)
            rounds.append(ready)
            done |= {result_name(*pair) for pair in ready}
            waiting = [pair for pair in waiting if pair not in ready]
        return tuple(rounds)

    @cached_property
    def needed_rounds(self) -> tuple[tuple[Pair, ...], ...]:
        """The rounds, with only the pairs whose results are needed."""
        rounds = (tuple(pair for pair in pairs if result_name(*pair) in self.needed) for pairs in self.rounds)
        return tuple(filter(None, rounds))

    def describe(self, *checks: Task) -> list[Any]:
        """Return everything that replies depend on, except the image. Includes the prompts of `checks`."""
        prompts = prompt_texts([*self.tasks.asked, *checks], self.prompt_dirs)
        values: list[Any] = [self.context, self.language, self.seed, self.is_filling]
        rungs = [replace(self, rung=rung) for rung in range(self.num_rungs)]
        values += [
            [task.name, *((plan.model_of(task.name), plan.revision_of(task.name)) for plan in rungs)]
            for task in (*self.tasks.asked, *checks)
        ]
        return [self.tasks.describe(FILTER_KEYS), self.generate.model_dump(mode="json"), prompts, values]

    def count_replies(self, task: Task) -> int:
        """Return the number of requests per sample and style, which is greater than 1 only for captions."""
        return self.generate.samples if task.text_field and not task.rows_field else 1

    def count(self, pairs: Sequence[Pair]) -> int:
        """Return the number of requests per sample for these pairs of task and style."""
        return sum(self.count_replies(self.tasks[name]) for name, _ in pairs)

    def fields(
        self, task: Task, temperature: float = 0.0, max_tokens: int | None = None, **values: Any
    ) -> tuple[dict[str, Any], str]:
        """Call `_shared_fields` with the settings of the plan. `values` are passed to the prompt template."""
        return _shared_fields(self, task, temperature, max_tokens or self.generate.max_tokens, **values)


def _ladders_of(config: Config, tasks: Tasks) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the names of the models of each task that does not use the default model."""
    known = [*config.models, DEFAULT_MODEL]
    names = [*(task.name for task in tasks.asked), CHECKS, REPAIR.name]
    ladders = dict(config.task_models)
    ladders |= {task.name: task.settings.model for task in tasks.custom if task.settings.model}
    for name, models in ladders.items():
        if name not in names:
            problem = f"task_models names a task that is not in this run: {name}"
            raise ConfigError(problem, unknown=name, known=names, hint=f"use {', '.join(names)}")
        for model in models:
            if model not in known:
                problem = f"the task {name} names an unknown model: {model}"
                hint = "add it to `models`, with its `model` and `base_url`"
                raise ConfigError(problem, unknown=model, known=known, hint=hint)
        if name in (CHECKS, REPAIR.name) and len(models) > 1:
            raise ConfigError(f"task_models: {name} can have one model only", hint="remove the others")
    if config.generate.min_logprob is not None and max(map(len, ladders.values()), default=1) == 1:
        hint = "list several models for a task in `task_models`"
        raise ConfigError("generate.min_logprob needs a ladder: several models for a task", hint=hint)
    for task in CHECKING:
        if chosen := ladders.get(task.name) or ladders.get(CHECKS):
            ladders[task.name] = chosen
    ladders.pop(CHECKS, None)
    if judge := config.judge_model:
        if judge not in (*known, JUDGE_MODEL):
            hint = f"add its server: --judge {judge}@http://HOST:8000/v1"
            raise ConfigError(f"the judge {judge} has no server", unknown=judge, known=known, hint=hint)
        ladders[RATE.name] = (judge,)
    full = {DEFAULT_MODEL: config.default_model}
    return tuple((task, tuple(full.get(name, name) for name in ladders[task])) for task in sorted(ladders))


def build_requests(
    sample_id: str,
    plan: RequestPlan,
    inputs: SourceTexts = NO_INPUTS,
    results: Mapping[str, str] = NO_RESULTS,
    pairs: Sequence[Pair] | None = None,
    skipped: Mapping[Pair, str] | None = None,
) -> Iterator[Request]:
    """Yield the requests about one sample, or only those for `pairs`. `with_images` adds the images.

    Prompts may use source columns and other tasks' results (JSON by name). A task is left out if it is in
    `skipped` (by default, `find_skipped`), or if its prompt cannot be rendered with the results.
    """
    row = {"row": tuple(map(tuple, inputs.context))} if inputs.context else {}
    pairs = plan.pairs if pairs is None else pairs
    skipped = find_skipped(plan, inputs, results, pairs) if skipped is None else skipped
    for name, style in pairs:
        task = plan.tasks[name]
        if (name, style) in skipped:
            continue
        used = {"results": tuple((need, results[need]) for need in task.needs)} if task.needs else {}
        code = task.language or plan.language
        values: dict[str, Any] = {
            **row,
            **used,
            # This number varies wordings and question types between samples.
            "draw": int(sample_id[:8], 16) % DRAWS,
            "words": plan.generate.caption_words,
            "language": language_name(None if code == ANY_LANGUAGE else code),
        }
        temperature = task.temperature(plan.generate)
        max_tokens = plan.max_tokens(task, style)
        # The step `select` chooses the most likely of several captions.
        wants_logprobs = plan.generate.wants_logprobs or plan.count_replies(task) > 1
        for number in range(plan.count_replies(task)):
            if number:
                temperature = max(temperature, plan.generate.sample_temperature)
            try:
                fields, shared_digest = plan.fields(task, temperature, max_tokens, style=style, **values)
            except ConfigError:
                if not task.needs:
                    raise
                break  # the prompt cannot be rendered with this result
            pages: dict[str, Any] = {} if task.shows_image else {"pages": ()}
            candidate = {"number": number} if number else {}
            scored = {"logprobs": True} if wants_logprobs else {}
            identity = {"image": sample_id, "about": shared_digest} | pages | candidate | scored
            yield Request(
                id=digest(identity), sample_id=sample_id, style=style,
                wants_logprobs=wants_logprobs, **pages, **fields,
            )  # fmt: skip


def find_skipped(
    plan: RequestPlan, inputs: SourceTexts, results: Mapping[str, str], pairs: Iterable[Pair]
) -> dict[Pair, str]:
    """Return the `pairs` of task and style that are not asked about a sample, with their reasons.

    A task that needs the result of an earlier skipped task is skipped for the same reason.
    """
    if not plan.needed and not plan.has_conditions:
        return {}
    pairs = list(pairs)
    dropped = None if plan.dropping.keys() >= {*pairs} else find_dropped(plan, inputs, results)
    values = _decode(inputs, results) if any(plan.conditions[pair] for pair in pairs) else {}
    skipped: dict[Pair, str] = {}
    reasons: dict[str, str] = {}
    for pair in pairs:
        task = plan.tasks[pair[0]]
        missing = [need for need in task.needs if need not in results]
        reason = None if task.keep_if else dropped
        reason = reason or _find_unmet(plan.conditions[pair], values)
        if plan.is_filling and not reason and not isinstance(task, CustomTask):
            has_text = inputs.has_captions if task.text_field else inputs.has_questions
            if has_text and result_name(*pair) not in plan.needed:
                reason = HAS_HUMAN_TEXT
        if missing and not reason:
            reason = next((reasons[need] for need in missing if need in reasons), RESULT_MISSING)
        if reason:
            skipped[pair] = reasons[result_name(*pair)] = reason
    return skipped


def find_dropped(plan: RequestPlan, inputs: SourceTexts, results: Mapping[str, str]) -> str | None:
    """Return the reason why a task with `keep_if` drops a sample, or None. A skipped task drops no sample."""
    values = _decode(inputs, results) if plan.dropping else {}
    for pair, keep_if in plan.dropping.items():
        is_asked = not _find_unmet(plan.conditions[pair], values)
        if is_asked and (unmet := keep_if.find_unmet(values)):
            return drop_reason(pair[0], unmet)
    return None


def _decode(inputs: SourceTexts, results: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    return condition_values(inputs, {name: json.loads(value) for name, value in results.items()})


def _find_unmet(conditions: Sequence[Condition], values: Mapping[str, Mapping[str, Any]]) -> str | None:
    return next(filter(None, (condition.find_unmet(values) for condition in conditions)), None)


def condition_values(inputs: SourceTexts, results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the values that conditions read, by namespace. The value of an empty column is None."""
    columns = {name: value.strip() or None for name, value in inputs.context}
    return {"row": columns | {name: getattr(inputs, name) for name in IMAGE_SIZE}, "results": results}


def with_images(requests: Sequence[Request], batch: SampleBatch) -> list[Request]:
    """Return the requests with the images that they show. Reads images only if a request shows them."""
    if not any(request.shows_image for request in requests):
        return list(requests)
    images = dict(zip(batch.ids, batch.read_images(), strict=True))
    return [
        replace(one, images=one.pages_of(images[one.sample_id])) if one.shows_image else one
        for one in requests
    ]


def result_name(name: str, style: str) -> str:
    """Return the name by which `needs` refers to a result: the caption style, or else the task."""
    return style if TASKS.get(name) and TASKS[name].has_styles else name


def build_retry(request: Request, reply: Reply, flaw: str) -> Request:
    """Return the next attempt after an unusable reply, at a higher temperature.

    The first retry doubles the token limit. Later retries show the model its last reply and why it cannot be
    used, unless that reply was cut off, since it may be endless.
    """
    attempt = reply.attempt + 1
    # In a resumed run, the attempt may grow by more than 1.
    steps = attempt - request.attempt
    max_temperature = max(request.sampling.temperature, 1.0)
    sampling = Sampling(
        temperature=min(request.sampling.temperature + RETRY_TEMPERATURE_STEP * steps, max_temperature),
        max_tokens=request.sampling.max_tokens * (2 if request.attempt == 0 else 1),
    )
    shows_reply = attempt > 1 and reply.finish_reason == "stop"
    feedback = FEEDBACK.format(flaw=flaw.replace("_", " "), task_line=request.text.splitlines()[-1])
    failed = (reply.text, feedback) if shows_reply else None
    return replace(request, attempt=attempt, sampling=sampling, failed=failed)


@lru_cache(maxsize=1 << 14)  # the task `answer` has a prompt for each question
def _shared_fields(
    plan: RequestPlan, task: Task, temperature: float, max_tokens: int, **values: Any
) -> tuple[dict[str, Any], str]:
    """Return the request fields that all images share, and a digest of everything else that affects a reply.

    Renaming the keys of the digest would change all request ids, and all replies would be paid for again.
    """
    max_pixels = plan.max_pixels(task, values.get("style", ""))
    prompt = render(task, plan.prompt_dirs, **values)
    schema = wire_schema(task) if task.asks_for_json(prompt.text) else None
    identity = {
        "prompt": hashlib.sha256(f"{prompt.system}\0{prompt.text}".encode()).hexdigest(),
        "schema": schema,
        # The revision replaces the model's name, since equal weights give equal replies.
        "model": plan.revision_of(task.name),
        "sampling": [temperature, max_tokens],
        "max_pixels": max_pixels,
    }
    identity |= {"seed": plan.seed} if temperature > 0 else {}  # a greedy reply does not depend on the seed
    fields = {
        "task": task.name,
        "model": plan.model_of(task.name),
        "prompt_id": prompt.id,
        "system": prompt.system,
        "text": prompt.text,
        "schema": json.dumps(schema) if schema else "",
        "sampling": Sampling(temperature=temperature, max_tokens=max_tokens),
        "max_pixels": max_pixels,
    }
    return fields, digest(identity)
