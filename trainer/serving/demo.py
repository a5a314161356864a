"""Serve the demo page of a captioner on this machine."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from trainer.captioner import Captioner
from trainer.publish.captioner_package import page_options

MAX_PHOTO_BYTES = 100_000_000


def run_demo(
    folder: Path, title: str, port: int, num_beams: int | None, announce: Callable[[str], None]
) -> None:
    """Serve the page until Ctrl-C. `announce` receives the URL. Port 0 selects a free port."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from trainer.publish.space import build_page  # imports gradio

    captioner = Captioner.from_pretrained(folder)

    def caption(photo: Image.Image, style: str, question: str) -> str:
        chosen_style = None if question else style or None
        return captioner.caption(photo, chosen_style, question, num_beams=num_beams)[0]

    page = build_page(title, *page_options(captioner.checkpoint.captioner.config.prompts), caption)
    # Reject requests for other host names (DNS rebinding).
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    page.launch(
        server_name="127.0.0.1",
        server_port=port or None,
        max_file_size=MAX_PHOTO_BYTES,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        app_kwargs={"middleware": [hosts]},
    )
    announce(page.local_url)
    page.block_thread()
