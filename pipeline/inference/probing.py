"""Find out what a server takes of the protocol, and whether it enforces schemas, before any request is paid for."""

import asyncio
import re
from collections.abc import Awaitable, Callable

import aiohttp

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError, one_line
from pipeline.inference import chat_api
from pipeline.inference.bodies import MAX_BODY_BYTES, read_body
from pipeline.inference.endpoints import Endpoint, Endpoints, raise_for_access
from pipeline.inference.kept_images import KeptImages
from pipeline.inference.request_images import named_image
from pipeline.inference.retry import BUSY_STATUSES, GATEWAY_STATUSES, MAX_FAULTS, backoff_seconds
from pipeline.inference.server_errors import CONNECTION_ERRORS, REFUSED_STATUSES
from pipeline.progress import Progress

UNKNOWN_IMAGE = "0" * 64  # the uuid of no image
IMAGE_PROBE_SECONDS = 20.0


async def learn_all(
    endpoints: Endpoints,
    learn: Callable[[Endpoint], Awaitable[None]],
    retire: Callable[[Endpoint, EngineError], None],
) -> None:
    """Find out by `learn` which fields each server supports; a server that is down is learned later.

    A server that refuses is passed to `retire`. Raises the refusal of the last one.
    """
    for endpoint in endpoints:
        if not endpoint.is_up.is_set():
            endpoints.wait_for(endpoint)
    up = [endpoint for endpoint in endpoints if endpoint.is_up.is_set()]
    results = await asyncio.gather(*map(learn, up), return_exceptions=True)
    for endpoint, result in zip(up, results, strict=True):
        if isinstance(result, EngineError):
            retire(endpoint, result)
        elif result is not None:
            raise result


async def learn_dialect(
    endpoint: Endpoint,
    model: str,
    server: ServerConfig,
    reply_tokens: int,
    progress: Progress,
) -> None:
    """Set the dialect of a server, and whether it keeps images.

    `chat_api.probe` is sent without what the server refuses, until it answers.

    A model that thinks first gets as many tokens for that as each reply of the run may have, `reply_tokens`.

    Raises EngineError if it answers nothing, or does not enforce schemas and must.
    """
    max_tokens = chat_api.PROBE_TOKENS
    while True:
        probe = chat_api.probe(model, endpoint.dialect, max_tokens)
        status, answer = await _probe(endpoint, probe, server, progress)
        if status == 200 and (problem := chat_api.problem_of(answer, endpoint.keys)):
            hint = "what it says there is to be mended first; then run the same command"
            raise EngineError(f"{endpoint.url} answers its first request with {problem}", hint=hint)
        if status == 200 and chat_api.is_cut_before_text(answer):
            if max_tokens >= reply_tokens:
                hint = "let it: generate: {max_tokens: 4000}; or turn its thinking off where it is served"
                raise EngineError(f"{endpoint.url} thinks for more than {max_tokens:,} tokens before it says a word", hint=hint)
            max_tokens = reply_tokens
            continue
        is_enforcing = endpoint.dialect.format == "json_schema"
        if status == 200 and (not is_enforcing or chat_api.proves_schemas(answer)):
            break
        message = endpoint.error_message(answer) if status != 200 else ""
        better = endpoint.dialect.after_refusal(message) if status in REFUSED_STATUSES else None
        if better is None and message and not re.search("response_format|schema|json_object", message):
            raise EngineError(f"{endpoint.url} refuses the first request: {message}", hint="check --base-url and --model")
        if better is None and server.enforced_schema:
            raise EngineError(
                f"{endpoint.url} does not enforce JSON schemas, so no reply of it can be trusted"
                + (f" ({status}: {message})" if message else ""),
                hint='start vLLM with --structured-outputs-config \'{"backend":"guidance","disable_any_whitespace":true}\'; '
                "or have each reply checked, and bad ones asked for again: --no-enforced-schema",
            )
        better = better or endpoint.dialect.looser()
        if better is None:
            raise EngineError(f"{endpoint.url} refuses the first request: {message or status}", hint="look at its log")
        endpoint.dialect = better
    _tell(endpoint, progress)
    if endpoint.dialect.is_vllm and await _keeps_images(endpoint, model):
        endpoint.kept = KeptImages()


def _tell(endpoint: Endpoint, progress: Progress) -> None:
    dialect = endpoint.dialect
    if left_out := dialect.describe():
        progress.message(f"{endpoint.url} refuses some fields, which are left out: {left_out}")
    if "temperature" in dialect.left_out:
        progress.warn(f"{endpoint.url} samples at a temperature of its own: replies are not greedy")
    if dialect.format != "json_schema":
        progress.warn(f"{endpoint.url} does not enforce JSON schemas: each reply is checked, and bad ones are asked for again")


async def _keeps_images(endpoint: Endpoint, model: str) -> bool:
    """Return whether a server refuses an unknown name of an image, and for that reason alone.

    vLLM skips some unparsable parts of a message with a warning only: a reply would then be about no image. A failure of this
    request does not end the run; images are then sent each time.
    """
    probe = chat_api.image_probe(model, named_image(UNKNOWN_IMAGE), endpoint.dialect)
    try:
        async with asyncio.timeout(IMAGE_PROBE_SECONDS):
            answer, text = await _post(endpoint, probe)
    except CONNECTION_ERRORS:
        return False
    return answer.status in REFUSED_STATUSES and chat_api.misses_image(endpoint.error_message(text))


async def _post(endpoint: Endpoint, probe: bytes) -> tuple[aiohttp.ClientResponse, bytes]:
    """Send a probe once; return the answer, and its body."""
    async with endpoint.post_chat(probe) as answer:
        return answer, await read_body(answer, MAX_BODY_BYTES)


async def _probe(endpoint: Endpoint, probe: bytes, server: ServerConfig, progress: Progress) -> tuple[int, bytes]:
    """Return status and body of the answer to a probe, which is sent again while the server is busy or fails."""
    loop = asyncio.get_running_loop()
    faults, refusals, ends_at, busy = 0, 0, loop.time() + server.startup_timeout_s, endpoint.busy
    while True:
        try:
            answer, text = await _post(endpoint, probe)
            raise_for_access(answer, endpoint, text)
            if answer.status not in (*BUSY_STATUSES, *GATEWAY_STATUSES):
                busy.end()
                return answer.status, text
            refusals += 1
            busy.start(answer.status, endpoint.error_message(text))
            if warning := busy.warning(endpoint.url):
                progress.warn(warning)
            if loop.time() > ends_at:
                hint = "wait until it is ready, or look at its log and your quota there; then run the same command"
                raise EngineError(f"{endpoint.url} answers {answer.status} to every request", hint=hint)
        except CONNECTION_ERRORS as error:
            faults += 1
            if faults == MAX_FAULTS or loop.time() > ends_at:
                waited = f"no answer within {server.request_timeout_s:g} s (server.request_timeout_s)"
                reason = waited if isinstance(error, TimeoutError) else one_line(error)
                raise EngineError(f"{endpoint.url} fails at its first request: {reason}", hint="look at its log") from None
        await asyncio.sleep(backoff_seconds(faults + min(refusals, 3)))
