"""A demo page for a captioner: drop a photo, read its caption, and ask questions about it.

`synth push --space` publishes this file as app.py of a Space. space.json names the captioner. The page needs
gradio, torch and transformers. `synth serve-captioner --demo` opens the same page on this machine.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio
from PIL import Image

MAX_QUESTION_CHARACTERS = 500
# Takes an image, a style and a question ("" for none), and returns a caption or an answer.
Caption = Callable[[Image.Image, str, str], str]


def build_page(title: str, styles: list[str], answers: bool, caption: Caption) -> Any:  # noqa: FBT001
    """Return the page for a captioner. The first style is the default. `answers` adds a question field."""

    def write(photo: Image.Image | None, style: str = "", question: str = "") -> str:
        if photo is None:
            raise gradio.Error("Drop a photo first.")
        return caption(photo, style, question.strip()[:MAX_QUESTION_CHARACTERS])

    def read(upload: Any) -> Any:
        try:
            return read_upload(upload)
        except Exception:  # noqa: BLE001  # Pillow raises errors of many types
            text = "This file is not an image that can be read. Drop another one."
            raise gradio.Error(text, print_exception=False) from None

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title.rpartition('/')[2]}\nDrop a photo and read its caption.")
        with gradio.Row():
            photo = gradio.Image(type="pil", label="Photo", sources=["upload", "clipboard", "webcam"])
            # Gradio would show Pillow's error, which contains a path of the server.
            read_upload, photo.preprocess = photo.preprocess, read
            with gradio.Column():
                style = gradio.Dropdown(styles, value=styles[0], label="Style", visible=len(styles) > 1)
                hint = "Leave empty for a caption"
                question = gradio.Textbox(label="Question", placeholder=hint, visible=answers)
                button = gradio.Button("Write", variant="primary")
                written = gradio.Textbox(label="Text", elem_id="written", interactive=False, buttons=["copy"])
        inputs: list[Any] = [photo, style, question]
        button.click(write, inputs, written, api_name="write")
        question.submit(write, inputs, written, api_visibility="private")
        photo.upload(write, inputs, written, api_visibility="private")
    return page


def main() -> None:
    """Open the page for the captioner in space.json."""
    from transformers import pipeline

    about: dict[str, Any] = json.loads(Path(__file__).with_name("space.json").read_text(encoding="utf-8"))
    model, revision = about["model"], about["revision"]
    captioner = pipeline("image-text-to-text", model=model, revision=revision, trust_remote_code=True)

    def caption(photo: Image.Image, style: str, question: str) -> str:
        (written,) = captioner(images=photo, text=question or style, return_full_text=False)
        return str(written["generated_text"])

    build_page(model, about["styles"], about["answers"], caption).launch()


if __name__ == "__main__":
    main()
