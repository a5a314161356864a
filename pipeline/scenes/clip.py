"""The tiny CLIP: a real CLIPModel of 2.3 million parameters that knows drawn scenes and their captions.

Where pretrained weights are not available, it provides meaningful frozen hidden states, caption scores and a feature cache.
Trained by scenes/training/train_clip.py.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from pipeline.scenes.draw import SIDE_PX

PATCH_PX = 14  # four patches for each of the nine places
MAX_TOKENS = 64
WIDTH, DEPTH = 160, 4  # of both towers
START, END = "<|startoftext|>", "<|endoftext|>"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of CLIP


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on lower-cased texts; each text gets a start and an end token, as in CLIP."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=[END, START], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    ids = {token: bpe.token_to_id(token) for token in (START, END)}
    bpe.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=START, eos_token=END, pad_token=END, model_max_length=MAX_TOKENS
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> CLIPProcessor:
    """Return a processor that resizes every image to the size of a scene."""
    size = {"height": SIDE_PX, "width": SIDE_PX}
    images = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=MEAN, image_std=STD)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Return the untrained model for this tokenizer."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH}
    shared = {**sizes, "num_attention_heads": WIDTH // 32, "num_hidden_layers": DEPTH}
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, **special_ids}
    vision = {"image_size": SIDE_PX, "patch_size": PATCH_PX}
    return CLIPModel(CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=256))
