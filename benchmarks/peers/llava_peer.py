"""Reads an export with the dataset and collator from LLaVA's `llava/train/train.py`.

A SentencePiece model trained on the exported texts replaces Llama's tokenizer. The chat template is Vicuna's,
as in LLaVA 1.5. Answers that LLaVA's masking rules do not find are not counted.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace


def read(texts: Path, images: Path, out: Path) -> dict[str, int]:
    """Return the number of images, of answers, and of answers that are training targets."""
    import sentencepiece
    from llava import conversation
    from llava.train import train
    from transformers import CLIPImageProcessor, LlamaTokenizer

    entries = json.loads(texts.read_text())
    answers = [turn["value"] for entry in entries for turn in entry["conversations"] if turn["from"] == "gpt"]
    words = out / "words.txt"
    words.write_text("\n".join(turn["value"] for entry in entries for turn in entry["conversations"]))
    options = {
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "pad_id": -1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(input=str(words), model_prefix=str(out / "words"), **options)
    tokenizer = LlamaTokenizer(
        str(out / "words.model"), model_max_length=2048, padding_side="right", legacy=True
    )
    tokenizer.pad_token = tokenizer.unk_token
    conversation.default_conversation = conversation.conv_templates["v1"]
    about = {
        "image_folder": str(images),
        "image_processor": CLIPImageProcessor(),
        "image_aspect_ratio": "pad",
    }
    about |= {"data_path": str(texts), "is_multimodal": True, "mm_use_im_start_end": False}
    module = train.make_supervised_data_module(tokenizer, SimpleNamespace(**about))
    dataset, collate = module["train_dataset"], module["data_collator"]
    batch = collate([dataset[number] for number in range(len(dataset))])
    learned = "".join(tokenizer.decode(labels[labels >= 0]) for labels in batch["labels"]).replace(" ", "")
    found = sum(answer.replace(" ", "") in learned for answer in answers)
    return {"images": len(batch["images"]), "answers": len(answers), "learned": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("texts", "images", "out"):
        parser.add_argument(name, type=Path)
    print(json.dumps(read(**vars(parser.parse_args()))))
