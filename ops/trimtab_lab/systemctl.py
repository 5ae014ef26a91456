"""The `systemctl` of a lab host: the verbs that a joining agent uses, over the init's services. Standard library only.

Runs in two places: `main` is the command inside the host, `answer` is the init's side. Units that a fresh Debian host has
but the lab does not run (libvirtd's sockets, libvirt-guests) are kept as words only: enabled or not, active or not.
"""

import json
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trimtab_lab.supervisor import Supervisor

CONTROL_SOCKET = Path("/run/trimtab-lab/control.sock")
ANSWER_TIMEOUT_S = 60.0

INERT_UNITS = {
    # unit → enabled on a fresh Debian 12 with libvirt-daemon-system
    "libvirtd.socket": True,
    "libvirtd-ro.socket": True,
    "libvirtd-admin.socket": True,
    "libvirtd-tls.socket": False,
    "libvirtd-tcp.socket": False,
    "virtlogd.socket": True,
    "virtlockd.socket": True,
    "libvirt-guests": True,
    "trimtab-agent.socket": False,
}
STATE_CODES = {"running": "active", "starting": "activating", "stopping": "deactivating", "backoff": "activating"}


@dataclass(frozen=True, slots=True)
class Reply:
    code: int
    output: str = ""
    error: str = ""


REBOOT = Reply(0, output="rebooting")
"""After it was sent the init ends everything and begins anew."""


class UnitWords:
    """What was said about each unit and outlives a boot: enabled, disabled, masked; and which inert one was started."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._enabled: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        self._active = dict(INERT_UNITS)
        for unit, word in self._enabled.items():
            if unit in INERT_UNITS:
                self._active[unit] = word == "enabled"

    def enablement(self, unit: str, *, default: str) -> str:
        return self._enabled.get(unit, default)

    def set_enablement(self, unit: str, word: str) -> None:
        self._enabled[unit] = word
        replacement = self._file.with_suffix(".new")
        replacement.write_text(json.dumps(self._enabled))
        replacement.replace(self._file)

    def is_active(self, unit: str) -> bool:
        return self._active[unit]

    def set_active(self, unit: str, *, is_active: bool) -> None:
        self._active[unit] = is_active


def without_suffix(unit: str) -> str:
    return unit.removesuffix(".service")


def answer(arguments: list[str], supervisor: Supervisor, words: UnitWords) -> tuple[Reply, list[str]]:
    """Acts, and returns the reply together with the services that must settle before the reply is sent."""
    flags = [each for each in arguments if each.startswith("-")]
    plain = [each for each in arguments if not each.startswith("-")]
    if "-p" in arguments:
        plain.remove(arguments[arguments.index("-p") + 1])
        flags.append(f"--property={arguments[arguments.index('-p') + 1]}")
    if not plain:
        return Reply(1, error="Too few arguments."), []
    verb, units = plain[0], [without_suffix(each) for each in plain[1:]]
    if verb in ("daemon-reload", "daemon-reexec", "reset-failed"):
        return Reply(0), []
    if verb == "reboot":
        return REBOOT, []
    if verb == "is-system-running":
        return Reply(0, output="running\n"), []
    unknown = [unit for unit in units if unit not in supervisor.services and unit not in INERT_UNITS]
    if unknown and verb not in ("is-active", "is-enabled", "show", "is-failed"):
        return Reply(5, error=f"Unit {unknown[0]}.service not found."), []
    if not units:
        return Reply(1, error="Too few arguments."), []
    if verb in _ASKING:
        return _ask(verb, units, flags, supervisor=supervisor, words=words), []
    return _command(verb, units, flags, supervisor=supervisor, words=words)


_ASKING = ("is-active", "is-enabled", "is-failed", "show", "status", "cat")


def _command(
    verb: str, units: list[str], flags: list[str], *, supervisor: Supervisor, words: UnitWords
) -> tuple[Reply, list[str]]:
    waiting: list[str] = []
    acts: dict[str, Callable[[str], None]] = {
        "start": supervisor.start,
        "stop": supervisor.stop,
        "restart": supervisor.restart,
        "try-restart": supervisor.restart,
        "reload-or-restart": supervisor.restart,
        "reload": supervisor.reload,
        "kill": supervisor.reload,
    }
    for unit in units:
        act = verb
        if verb in ("enable", "disable", "mask", "unmask"):
            words.set_enablement(unit, {"enable": "enabled", "mask": "masked"}.get(verb, "disabled"))
            if "--now" not in flags:
                continue
            act = "start" if verb == "enable" else "stop"
        if act not in acts:
            return Reply(1, error=f"Unknown command verb {verb}."), []
        if act != "stop" and words.enablement(unit, default="") == "masked":
            return Reply(1, error=f"Failed to {act} {unit}: Unit {unit} is masked."), []
        if unit in INERT_UNITS:
            words.set_active(unit, is_active=act != "stop")
            continue
        if verb.startswith("try-") and supervisor.services[unit].process_id is None:
            continue
        acts[act](unit)
        waiting.append(unit)
    return Reply(0), [] if "--no-block" in flags else waiting


def settled_reply(reply: Reply, services: list[str], supervisor: Supervisor) -> Reply:
    """The reply after waiting: a service that died while starting fails the command, as systemd says it."""
    for name in services:
        if supervisor.services[name].state == "backoff":
            return Reply(1, error=f"Job for {name}.service failed; see /var/log/trimtab/{name}.log.")
    return reply


def _ask(verb: str, units: list[str], flags: list[str], *, supervisor: Supervisor, words: UnitWords) -> Reply:
    lines = []
    is_good = False
    for unit in units:
        active = _active_word(unit, supervisor, words)
        enabled = _enabled_word(unit, supervisor, words)
        match verb:
            case "is-active":
                lines.append(active)
                is_good |= active == "active"
            case "is-enabled":
                lines.append(enabled)
                is_good |= enabled == "enabled"
            case "is-failed":
                lines.append(active)
            case "show":
                lines += _properties(unit, flags, active=active, enabled=enabled, supervisor=supervisor)
                is_good = True
            case _:
                lines.append(f"{unit}: {active} ({enabled})")
                is_good |= active == "active"
    quiet = "-q" in flags or "--quiet" in flags
    failed_code = 1 if verb == "is-enabled" else 3
    return Reply(0 if is_good else failed_code, output="" if quiet else "\n".join(lines) + "\n")


def _active_word(unit: str, supervisor: Supervisor, words: UnitWords) -> str:
    if unit in supervisor.services:
        return STATE_CODES.get(supervisor.services[unit].state, "inactive")
    return "active" if unit in INERT_UNITS and words.is_active(unit) else "inactive"


def _enabled_word(unit: str, supervisor: Supervisor, words: UnitWords) -> str:
    if unit in INERT_UNITS:
        return words.enablement(unit, default="enabled" if INERT_UNITS[unit] else "disabled")
    if unit in supervisor.services:
        is_libvirt = supervisor.services[unit].definition.condition is None
        return words.enablement(unit, default="enabled" if is_libvirt else "disabled")
    return "not-found"


def _properties(unit: str, flags: list[str], *, active: str, enabled: str, supervisor: Supervisor) -> list[str]:
    service = supervisor.services.get(unit)
    known = {
        "Id": f"{unit}.service",
        "LoadState": {"masked": "masked", "not-found": "not-found"}.get(enabled, "loaded"),
        "ActiveState": active,
        "SubState": {"active": "running"}.get(active, "dead"),
        "UnitFileState": enabled,
        "MainPID": str(service.process_id or 0) if service else "0",
        "NRestarts": str(max(0, service.starts - 1)) if service else "0",
        "ExecMainStatus": str(service.last_exit or 0) if service else "0",
    }
    asked = [name for flag in flags if flag.startswith("--property=") for name in flag.partition("=")[2].split(",")] or list(
        known
    )
    is_bare = "--value" in flags
    return [known.get(name, "") if is_bare else f"{name}={known.get(name, '')}" for name in asked]


def main(arguments: list[str]) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_TIMEOUT_S)
        connection.connect(str(CONTROL_SOCKET))
        connection.sendall(json.dumps(arguments).encode() + b"\n")
        with connection.makefile("r") as answered:
            line = answered.readline()
    if not line:
        sys.stderr.write("the host's init closed the connection\n")
        return 1
    reply = Reply(**json.loads(line))
    sys.stdout.write(reply.output)
    if reply.error:
        sys.stderr.write(reply.error + "\n")
    return reply.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
