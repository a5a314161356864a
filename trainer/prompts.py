"""Choose what a captioner is prompted with, among what it has learned."""

from pipeline.errors import TrainError


def scored_prompt(prompts: list[tuple[str, str]], style: str | None = None) -> tuple[str, str]:
    """Return the (source, style) to prompt with: `style` or brief, human if learned. Raises TrainError if it is not learned."""
    styles = list(dict.fromkeys(learned for _, learned in prompts if learned))
    if not styles:
        raise TrainError("the captioner has learned answers alone", hint="ask it something: --question")
    chosen = style or ("brief" if "brief" in styles else styles[0])
    sources = [source for source, learned in prompts if learned == chosen]
    if not sources:
        raise TrainError(f"the captioner knows no style {chosen}", hint=f"it was trained on: {', '.join(styles)}")
    return ("human" if "human" in sources else sources[0]), chosen


def answering_prompt(prompts: list[tuple[str, str]]) -> tuple[str, str]:
    """Return the source of answers, with an empty style. Raises TrainError if no answers were learned."""
    sources = [source for source, style in prompts if not style]
    if not sources:
        raise TrainError("the captioner has learned no answers", hint="train on a version with questions")
    return ("human" if "human" in sources else sources[0]), ""
