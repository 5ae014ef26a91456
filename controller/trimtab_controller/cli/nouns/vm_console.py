"""The serial log of a vm, piece by piece."""

import base64
import re
import sys
import time

from trimtab_controller.cli.session import Session

_PIECE_BYTES = 256 << 10
_ROUND_S = 1.0
# What a terminal obeys: a guest may write anything to its serial port.
_SEQUENCE = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    rb"|\][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC: titles, clipboard
    rb"|[PX^_][^\x1b]*\x1b\\"  # strings
    rb"|[ -/]*[0-OQ-WYZ\\\x60-~])"  # the short ones
)
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")
# A sequence that is not finished after this much never is one.
_UNFINISHED = re.compile(rb"\x1b[^\x1b]{0,256}\Z")


def print_log(session: Session, path: str, *, follow: bool, raw: bool) -> None:
    """Copy the log to stdout; to a terminal without escape sequences unless `raw`."""
    keep_all = raw or not sys.stdout.isatty()
    offset, held = 0, b""
    while True:
        answer = session.client.get(path, {"offset": offset, "max_bytes": _PIECE_BYTES})
        piece = base64.b64decode(answer["content_base64"])
        next_offset = int(answer["next_offset"])
        if keep_all:
            sys.stdout.buffer.write(piece)
        else:
            text, held = harmless(held + piece)
            sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        if next_offset == offset or not piece:
            if not follow:
                sys.stdout.buffer.write(held if keep_all else b"")
                return
            time.sleep(_ROUND_S)
        offset = next_offset


def harmless(text: bytes) -> tuple[bytes, bytes]:
    """Return text without control sequences, and the start of one that the next piece may finish."""
    unfinished = _UNFINISHED.search(text)
    held = b""
    if unfinished is not None and _SEQUENCE.match(text, unfinished.start()) is None:
        text, held = text[: unfinished.start()], text[unfinished.start() :]
    return _CONTROL.sub(b"", _SEQUENCE.sub(b"", text)), held
