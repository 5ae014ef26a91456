"""What a person at a terminal gets: questions, a progress line, colours, cut columns."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest

from tests.unit.cli.conftest import Program
from tests.unit.cli.fake_controller import Answer, FakeController, operation, page, vm

VMS = "/v1/projects/default/vms"
DEADLINE_S = 30.0


class Terminal:
    """The command at a pseudo terminal."""

    def __init__(self, environment: Mapping[str, str], *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trimtab_controller.cli.main", *arguments],
            env={"TERM": "xterm", **environment, "COLUMNS": "100"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.shown = ""

    def until(self, text: str) -> None:
        """Read until the text was shown."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self._read(), self.shown

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        """Read to the end and return the exit code."""
        while self._read():
            pass
        os.close(self._master)
        return self._process.wait(timeout=DEADLINE_S)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], DEADLINE_S)[0]:
            self._process.kill()
            return False
        try:
            piece = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += piece.decode().replace("\r\n", "\n")
        return bool(piece)


@pytest.fixture
def environment_at_terminal(program: Program) -> dict[str, str]:
    return {name: value for name, value in program.environment.items() if name not in {"NO_COLOR", "TERM"}}


def test_a_destructive_verb_asks_and_takes_no_for_an_answer(
    environment_at_terminal: dict[str, str], controller: FakeController
) -> None:
    terminal = Terminal(environment_at_terminal, "vm", "delete", "web1")
    terminal.until("Delete vm web1 of project default? [y/N]")
    terminal.type("n\n")
    assert terminal.end() == 1
    assert "nothing was changed" in terminal.shown
    assert controller.seen == []


def test_a_destructive_verb_acts_after_yes_and_draws_its_progress(
    environment_at_terminal: dict[str, str], controller: FakeController
) -> None:
    progress = {
        "done_bytes": 512 << 20,
        "total_bytes": 1 << 30,
        "rate_bytes_s": 210 << 20,
        "phase": "disks",
        "remaining_s": 3,
        "percent": 50.0,
    }
    running = operation("running", kind="vm.delete", progress=progress)
    controller.on("DELETE", f"{VMS}/web1", Answer({"operation": running}, status=202))
    controller.on("GET", "/v1/operations/op-01:wait", Answer(running), Answer(operation("done", kind="vm.delete")))
    terminal = Terminal(environment_at_terminal, "vm", "delete", "web1")
    terminal.until("[y/N]")
    terminal.type("y\n")
    assert terminal.end() == 0
    assert re.search(r"\r\x1b\[Kvm\.delete web1  disks  █+░+  50%  512 MiB of 1 GiB  210 MiB/s  3s left", terminal.shown)
    assert terminal.shown.endswith("\r\x1b[Kvm web1 deleted; while it is kept: trimtab vm undelete web1\n")
    # A line that is redrawn asks each second, for its figures.
    assert controller.asked("GET", "/v1/operations/op-01:wait")[0].query == {"timeout_s": "1"}


def test_states_have_colours_unless_colours_are_unwanted(
    environment_at_terminal: dict[str, str], controller: FakeController
) -> None:
    controller.on("GET", VMS, page(vm("web1"), vm("web2", state="crashed")))
    coloured = Terminal(environment_at_terminal, "vm", "list")
    assert coloured.end() == 0
    assert "\x1b[32mrunning" in coloured.shown
    assert "\x1b[31mcrashed" in coloured.shown
    for unwanted in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = Terminal({**environment_at_terminal, **unwanted}, "vm", "list")
        assert plain.end() == 0
        assert "\x1b" not in plain.shown


def test_only_the_last_column_of_a_table_is_cut(environment_at_terminal: dict[str, str], controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm(problem="disk full " * 50)))
    cut = Terminal(environment_at_terminal, "vm", "list")
    assert cut.end() == 0
    assert "…" in cut.shown
    wide = Terminal(environment_at_terminal, "vm", "list", "-o", "wide")
    assert wide.end() == 0
    assert "…" not in wide.shown
