"""Putting a file together from pieces: from where it broke off, with holes for zeros, and never with a byte that was not sent."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest

from trimtab_controller.cli.backup_file import PIECE_BYTES, receive
from trimtab_controller.cli.errors import CommandFailed

FILE = b"a" * PIECE_BYTES + bytes(3 * PIECE_BYTES) + b"b" * (PIECE_BYTES // 2)


class Server:
    def __init__(self, *, fails: int = 0) -> None:
        self.asked: list[int] = []
        self.reopened = 0
        self.fails = fails

    def ask(self, offset: int) -> Any:
        self.asked.append(offset)
        if self.fails:
            self.fails -= 1
            raise CommandFailed("the host was restarted")
        content = FILE[offset : offset + PIECE_BYTES]
        zeros = 3 * PIECE_BYTES if offset == PIECE_BYTES else 0
        content = b"" if zeros else content
        return {
            "content_base64": base64.b64encode(content).decode(),
            "sha256": hashlib.sha256(content).hexdigest(),
            "zeros": zeros,
            "size_bytes": len(FILE),
        }

    def reopen(self) -> None:
        self.reopened += 1


def get(server: Server, partial: Path) -> str:
    return receive(server.ask, server.reopen, partial, on_progress=lambda _done, _total: None)


def test_the_file_is_what_was_sent_and_zeros_are_holes(tmp_path: Path) -> None:
    digest = get(Server(), tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == FILE
    assert digest == hashlib.sha256(FILE).hexdigest()
    assert (tmp_path / "part").stat().st_blocks * 512 < 3 * PIECE_BYTES


def test_a_run_that_broke_off_within_a_piece_is_gone_on_with_at_the_piece(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(FILE[: PIECE_BYTES + 77])
    server = Server()
    get(server, tmp_path / "part")
    assert server.asked[0] == PIECE_BYTES
    assert (tmp_path / "part").read_bytes() == FILE


def test_a_host_that_forgot_is_asked_again_and_one_that_never_answers_is_an_error(tmp_path: Path) -> None:
    server = Server(fails=3)
    get(server, tmp_path / "part")
    assert server.reopened == 3
    with pytest.raises(CommandFailed):
        get(Server(fails=99), tmp_path / "other")


def test_a_piece_that_arrives_as_something_else_is_refused(tmp_path: Path) -> None:
    server = Server()

    def ask(offset: int) -> Any:
        return {**server.ask(offset), "sha256": "0" * 64}

    with pytest.raises(CommandFailed, match="arrived as something else"):
        receive(ask, server.reopen, tmp_path / "part", on_progress=lambda _done, _total: None)
