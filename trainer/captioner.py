"""`Captioner`: captions of images, and answers to questions about them, in a few lines of Python.

from trainer import Captioner

captioner = Captioner.from_pretrained("ORG/NAME")
captioner.caption(["photo.jpg"], style="brief")
captioner.caption(image, question="How many dogs are there?")
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from trainer.model.checkpoint import Checkpoint, load_checkpoint
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.runtime.checkpoint_folder import find_captioner
from trainer.tokenizer import TargetText, answering_prompt, scored_prompt

BATCH_SIZE = 32  # images
PREPARED_BATCHES = 2  # ahead of the one that is captioned
READERS = 2  # threads, each of which holds one image at its full size
Picture = Image.Image | str | PathLike[str] | bytes


class Captioner:
    """A trained captioner with its tokenizer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | None = None) -> "Captioner":
        """Load a captioner from its folder, or from the Hub (ORG/NAME, ORG/NAME@REVISION). Raises TrainError if there is none.

        `device` is that of torch; by default a GPU if there is one.
        """
        return cls(load_checkpoint(find_captioner(name), torch.device(device) if device else None))

    @property
    def styles(self) -> list[str]:
        """The styles of captions that it has learned."""
        return list(dict.fromkeys(style for _, style in self.checkpoint.captioner.config.prompts if style))

    @property
    def usual_style(self) -> str:
        """The style that is written where none is asked for."""
        return scored_prompt(self.checkpoint.captioner.config.prompts)[1]

    @property
    def usual_beams(self) -> int:
        """The candidates of the search with which it was scored after its training; 1 if it does not say."""
        return self.checkpoint.captioner.config.num_beams

    @property
    def answers(self) -> bool:
        """Whether it has learned to answer questions."""
        return any(not style for _, style in self.checkpoint.captioner.config.prompts)

    def caption(
        self,
        images: Picture | Iterable[Picture],
        style: str | None = None,
        question: str = "",
        batch_size: int = BATCH_SIZE,
        num_beams: int | None = None,
    ) -> list[str]:
        """Return a caption of each image, or with a `question` an answer about each.

        Without `num_beams`, the search has as many candidates as when it was scored (`usual_beams`); 1 is greedy, and faster.
        An image is a PIL image, or the path or the bytes of a file. Raises TrainError for a style or image that cannot be used.
        """
        several = [images] if isinstance(images, Image.Image | str | PathLike | bytes) else images
        pairs = enumerate(several)
        texts = []
        for number, answer in self.stream(pairs, (style,), question, batch_size, num_beams):
            if isinstance(answer, ImageError):
                raise TrainError(f"cannot read image {number}: {answer}", hint="pass image files, or images")
            texts += answer
        return texts

    def stream(
        self,
        images: Iterable[tuple[Any, Picture]],
        styles: Sequence[str | None] = (None,),
        question: str = "",
        batch_size: int = BATCH_SIZE,
        num_beams: int | None = None,
    ) -> Iterator[tuple[Any, list[str] | ImageError]]:
        """Yield the key of each image with its text in each style, or with the error for which it cannot be read, in order.

        Images are read and resized by other threads, a few batches ahead; an image is encoded once for all styles.
        """
        num_beams = self.usual_beams if num_beams is None else num_beams
        if batch_size < 1 or num_beams < 1:
            raise TrainError("batch_size and num_beams are 1 or more", hint="leave them out")
        prompts = [self.prompt(style, question) for style in styles]
        decoding = DecodingConfig(num_beams=num_beams)
        with ThreadPoolExecutor(READERS) as pool:
            for batch in self._ahead(pool, images, batch_size):
                read = [(key, pixels.result()) for key, pixels in batch]
                usable = [pixels for _, pixels in read if not isinstance(pixels, ImageError)]
                texts = iter(self._describe(torch.stack(usable), prompts, decoding) if usable else ())
                for key, pixels in read:
                    yield key, pixels if isinstance(pixels, ImageError) else next(texts)

    def prompt(self, style: str | None = None, question: str = "") -> list[int]:
        """Return the tokens of the prompt of a caption, or of an answer. Raises TrainError if it has not learned such."""
        prompts = self.checkpoint.captioner.config.prompts
        source, chosen = answering_prompt(prompts) if question else scored_prompt(prompts, style)
        return self.checkpoint.tokenizer.prompt(TargetText(source, "", style=chosen, question=question))

    def write(
        self, pixels_BCHW: Tensor, prompts: Sequence[Sequence[int]], decoding: DecodingConfig = GREEDY
    ) -> list[list[int]]:
        """Return the tokens of a text about each prepared image, after prompts of one length."""
        captioner = self.checkpoint.captioner
        return captioner.generate(self._states(pixels_BCHW), torch.tensor(prompts), decoding)

    def _states(self, pixels_BCHW: Tensor) -> Tensor:
        encoder = self.checkpoint.captioner.encoder
        with torch.inference_mode():
            states_BNV: Tensor = encoder(pixels_BCHW.to(next(encoder.parameters()).device))
        return states_BNV

    def _describe(self, pixels_BCHW: Tensor, prompts: Sequence[Sequence[int]], decoding: DecodingConfig) -> list[list[str]]:
        captioner, tokenizer, states_BNV = self.checkpoint.captioner, self.checkpoint.tokenizer, self._states(pixels_BCHW)
        B = len(pixels_BCHW)
        by_style = [captioner.generate(states_BNV, torch.tensor(prompt).expand(B, -1), decoding) for prompt in prompts]
        return [[tokenizer.decode(ids) for ids in of_image] for of_image in zip(*by_style, strict=True)]

    def _ahead(
        self, pool: ThreadPoolExecutor, images: Iterable[tuple[Any, Picture]], batch_size: int
    ) -> Iterator[list[tuple[Any, Future[Tensor | ImageError]]]]:
        """Yield batches of images that are being prepared, while later ones are prepared already."""
        left = iter(images)

        def prepare(picture: Picture) -> Future[Tensor | ImageError]:
            if not isinstance(picture, Image.Image):
                return pool.submit(self.prepare, picture)
            done: Future[Tensor | ImageError] = Future()  # here: two threads must not load one image, which may come twice
            done.set_result(self.prepare(picture))
            return done

        def next_batch() -> list[tuple[Any, Future[Tensor | ImageError]]]:
            return [(key, prepare(picture)) for key, picture in islice(left, batch_size)]

        waiting = deque(next_batch() for _ in range(PREPARED_BATCHES))
        while batch := waiting.popleft():
            waiting.append(next_batch())
            yield batch

    def prepare(self, picture: Picture) -> Tensor | ImageError:
        """Return an image as the encoder wants it (3, H, W), or why it cannot be read."""
        image = _read(picture)
        if isinstance(image, ImageError):
            return image
        try:
            return self.checkpoint.captioner.encoder.pixels([image])[0]
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # of settings in a stranger's file
            problem = f"the captioner cannot prepare images: {one_line(error)}"
            raise TrainError(problem, hint="its config.json has odd settings of the image processor") from None


def _read(picture: Picture) -> Image.Image | ImageError:
    """Return an image upright in RGB, or why it cannot be read."""
    try:
        if isinstance(picture, Image.Image):
            return upright_rgb(picture)
        if isinstance(picture, str | PathLike):
            picture = read_regular(Path(picture).expanduser(), max_bytes=MAX_IMAGE_BYTES)
        return prepare_image(picture)
    except UnsafeFileError as error:
        return ImageError(error.reason, str(error))
    except OSError as error:
        return ImageError("unreadable_file", error.strerror or str(error))
    except ImageError as error:
        return error
    except Exception as error:  # noqa: BLE001  # Pillow's decoders raise any exception on damaged files
        return ImageError("unreadable_image", one_line(error))
