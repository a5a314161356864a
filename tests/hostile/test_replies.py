"""Replies: any response is stored as a reply or retried, and stored replies can be read as rows."""

import hashlib
import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.files import resolve
from pipeline.inference.journal import Journal
from pipeline.inference.protocol import ServerFaultError, error_message, read_reply
from pipeline.inference.queue import read_annotations
from pipeline.inference.requests import build_requests
from pipeline.tables import ANNOTATION
from pipeline.tasks.replies import find_flaw, parse_reply
from pipeline.types import SampleInfo
from tests.hostile import LONG
from tests.plans import request_plan

CONFIG = resolve(source="scenes", tasks=["caption", "qa"], generate={"caption_styles": ["brief"]})

extremes = st.sampled_from([-1, 2**31, 2**63, 2**64, 1e308, -0.0])
numbers = st.one_of(st.integers(), st.integers(10**20, 10**40), st.floats(), extremes)
odd_texts = ["\ud800", "\0", "\x1b]52;c;AA\x07", "I'm sorry, I cannot", "a a a a a", "stop", "length"]
any_text = st.one_of(st.text(), st.sampled_from(odd_texts), st.just(70_000).map("x".__mul__))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=4)),
    max_leaves=8,
)
captions = st.fixed_dictionaries({"caption": anything})
question = st.fixed_dictionaries(
    {"question": anything, "answer": anything, "answer_type": anything},
    optional={"evidence_pages": anything, "expression": anything, "more": anything},
)
questions = st.fixed_dictionaries({}, optional={"qa": st.one_of(anything, st.lists(question, max_size=3))})
contents = st.one_of(anything, st.one_of(captions, questions).map(lambda value: json.dumps(value)))
messages = st.one_of(anything, st.fixed_dictionaries({"content": contents}))
choices = st.fixed_dictionaries({"message": messages, "finish_reason": anything})
counts = st.fixed_dictionaries({"prompt_tokens": anything, "completion_tokens": anything})
usages = st.one_of(anything, counts)
lists = st.fixed_dictionaries(
    {"choices": st.one_of(anything, st.lists(choices, max_size=2))}, optional={"usage": usages}
)
answers = st.one_of(anything, lists)
texts = answers.map(lambda value: json.dumps(value).encode(errors="surrogatepass"))
bodies = st.one_of(texts, st.binary(max_size=200))


@settings(
    max_examples=10_000 if LONG else 200,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(body=bodies)
def test_any_response_body_is_stored_with_its_flaw_and_parsed_into_rows(body: bytes, tmp_path: Path) -> None:
    message = error_message(body)
    assert 0 < len(message) <= 500
    assert "\n" not in message
    sample_id = hashlib.sha256(body).hexdigest()  # unique per example, because they share a journal
    requests = list(build_requests(sample_id, request_plan(CONFIG)))
    with Journal(tmp_path / "j.sqlite") as journal:
        for request in requests:
            try:
                reply = read_reply(request, body)
            except ServerFaultError:
                reply = request.reply("", "server_error")
            flaw = find_flaw(request, reply)
            journal.keep([(request, reply, flaw)])
            stored = journal.last(request.id)
            assert stored is not None
            expected = (reply.text, reply.finish_reason, flaw)
            assert (stored[0].text, stored[0].finish_reason, stored[1]) == expected
            assert parse_reply(request, stored[0]) == parse_reply(request, reply)
        (table,) = read_annotations([[SampleInfo(sample_id, 1)]], request_plan(CONFIG), journal)
    assert table.schema == ANNOTATION
    assert len(table.to_pylist()) >= len(requests)
