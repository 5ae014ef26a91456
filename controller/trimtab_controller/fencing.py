"""Power devices: switches a host off through Debian's fence-agents and believes only a status that was read back as off.

An agent is a program that takes `key=value` lines on its standard input. Secrets are read from their file at each call and go the
same way, to those that run ipmitool by the environment: never into argv, a log line or an error. Exit status of `status`: 0 on, 2 off,
anything else unknown.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from trimtab_controller import ipmitool
from trimtab_protos.errors import InvalidRequest

AGENT_NAME = re.compile(r"fence_[a-z0-9_]{1,40}")
# What an operator says with `host confirm-off` is no power device: as a path it would confirm by itself.
REFUSED_AGENTS = frozenset({"fence_ack_manual"})
OPTION_NAME = re.compile(r"[a-z][a-z0-9_-]{0,40}")
AGENT_DIRECTORIES = (Path("/usr/sbin"), Path("/usr/local/sbin"))
PROGRAMS = Path("/usr/bin")
# What Debian's agents call and its package does not ask for: without it they end with the same status as for a device that is dead.
NEEDED = dict.fromkeys(
    ("fence_ipmilan", "fence_ipmilanplus", "fence_idrac", "fence_ilo3", "fence_ilo4", "fence_ilo5", "fence_imm"), "ipmitool"
)
SECRET_MAX = 400
# Programs to run, scripts to ask, files to write the whole conversation to.
_OF_THIS_MACHINE = ("_path", "_script", "_file")
CALL_TIMEOUT_S = 30.0
READ_BACK_EVERY_S = 0.5
_ON, _OFF = 0, 2


class Power(StrEnum):
    ON = "on"
    OFF = "off"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class FencePath:
    """One power device of a host. Its password is `secret`, or what `secret_file` holds; '' for a device without one."""

    name: str
    agent: str
    options: Mapping[str, str]
    secret_file: str = ""
    secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerAnswer:
    power: Power
    message: str = ""


class Fencer(Protocol):
    def status(self, path: FencePath) -> PowerAnswer:
        """Return whether the host has power; never changes anything."""

    def switch_off(self, path: FencePath, *, timeout_s: float, may_still: Callable[[], bool]) -> PowerAnswer:
        """Ask `may_still` once more, switch off, and return what the status then says; repeating it is harmless."""


def check_path(path: FencePath) -> None:
    """Raise InvalidRequest where this is no path that could ever work, naming the field."""
    if not AGENT_NAME.fullmatch(path.agent) or path.agent in REFUSED_AGENTS:
        raise InvalidRequest(
            "fence-agent-invalid", f"agent: {path.agent!r} is no power device; e.g. fence_redfish", field="agent"
        )
    for name, value in path.options.items():
        if not OPTION_NAME.fullmatch(name) or "\n" in value or len(value) > 400:
            raise InvalidRequest("fence-option-invalid", f"options: {name!r} is not of the form key=value", field="options")
        if name in {"password", "passwd", "action", "option"}:
            raise InvalidRequest(
                "fence-option-refused", f"options: {name} is not taken here; give the password as --secret-file", field="options"
            )
        if name.startswith("debug") or name.replace("-", "_").endswith(_OF_THIS_MACHINE):
            raise InvalidRequest(
                "fence-option-refused",
                f"options: {name} names a file or program of the controller's machine, which no request may choose",
                field="options",
            )
    if not path.secret.isprintable() or len(path.secret) > SECRET_MAX:
        raise InvalidRequest(
            "fence-secret-invalid", f"secret: one line of at most {SECRET_MAX} printable characters", field="secret"
        )


class FenceAgents:
    """Runs fence-agents of this machine."""

    def __init__(self, directories: tuple[Path, ...] = AGENT_DIRECTORIES, *, programs: Path = PROGRAMS) -> None:
        self._directories, self._programs = directories, programs

    def status(self, path: FencePath) -> PowerAnswer:
        return self._call(path, "status", timeout_s=CALL_TIMEOUT_S)

    def switch_off(self, path: FencePath, *, timeout_s: float, may_still: Callable[[], bool]) -> PowerAnswer:
        deadline = time.monotonic() + timeout_s
        if not may_still():
            return PowerAnswer(power=Power.UNKNOWN, message="not switched off: the host renews again, or we do not lead any more")
        told = self._call(path, "off", timeout_s=timeout_s)
        while True:
            seen = self._call(path, "status", timeout_s=CALL_TIMEOUT_S)
            if seen.power is Power.OFF or time.monotonic() >= deadline:
                break
            time.sleep(READ_BACK_EVERY_S)  # devices take some seconds between "accepted" and "off"
        if seen.power is Power.OFF:
            return seen
        return PowerAnswer(power=seen.power, message=f"told to switch off ({told.message or 'ok'}); status is {seen.power.value}")

    def _call(self, path: FencePath, action: str, *, timeout_s: float) -> PowerAnswer:
        program = self._program(path.agent)
        if program is None:
            return PowerAnswer(
                power=Power.UNKNOWN, message=f"{path.agent} is not installed here; apt install {_package(path.agent)}"
            )
        needed = NEEDED.get(path.agent)
        if needed is not None and not (self._programs / needed).is_file():
            message = f"{path.agent} needs {needed}, which is not installed here; apt install {needed}"
            return PowerAnswer(power=Power.UNKNOWN, message=message)
        lines = [f"{name}={value}" for name, value in sorted(path.options.items())] + [f"action={action}"]
        try:
            secret = path.secret or (Path(path.secret_file).read_text().strip() if path.secret_file else "")
        except OSError as error:
            return PowerAnswer(power=Power.UNKNOWN, message=f"secret file {path.secret_file}: {error.strerror}")
        environment = dict(os.environ)
        if needed == "ipmitool" and secret:
            lines.append(f"ipmitool_path={_own_ipmitool()}")
            environment[ipmitool.VARIABLE] = secret
        elif secret:
            lines.append(f"password={secret}")
        try:
            status = _run(program, "\n".join(lines) + "\n", environment, timeout_s=max(1.0, timeout_s))
        except subprocess.TimeoutExpired:
            return PowerAnswer(power=Power.UNKNOWN, message=f"{path.agent} did not answer within {timeout_s:.0f} s")
        except OSError as error:
            return PowerAnswer(power=Power.UNKNOWN, message=f"{path.agent}: {error.strerror}")
        statuses = {_ON: Power.ON, _OFF: Power.OFF} if action == "status" else {}
        power = statuses.get(status, Power.UNKNOWN)
        failed = power is Power.UNKNOWN and status != 0
        # Of an agent's words only the exit status is passed on: some print their whole input when they fail.
        return PowerAnswer(power=power, message=f"{path.agent} ended with status {status}" if failed else "")

    def _program(self, agent: str) -> Path | None:
        if not AGENT_NAME.fullmatch(agent):
            return None
        return next((found for directory in self._directories if (found := directory / agent).is_file()), None)


def _own_ipmitool() -> Path:
    """Return `trimtab-ipmitool`, which is installed beside this process' Python."""
    return Path(sys.executable).with_name("trimtab-ipmitool")


def _run(program: Path, said: str, environment: Mapping[str, str], *, timeout_s: float) -> int:
    """Return the agent's exit status. It and whatever it started (ipmitool, ssh) are ended at the bound: an agent that is killed
    alone leaves them behind, at work on the device."""
    with subprocess.Popen(
        [str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    ) as agent:
        try:
            agent.communicate(said, timeout=timeout_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            raise
        return agent.returncode


def _package(_agent: str) -> str:
    return "fence-agents"
