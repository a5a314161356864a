"""Remember what the embedded model replies, for one run of the tests: most commands ask it about the first drawn scenes.

The first command that asks gets the model's reply; later ones, in any process, get the same without loading the model. Commands
that are started as a user starts them, and tests of the engine itself, know nothing of this.
"""

import hashlib
import os
import sqlite3
from contextlib import closing
from typing import Any

from pipeline.inference import engines
from pipeline.types import Request

FILE = "SYNTH_TEST_REPLIES"  # the environment variable that names it
TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT, reason TEXT, prompt INTEGER, reply INTEGER)"
WAIT_SECONDS = 60


def remember_replies() -> None:
    """Let embedded engines of this process, and of those that are forked from it, share their replies in the file."""
    path, load = os.environ.get(FILE), engines._embedded
    if not path:
        return

    def load_remembering(*arguments: Any) -> Any:
        engine: Any = load(*arguments)
        ask_model = engine._answer

        def answer(requests: list[Request]) -> list[Any]:
            keys = [_key(engine, request) for request in requests]
            with closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as db, db:
                db.execute(TABLE)
                query = "SELECT text, reason, prompt, reply FROM replies WHERE key = ?"
                known = [db.execute(query, (key,)).fetchone() for key in keys]
            new = [n for n, reply in enumerate(known) if reply is None]
            replies = ask_model([requests[n] for n in new]) if new else []
            for n, reply in zip(new, replies, strict=True):
                known[n] = (reply.text, reply.finish_reason, reply.prompt_tokens, reply.reply_tokens)
            with closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as db, db:
                db.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", [(keys[n], *known[n]) for n in new])
            engine._tokens += sum(reply[3] for n, reply in enumerate(known) if n not in set(new))
            return [request.reply(*reply) for request, reply in zip(requests, known, strict=True)]

        engine._answer = answer
        return engine

    vars(engines)["_embedded"] = load_remembering


def _key(engine: Any, request: Request) -> str:
    """Return a digest of all that a reply depends on."""
    return hashlib.sha256(repr((engine.revision, engine._max_pixels, request)).encode()).hexdigest()
