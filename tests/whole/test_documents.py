"""Documents: the number of images is unknown before they are read."""

from pathlib import Path

from tests.chat.server import ChatServer, running_chat
from tests.commands import run_synth
from tests.media import write_pdf


def test_estimate_warns_if_the_number_of_images_is_unknown(tmp_path: Path) -> None:
    write_pdf(tmp_path / "long.pdf", 33)
    with running_chat(ChatServer()) as chat:
        for options, warns in (((), True), (("--limit", "33"), False)):
            server = ("--base-url", chat.url, "--model", "model", "--out", f"d{len(options)}")
            source = ("--source", "pdf-pages:long.pdf", "--tasks", "caption")
            done = run_synth("estimate", *source, *server, *options, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert ("the number of images is unknown" in done.stderr) == warns
