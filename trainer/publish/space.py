"""A page for a captioner: drop a photo, read what it writes of it, and ask about it.

It runs as a Space of the Hugging Face Hub (`synth push --space` publishes this file as app.py) and needs gradio, torch and
transformers. The captioner and what it can write stand in space.json beside it.
"""

import json
from pathlib import Path
from typing import Any

import gradio
from PIL import Image
from transformers import pipeline

ABOUT: dict[str, Any] = json.loads(Path(__file__).with_name("space.json").read_text(encoding="utf-8"))
MAX_QUESTION_CHARACTERS = 500
captioner = pipeline("image-text-to-text", model=ABOUT["model"], revision=ABOUT["revision"], trust_remote_code=True)


def write(photo: Image.Image | None, style: str = "", question: str = "") -> str:
    """Return a caption of a photo in a style, or the answer to a question. Raises gradio.Error without a photo."""
    if photo is None:
        raise gradio.Error("Drop a photo first.")
    text = question.strip()[:MAX_QUESTION_CHARACTERS] or style
    (written,) = captioner(images=photo, text=text, return_full_text=False)
    return str(written["generated_text"])


with gradio.Blocks(title=ABOUT["model"], analytics_enabled=False) as page:
    gradio.Markdown(f"# {ABOUT['model'].rpartition('/')[2]}\nDrop a photo, and read what this captioner writes of it.")
    with gradio.Row():
        dropped = gradio.Image(type="pil", label="Photo", sources=["upload", "clipboard", "webcam"])
        with gradio.Column():
            chosen = gradio.Dropdown(ABOUT["styles"], value=ABOUT["styles"][0], label="Style", visible=len(ABOUT["styles"]) > 1)
            asked = gradio.Textbox(label="Question", placeholder="Leave it empty for a caption", visible=ABOUT["answers"])
            button = gradio.Button("Write", variant="primary")
            shown = gradio.Textbox(label="What it writes", elem_id="written", interactive=False, buttons=["copy"])
    inputs: list[Any] = [dropped, chosen, asked]
    button.click(write, inputs, shown, api_name="write")
    asked.submit(write, inputs, shown, api_visibility="private")
    dropped.upload(write, inputs, shown, api_visibility="private")

if __name__ == "__main__":
    page.launch()
