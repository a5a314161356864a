"""Tiny random vision-language models of several families, with real processors and shortened chat templates.

The templates differ in the position and form of the system text, and in the BOS token.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as tf
from tokenizers.processors import TemplateProcessing

from pipeline.inference.engines import TINY_WEIGHTS

END = 2  # <|im_end|> of the teacher's tokenizer
IMAGE_PX = 32
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "pad_token_id": 0,
    "eos_token_id": END, "bos_token_id": None,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# Gemma 3: its tokenizer also adds the BOS token, and the system text precedes the first message.
WITH_BOS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<start_of_turn>{{ message['role'] }}\n{{ first if loop.first else '' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}{% endif %}"
    "<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Pixtral: the system text must be a string, not a list of parts.
TEXT_ALONE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}[INST]"
    "{% if loop.first and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '[IMG]' }}{% endfor %}{% endif %}[/INST]"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# LLaVA-1.5: a system text is refused.
NO_SYSTEM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    "{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<image>\n' }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
Built = tuple[Any, Any]  # a processor and a model


def _tokenizer(*tokens: str, **named: str) -> Any:
    """Return the teacher's tokenizer with more tokens; `named` ones are also attributes."""
    tokenizer = tf.AutoTokenizer.from_pretrained(TINY_WEIGHTS)
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokens, *named.values()]})
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.init_kwargs.update(named)
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return TEXT | {"vocab_size": len(tokenizer)} | more


def _size(side_px: int = IMAGE_PX) -> dict[str, int]:
    return {"height": side_px, "width": side_px}


def gemma3() -> Built:
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = _tokenizer("<start_of_turn>", "<end_of_turn>", "<bos>", **named)
    tokenizer.bos_token = "<bos>"
    begin = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[begin])
    processor = tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size=_size()),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=WITH_BOS,
    )
    config = tf.Gemma3Config(
        text_config=_text(tokenizer, bos_token_id=tokenizer.bos_token_id, sliding_window=64),
        vision_config=VISION | {"image_size": IMAGE_PX, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return processor, tf.Gemma3ForConditionalGeneration(config)


def pixtral() -> Built:
    tokenizer = _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]")
    patch = {"height": 16, "width": 16}
    processor = tf.PixtralProcessor(
        image_processor=tf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=patch),
        tokenizer=tokenizer,
        patch_size=16,
        chat_template=TEXT_ALONE,
    )
    return processor, _llava(
        tokenizer,
        "[IMG]",
        "mistral",
        {"model_type": "pixtral", "image_size": 64, "patch_size": 16, "head_dim": 16},
    )


def llava() -> Built:
    tokenizer = _tokenizer("<image>")
    processor = tf.LlavaProcessor(
        image_processor=tf.CLIPImageProcessor(size={"shortest_edge": IMAGE_PX}, crop_size=_size()),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=NO_SYSTEM,
    )
    clip = {"model_type": "clip_vision_model", "image_size": IMAGE_PX, "patch_size": 8}
    return processor, _llava(tokenizer, "<image>", "llama", clip, "default")


def _llava(
    tokenizer: Any, image: str, text: str, vision: dict[str, Any], states: Literal["default", "full"] = "full"
) -> Any:
    config = tf.LlavaConfig(
        text_config=_text(tokenizer, model_type=text),
        vision_config=VISION | vision,
        image_token_index=tokenizer.convert_tokens_to_ids(image),
        vision_feature_layer=-1,
        vision_feature_select_strategy=states,
    )
    return tf.LlavaForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Built]] = {"Gemma 3": gemma3, "Pixtral": pixtral, "LLaVA": llava}


def save(family: str, folder: Path) -> Path:
    """Write a model of a family with its processor to a folder."""
    torch.manual_seed(0)
    processor, model = FAMILIES[family]()
    model.generation_config.eos_token_id = [END]
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
