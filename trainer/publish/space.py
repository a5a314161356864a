"""A page for a captioner: drop a photo, read its caption, and ask about it.

`synth push --space` publishes this file as app.py of a Space, which needs gradio, torch and transformers; space.json next to it
names the captioner. `synth serve-captioner --demo` opens the same page on this machine.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio
from PIL import Image

MAX_QUESTION_CHARACTERS = 500
Caption = Callable[[Image.Image, str, str], str]  # of a photo in a style, or the answer to a question


def build_page(title: str, styles: list[str], answers: bool, caption: Caption) -> Any:  # noqa: FBT001  # of space.json
    """Return the page of a captioner with these styles, the first of which is chosen; `answers`: it answers questions."""

    def write(photo: Image.Image | None, style: str = "", question: str = "") -> str:
        if photo is None:
            raise gradio.Error("Drop a photo first.")
        return caption(photo, style, question.strip()[:MAX_QUESTION_CHARACTERS])

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title.rpartition('/')[2]}\nDrop a photo, and read what this captioner writes of it.")
        with gradio.Row():
            dropped = gradio.Image(type="pil", label="Photo", sources=["upload", "clipboard", "webcam"])
            with gradio.Column():
                chosen = gradio.Dropdown(styles, value=styles[0], label="Style", visible=len(styles) > 1)
                asked = gradio.Textbox(label="Question", placeholder="Leave it empty for a caption", visible=answers)
                button = gradio.Button("Write", variant="primary")
                shown = gradio.Textbox(label="What it writes", elem_id="written", interactive=False, buttons=["copy"])
        inputs: list[Any] = [dropped, chosen, asked]
        button.click(write, inputs, shown, api_name="write")
        asked.submit(write, inputs, shown, api_visibility="private")
        dropped.upload(write, inputs, shown, api_visibility="private")
    return page


def main() -> None:
    """Open the page of the captioner that space.json names."""
    from transformers import pipeline

    about: dict[str, Any] = json.loads(Path(__file__).with_name("space.json").read_text(encoding="utf-8"))
    captioner = pipeline("image-text-to-text", model=about["model"], revision=about["revision"], trust_remote_code=True)

    def caption(photo: Image.Image, style: str, question: str) -> str:
        (written,) = captioner(images=photo, text=question or style, return_full_text=False)
        return str(written["generated_text"])

    build_page(about["model"], about["styles"], about["answers"], caption).launch()


if __name__ == "__main__":
    main()
