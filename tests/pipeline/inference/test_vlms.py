"""Other vision-language models in this process: replies follow the schema, and prompts are complete."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from pipeline.config.files import resolve
from pipeline.errors import EngineError
from pipeline.inference.embedded import EmbeddedEngine
from pipeline.tasks import TASKS
from pipeline.types import Request, SampleBatch
from tests.pipeline.inference.tiny_vlms import FAMILIES, save
from tests.scene_data import requests_to_send


def png(color: str, size_px: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size_px, color).save(out, "PNG")
    return out.getvalue()


def requests(count: int = 3, max_tokens: int = 120) -> list[Request]:
    config = resolve(
        source="scenes", generate={"max_tokens": max_tokens, "caption_styles": ["brief"]}, tasks=["caption"]
    )
    colors, sizes = ("red", "blue", "green"), ((40, 30), (30, 50), (64, 64))
    images = [png(color, size) for color, size in zip(colors, sizes, strict=True)][:count]
    return requests_to_send(
        SampleBatch.of((f"{n:064x}", (image,)) for n, image in enumerate(images)), config, "r"
    )


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EmbeddedEngine:
    folder = save(request.param, tmp_path_factory.mktemp("model"))
    return EmbeddedEngine(request.param, lambda: folder, "r", 64)


def test_replies_follow_the_schema_and_do_not_depend_on_the_batch(engine: EmbeddedEngine) -> None:
    asked = requests()
    together = engine._answer(asked)
    for request, reply in zip(asked, together, strict=True):
        assert reply.text.startswith('{"caption":"') and reply.prompt_tokens > 50
        if reply.finish_reason == "stop":
            TASKS["caption"].output.model_validate(json.loads(reply.text))
        assert engine._answer([request])[0].text == reply.text


def test_chat_has_the_whole_prompt_and_the_bos_token_once(engine: EmbeddedEngine) -> None:
    (request,) = requests(1)
    chat = engine._chat(request)
    assert chat.count(request.system) == chat.count(request.text) == 1
    assert "'type'" not in chat
    processor = engine._loaded[0]
    seen: list[list[int]] = []

    class Spy:
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            inputs = processor(*arguments, **options)
            seen.append(inputs["input_ids"][0].tolist())
            return inputs

        def __getattr__(self, name: str) -> Any:
            return getattr(processor, name)

    engine.__dict__["_loaded"] = (Spy(), engine._loaded[1])
    engine._answer([request])
    engine.__dict__["_loaded"] = (processor, engine._loaded[1])
    bos = processor.tokenizer.bos_token_id
    assert bos is None or seen[0].count(bos) <= 1


def test_chat_prompt_includes_the_failed_reply_and_all_pages(engine: EmbeddedEngine) -> None:
    first, second, _ = requests()
    shown = replace(first, failed=('{"caption":""}', "That reply cannot be used."))
    assert "That reply cannot be used." in engine._chat(shown)
    in_quotes = replace(first, failed=("{'type': 'text', 'text': 'a ring'}", "'type': is no key."))
    assert "'type': is no key." in engine._chat(in_quotes)
    (reply,) = engine._answer([shown])
    assert reply.text.startswith("{")
    two = replace(first, images=(*first.images, *second.images), pages=(1, 2))
    assert engine._answer([two])[0].prompt_tokens > engine._answer([first])[0].prompt_tokens


def test_model_without_usable_chat_template_is_refused(tmp_path: Path) -> None:
    folder = save("LLaVA", tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    for template, problem in (
        ("{{ 'hello' }}", "leaves out the system prompt or the task"),
        (None, "no chat template"),
    ):
        processor.chat_template = template
        processor.tokenizer.chat_template = None
        for file in folder.glob("chat_template*"):
            file.unlink()
        processor.save_pretrained(folder)
        with pytest.raises(EngineError, match=problem):
            EmbeddedEngine("x", lambda: folder, "r", 64)._answer(requests(1))
