"""A vision-language model of another family in this process: replies follow the schema, prompts are complete.

The model has random weights, the real processor of Gemma 3 and a shortened chat template. Its tokenizer also
adds the BOS token, and the system text precedes the first message.
"""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers.processors import TemplateProcessing

from pipeline.config.files import resolve
from pipeline.errors import EngineError
from pipeline.inference.embedded import EmbeddedEngine
from pipeline.inference.engines import TINY_WEIGHTS
from pipeline.tasks import TASKS
from pipeline.types import Request, SampleBatch
from tests.scene_data import requests_to_send

END = 2  # <|im_end|> of the teacher's tokenizer
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEMPLATE = (
    "{{ bos_token }}{% set first = messages[0]['content'][0]['text'] %}"
    "{% for message in messages[1:] %}<start_of_turn>{{ message['role'] }}\n{{ first if loop.first else '' }}"
    "{% for part in message['content'] %}"
    "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def save_model(folder: Path) -> None:
    """Write the model and its processor to a folder."""
    tokenizer = tf.AutoTokenizer.from_pretrained(TINY_WEIGHTS)
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}
    tokenizer.add_special_tokens({"extra_special_tokens": [*names.values(), "<bos>"]})
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.init_kwargs.update(names)
    tokenizer.bos_token = "<bos>"
    begin = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[begin])
    tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    text = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "sliding_window": 64}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": END}
    torch.manual_seed(0)
    config = tf.Gemma3Config(
        text_config=SIZES | text | tokens | {"bos_token_id": tokenizer.bos_token_id},
        vision_config=SIZES | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    model = tf.Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = [END]
    model.save_pretrained(folder)


def png(color: str, size_px: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size_px, color).save(out, "PNG")
    return out.getvalue()


def requests() -> list[Request]:
    generate = {"max_tokens": 120, "caption_styles": ["brief"]}
    config = resolve(source="scenes", generate=generate, tasks=["caption"])
    images = png("red", (40, 30)), png("blue", (30, 50)), png("green", (64, 64))
    samples = SampleBatch.of((f"{n:064x}", (image,)) for n, image in enumerate(images))
    return requests_to_send(samples, config, "r")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedEngine:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return EmbeddedEngine("gemma", lambda: folder, "r", 64)


def test_replies_follow_the_schema_and_do_not_depend_on_the_batch(engine: EmbeddedEngine) -> None:
    asked = requests()
    for request, reply in zip(asked, engine._answer(asked), strict=True):
        assert reply.text.startswith('{"caption":"') and reply.prompt_tokens > 50
        if reply.finish_reason == "stop":
            TASKS["caption"].output.model_validate(json.loads(reply.text))
        assert engine._answer([request])[0].text == reply.text


def test_prompt_is_complete_and_has_one_bos_token(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = requests()
    shown = replace(first, failed=('{"caption":""}', "That reply cannot be used."))
    chat = engine._chat(shown)
    assert chat.count(first.system) == chat.count(first.text) == 1
    assert "That reply cannot be used." in chat and "'type'" not in chat
    two = replace(first, images=(*first.images, *second.images), pages=(1, 2))
    processor, model = engine._loaded
    seen: list[list[int]] = []
    generate = model.generate

    def noted(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"][0].tolist())
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", noted)
    (one_page,), (two_pages,) = engine._answer([shown]), engine._answer([two])
    assert [ids.count(processor.tokenizer.bos_token_id) for ids in seen] == [1, 1]
    assert (
        one_page.text.startswith("{") and two_pages.prompt_tokens > engine._answer([first])[0].prompt_tokens
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'hello' }}",
        "{{ raise_exception('no system text') }}",
        "{% for message in messages %}{{ message.content }}{% endfor %}",  # prints lists of parts
    ],
)
def test_template_that_leaves_out_the_prompt_is_refused(
    template: str, engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._loaded[0], "chat_template", template)
    with pytest.raises(EngineError, match="leaves out the system prompt or the task"):
        engine._answer([replace(requests()[0], system="Be exact.", text="Describe the image.")])


def test_model_without_chat_template_is_refused(engine: EmbeddedEngine, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(engine._find_folder(), folder, ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(EngineError, match="no chat template"):
        EmbeddedEngine("x", lambda: folder, "r", 64)._answer(requests()[:1])
