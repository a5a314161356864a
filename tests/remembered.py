"""Remember the replies of the embedded model for one run of the tests: most commands ask about the first drawn scenes.

The first command that asks gets the model's reply; later commands of `run_synth`, in any process of the run, get the same
without loading the model.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = "SYNTH_TEST_REPLIES"  # the environment variable that names it


def remember_replies(patch: pytest.MonkeyPatch) -> None:
    """Let the embedded engines of this process store their replies, and use stored ones."""
    from pipeline.inference import engines

    folder, load = Path(os.environ[FOLDER]), engines._embedded

    def load_remembering(*arguments: Any) -> Any:
        engine: Any = load(*arguments)
        ask_model = engine._answer

        def answer(requests: list[Any]) -> list[Any]:
            keys = [repr((engine.revision, engine._max_pixels, request)).encode() for request in requests]
            files = [folder / hashlib.sha256(key).hexdigest() for key in keys]
            new = [n for n, file in enumerate(files) if not file.exists()]
            replies = ask_model([requests[n] for n in new]) if new else []
            for n, reply in zip(new, replies, strict=True):
                scratch = files[n].with_suffix(f".{os.getpid()}")
                scratch.write_text(
                    json.dumps([reply.text, reply.finish_reason, reply.prompt_tokens, reply.reply_tokens]), encoding="utf-8"
                )
                scratch.rename(files[n])
            stored = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            engine._tokens += sum(reply[3] for n, reply in enumerate(stored) if n not in new)
            return [request.reply(*reply) for request, reply in zip(requests, stored, strict=True)]

        engine._answer = answer
        return engine

    patch.setattr(engines, "_embedded", load_remembering)
