"""`Captioner`: caption images, and answer questions about them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import ImageError, TrainError, one_line
from pipeline.images.decode import MAX_IMAGE_BYTES, prepare_image
from pipeline.images.upright import upright_rgb
from pipeline.storage.untrusted import read_regular
from trainer.model.checkpoint import Checkpoint, load_checkpoint
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.prompts import find_question, preferred_source
from trainer.runtime.checkpoint_folder import find_captioner, require_learned
from trainer.tokenizer import TargetText, scored_prompt

BATCH_SIZE = 32
READERS = 2
Picture = Image.Image | str | PathLike[str] | bytes


class Captioner:
    """A trained captioner with its tokenizer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | None = None) -> "Captioner":
        """Load a captioner from a folder or from the Hub (ORG/NAME or ORG/NAME@REVISION).

        `device` defaults to a GPU if there is one. Raises TrainError if there is no captioner.
        """
        return cls(load_checkpoint(find_captioner(name), torch.device(device) if device else None))

    @property
    def styles(self) -> list[str]:
        """The learned caption styles."""
        return list(dict.fromkeys(style for _, style in self.checkpoint.captioner.config.prompts if style))

    @property
    def usual_style(self) -> str:
        """The default style."""
        return scored_prompt(self.checkpoint.captioner.config.prompts)[1]

    @property
    def usual_beams(self) -> int:
        """The default beam width, as used in the final evaluation of training."""
        return self.checkpoint.captioner.config.decoding().num_beams

    def decoding(self, num_beams: int, question: str = "") -> DecodingConfig:
        """Return the decoding options for captions or, with a `question`, for answers.

        Answers use only `num_beams`, because options such as a minimum length do not suit short answers.
        """
        config = self.checkpoint.captioner.config
        return DecodingConfig(num_beams=num_beams) if question else config.decoding(num_beams)

    def caption(
        self,
        images: Picture | Iterable[Picture],
        style: str | None = None,
        question: str = "",
        batch_size: int = BATCH_SIZE,
        num_beams: int | None = None,
    ) -> list[str]:
        """Return one caption per image or, with a `question`, one answer per image.

        An image is a PIL image, a path, or the bytes of an image file. `num_beams` defaults to `usual_beams`,
        and 1 means greedy decoding. Raises TrainError if the style was not learned or an image cannot be
        read.
        """
        pictures = [images] if isinstance(images, Image.Image | str | PathLike | bytes) else images
        captions = []
        for number, texts in self.stream(enumerate(pictures), (style,), question, batch_size, num_beams):
            if isinstance(texts, ImageError):
                raise TrainError(f"cannot read image {number}: {texts}", hint="pass images or image files")
            captions += texts
        return captions

    def stream(
        self,
        images: Iterable[tuple[Any, Picture]],
        styles: Sequence[str | None] = (None,),
        question: str = "",
        batch_size: int = BATCH_SIZE,
        num_beams: int | None = None,
    ) -> Iterator[tuple[Any, list[str] | ImageError]]:
        """Yield (key, texts) for each (key, image), in order, with one text per style.

        If an image cannot be read, an ImageError takes the place of its texts.
        """
        num_beams = self.usual_beams if num_beams is None else num_beams
        if batch_size < 1 or num_beams < 1:
            raise TrainError("batch_size and num_beams must be 1 or more", hint="leave them out")
        prompts = [self.prompt(style, question) for style in styles]
        decoding = self.decoding(num_beams, question)
        remaining = iter(images)
        with ThreadPoolExecutor(READERS) as pool:

            def prepare(picture: Picture) -> Callable[[], Tensor | ImageError]:
                # The caller may change the image later, so preprocess it now.
                if isinstance(picture, Image.Image):
                    pixels = self.prepare(picture)
                    return lambda: pixels
                return pool.submit(self.prepare, picture).result

            while tasks := [(key, prepare(picture)) for key, picture in islice(remaining, batch_size)]:
                prepared = [(key, task()) for key, task in tasks]
                usable = [pixels for _, pixels in prepared if not isinstance(pixels, ImageError)]
                texts = iter(self._describe(torch.stack(usable), prompts, decoding) if usable else ())
                for key, pixels in prepared:
                    yield key, pixels if isinstance(pixels, ImageError) else next(texts)

    def prompt(self, style: str | None = None, question: str = "") -> list[int]:
        """Return the tokens of a prompt. Raises TrainError if the captioner has not learned such prompts."""
        prompts = self.checkpoint.captioner.config.prompts
        require_learned(prompts, style, question)
        if question:
            source = preferred_source(prompts, "") or ""
            return self.prompt_ids(source, "", find_question(question) or question)
        return self.prompt_ids(*scored_prompt(prompts, style))

    def prompt_ids(self, source: str, style: str, question: str = "") -> list[int]:
        """Return the tokens of a prompt that `choose_prompt` returned."""
        return self.checkpoint.tokenizer.prompt(TargetText(source, "", style=style, question=question))

    def write(
        self, pixels_BCHW: Tensor, prompts: Sequence[Sequence[int]], decoding: DecodingConfig = GREEDY
    ) -> list[list[int]]:
        """Generate one text per preprocessed image and return its tokens. Prompts must have equal lengths."""
        return self.checkpoint.captioner.generate(self._encode(pixels_BCHW), torch.tensor(prompts), decoding)

    def logprobs(self, pixels_BCHW: Tensor, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token of a text about one image."""
        return self.checkpoint.captioner.logprobs(self._encode(pixels_BCHW), prompt, ids)

    @torch.inference_mode()
    def _encode(self, pixels_BCHW: Tensor) -> Tensor:
        captioner = self.checkpoint.captioner
        states_BNV: Tensor = captioner.encoder(pixels_BCHW.to(captioner.device))
        return states_BNV

    def _describe(
        self, pixels_BCHW: Tensor, prompts: Sequence[Sequence[int]], decoding: DecodingConfig
    ) -> list[list[str]]:
        """Return the texts about each image, one per prompt."""
        captioner, states_BNV = self.checkpoint.captioner, self._encode(pixels_BCHW)
        prompts_BT = [torch.tensor(ids).expand(len(states_BNV), -1) for ids in prompts]
        by_prompt = [captioner.generate(states_BNV, prompt_BT, decoding) for prompt_BT in prompts_BT]
        return [[*map(self.checkpoint.tokenizer.decode, texts)] for texts in zip(*by_prompt, strict=True)]

    def prepare(self, picture: Picture) -> Tensor | ImageError:
        """Return the preprocessed image (3, H, W), or an error if it cannot be read."""
        try:
            if isinstance(picture, str | PathLike):
                picture = read_regular(Path(picture).expanduser(), max_bytes=MAX_IMAGE_BYTES)
            image = upright_rgb(picture) if isinstance(picture, Image.Image) else prepare_image(picture)
        except OSError as error:
            return ImageError("unreadable_file", error.strerror or str(error))
        except ImageError as error:
            return error
        except Exception as error:  # noqa: BLE001  # Pillow may raise any exception for a damaged file
            return ImageError("unreadable_image", one_line(error))
        try:
            return self.checkpoint.captioner.encoder.pixels([image])[0]
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            problem = f"the captioner cannot prepare images: {one_line(error)}"
            hint = "do not use it: its config.json has invalid settings of the image processor"
            raise TrainError(problem, hint=hint) from None
