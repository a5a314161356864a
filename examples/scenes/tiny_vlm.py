"""The tiny teacher: a Qwen2.5-VL with about 3 million parameters, which is trained only on drawn scenes.

It has the classes, files, chat template and special tokens of Qwen2.5-VL-3B-Instruct, so that the same code
runs both models. With 28 px per merged token, a scene has one image token for each of its nine places. The
attention heads of the text model have 32 features because vLLM's CPU attention does not support 16 or 40.
"""

from collections.abc import Iterable

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.scenes.scene import SIDE_PX

VOCAB_SIZE = 1024
CONTEXT_TOKENS = 2048
VISION_WIDTH, VISION_DEPTH = 128, 4
# vLLM's CPU attention does not support 16 or 40 features per head.
TEXT_WIDTH, TEXT_DEPTH, HEAD_WIDTH = 160, 4, 32

_NAMES = (
    "endoftext",
    "im_start",
    "im_end",
    "vision_start",
    "vision_end",
    "vision_pad",
    "image_pad",
    "video_pad",
)
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _NAMES)
# Qwen2's pre-tokenization: words with the space before them, single digits, punctuation.
PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    tokens, alphabet = list(SPECIAL_TOKENS), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen2_5_VLProcessor:
    """Return a processor that resizes every image to about the area of a scene."""
    pixels = {"shortest_edge": SIDE_PX**2, "longest_edge": SIDE_PX**2}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(size=pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Return the untrained model for this tokenizer."""
    token_id = {
        name: tokenizer.get_vocab()[token] for name, token in zip(_NAMES, SPECIAL_TOKENS, strict=True)
    }
    ends = {"eos_token_id": token_id["im_end"], "pad_token_id": token_id["endoftext"]}
    half = HEAD_WIDTH // 2
    mrope_section = [half // 4, (half - half // 4) // 2, (half - half // 4) // 2]
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_WIDTH * 3,
            "num_hidden_layers": TEXT_DEPTH,
            "num_attention_heads": TEXT_WIDTH // HEAD_WIDTH,
            "num_key_value_heads": TEXT_WIDTH // HEAD_WIDTH,
            "max_position_embeddings": CONTEXT_TOKENS,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": mrope_section,
            },
            "bos_token_id": None,
            **ends,
        },
        vision_config={
            "depth": VISION_DEPTH,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": VISION_WIDTH * 3,
            "num_heads": VISION_WIDTH // HEAD_WIDTH,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [VISION_DEPTH - 1],
        },
        image_token_id=token_id["image_pad"],
        video_token_id=token_id["video_pad"],
        vision_start_token_id=token_id["vision_start"],
        vision_end_token_id=token_id["vision_end"],
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**ends, do_sample=False)
    return model
