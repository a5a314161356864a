"""Send messages to a process and receive its answers: each is its length, and so many bytes."""

import struct
from collections.abc import Sequence
from typing import IO

_LENGTH = struct.Struct(">q")  # before each message; -1 for an image that has not changed


def send_messages(target: IO[bytes], messages: Sequence[bytes | None]) -> None:
    """Write messages as `write_messages` does, and send them at once."""
    write_messages(target, messages)
    target.flush()


def write_messages(target: IO[bytes], messages: Sequence[bytes | None]) -> None:
    """Write messages, each after its length; None says that an image is as it was."""
    for message in messages:
        target.write(_LENGTH.pack(-1 if message is None else len(message)))
        if message:
            target.write(message)


def receive_message(source: IO[bytes], max_bytes: int) -> bytes | None:
    """Return a message; None for an image that is as it was. Raises EOFError at the end, ValueError for one too large."""
    (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
    if length > max_bytes:
        raise ValueError("a message is too large")
    return None if length < 0 else _exactly(source, length)


def _exactly(source: IO[bytes], count: int) -> bytes:
    data = source.read(count)
    if len(data) < count:
        raise EOFError
    return data
