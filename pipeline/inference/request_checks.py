"""Check all prompts, conditions and dependencies of a run before its first request."""

import json
from typing import Any

from pipeline.config.sections import VerifyConfig
from pipeline.errors import ConfigError
from pipeline.inference.requests import IMAGE_SIZE, RequestPlan, result_name
from pipeline.inference.verification import LOG_PROBABILITIES, ORDER, SCORES
from pipeline.tasks import TASKS
from pipeline.tasks.checks import ANSWER, CHECKING, CLAIMS, CONFIRM, COVERS, RATE, REPAIR
from pipeline.tasks.conditions import COLUMN, INTEGER, NUMBER, TEXT, ConditionError, Names, parse_condition
from pipeline.tasks.prompts import check_names, check_prompt_dir, render


def check_requests(plan: RequestPlan, verify: VerifyConfig) -> None:
    """Raise ConfigError if a task, condition or prompt of a run is invalid."""
    if plan.generate.samples > 1 and max(map(plan.count_replies, plan.tasks.asked), default=1) == 1:
        problem = "--samples chooses the best of several captions, but no task asks for captions"
        raise ConfigError(problem, hint="leave out --samples")
    check_needs(plan)
    check_conditions(plan, verify)
    # This property raises ConfigError if tasks need each other in a circle.
    _ = plan.rounds
    render_prompts(plan, has_checks=verify.is_asked)


def check_needs(plan: RequestPlan) -> None:
    """Raise ConfigError if a custom task has an invalid name, `needs` or `keep_if`, or has no input."""
    available = {result_name(*pair) for pair in plan.pairs}
    for task in plan.tasks.custom:
        if task.name in TASKS or {task.name, task.name.replace("_", "-")} & {*plan.generate.caption_styles}:
            problem = f"`{task.name}` is the name of a built-in task or of a caption style"
            raise ConfigError(problem, hint="rename your task")
        if not task.shows_image and not task.needs and not plan.context:
            problem = f"the task {task.name} has no input: it uses no image, no result and no column"
            hint = "list tasks in `needs`, or pass columns of the source (--columns context=NAME)"
            raise ConfigError(problem, hint=hint)
        if task.keep_if and task.needs:
            problem = f"the task {task.name} has `needs`, but tasks with `keep_if` are asked first"
            raise ConfigError(problem, hint="leave out one of them")
        for need in task.needs:
            if need not in available:
                names = sorted(available - {task.name})
                asked = f"this run has {', '.join(names)}; " if names else ""
                hint = f"{asked}add built-in tasks with --tasks, such as --tasks caption"
                problem = f"the task {task.name} needs {need}, which this run does not have"
                raise ConfigError(problem, unknown=need, known=names, hint=hint)


def check_conditions(plan: RequestPlan, verify: VerifyConfig) -> None:
    """Raise ConfigError if a condition is invalid, or reads a result or score that is not yet known."""
    if taken := [name for name in IMAGE_SIZE if name in plan.context]:
        hint = "rename the column in the source: conditions read the size of the image by this name"
        raise ConfigError(f"a context column cannot be named {taken[0]}", hint=hint)
    row = dict.fromkeys(plan.context, COLUMN) | dict.fromkeys(IMAGE_SIZE, INTEGER)
    results = {result_name(*pair): plan.tasks[pair[0]].result_schema for pair in plan.pairs}
    names = {"row": row, "results": results}
    known = [*dict.fromkeys(name for pair in plan.pairs for name in pair if name and pair[0] in TASKS)]
    for key, text in plan.generate.when:
        if key not in known:
            problem = f"generate.when has {key}, which is not a built-in task or caption style of this run"
            hint = "for a custom task, set `when` in the file of the task"
            raise ConfigError(problem, unknown=key, known=known, hint=hint)
        check_condition(f"generate.when of {key}", text, names)
    for task in plan.tasks.custom:
        if task.settings.when:
            read = {"row": row} if task.keep_if else names
            check_condition(f"`when` of the task {task.name}", task.settings.when, read)
        if task.keep_if:
            own = names | {"results": {task.name: task.result_schema}}
            check_condition(f"`keep_if` of the task {task.name}", task.keep_if, own)
    for name, style in plan.pairs:
        if result_name(name, style) in plan.needed and len(plan.models_of(name)) > 1:
            problem = f"the task {name} has several models, but another task needs its result"
            raise ConfigError(problem, hint=f"list one model for {name} in `task_models`")
    checks = [*verify.checks, *["repair"] * verify.repair, *["judge"] * bool(verify.judge)]
    for name, text in verify.when:
        if name not in checks:
            problem = f"verify.when has {name}, which is not a check of this run"
            hint = f"this run has {', '.join(checks) or 'no checks'}"
            raise ConfigError(problem, unknown=name, known=checks, hint=hint)
        earlier = (check for check in SCORES if check in checks and ORDER[check] < ORDER[name])
        scores = [*map(SCORES.__getitem__, earlier), *LOG_PROBABILITIES * plan.generate.wants_logprobs]
        read = {"scores": dict.fromkeys(scores, NUMBER), "text": {"task": TEXT, "style": TEXT}}
        check_condition(f"verify.when of {name}", text, names | read)


def check_condition(where: str, text: str, names: Names) -> None:
    """Raise ConfigError with the place of the condition if it is invalid."""
    try:
        parse_condition(text).check(names)
    except ConditionError as error:
        raise ConfigError(f"{where}, {error}", hint=error.hint) from None


def render_prompts(plan: RequestPlan, *, has_checks: bool) -> None:
    """Render every prompt, and those of checks if `has_checks`. Raises ConfigError if a prompt fails."""
    folders = plan.prompt_dirs
    if plan.generate.prompt_dir:
        check_prompt_dir(plan.generate.prompt_dir, [*plan.tasks.asked, *(CHECKING if has_checks else ())])
    context = tuple((name, "") for name in plan.context)
    lists: dict[str, Any] = {name: [] for name in TASKS if TASKS[name].rows_field}
    for name, _ in plan.pairs:
        check_names(plan.tasks[name], folders, plan.context)
    for nulls in (False, True):  # render all prompts with and without optional values
        empty = lists | {task.name: task.empty_result(nulls=nulls) for task in plan.tasks.custom}
        for name, style in plan.pairs:
            task = plan.tasks[name]
            results = [(need, json.dumps(empty.get(need, ""))) for need in task.needs]
            render(task, folders, context, results, style=style)
    if has_checks:
        render(ANSWER, folders, question="?")
        render(CLAIMS, folders, caption="", count=1)
        render(CONFIRM, folders, question="?")
        render(COVERS, folders, caption="", question="?")
        render(RATE, folders, caption="", question="?", answer="")
        render(REPAIR, folders, caption="", claims=())
