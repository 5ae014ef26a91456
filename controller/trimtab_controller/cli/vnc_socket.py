"""Offers a vm's screen to any VNC viewer of this machine: each viewer that comes gets a session of its own."""

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from trimtab_controller.cli.console_line import ConsoleLine
from trimtab_controller.cli.errors import CommandFailed

_PIECE_BYTES = 64 << 10


@contextlib.contextmanager
def listening(port: int | None) -> Iterator[tuple[socket.socket, str]]:
    """Listen on a unix socket that only this user reaches, or on a loopback port that everybody on this machine does."""
    if port is not None:
        with socket.create_server(("127.0.0.1", port)) as server:
            yield server, f"127.0.0.1:{server.getsockname()[1]}"
        return
    with tempfile.TemporaryDirectory(prefix="trimtab-vnc-") as directory:
        path = str(Path(directory) / "vnc.sock")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen(4)
            yield server, path


def serve(server: socket.socket, open_line: Callable[[], ConsoleLine], *, is_once: bool) -> None:
    """Give each viewer a session until the user interrupts; `is_once`: until the first one has gone."""
    while True:
        viewer, _ = server.accept()
        if is_once:
            _carry(viewer, open_line)
            return
        threading.Thread(target=_carry_and_tell, args=(viewer, open_line), daemon=True).start()


def _carry_and_tell(viewer: socket.socket, open_line: Callable[[], ConsoleLine]) -> None:
    try:
        _carry(viewer, open_line)
    except CommandFailed as error:
        click.echo(error.as_text(), err=True)


def _carry(viewer: socket.socket, open_line: Callable[[], ConsoleLine]) -> None:
    with viewer:
        line = open_line()
        threading.Thread(target=_send, args=(viewer, line), daemon=True).start()
        try:
            for piece in line.pieces():
                viewer.sendall(piece)
        except OSError:
            return  # the viewer was closed
        finally:
            line.close()


def _send(viewer: socket.socket, line: ConsoleLine) -> None:
    with contextlib.suppress(OSError):
        while piece := viewer.recv(_PIECE_BYTES):
            line.write(piece)
    line.close()
