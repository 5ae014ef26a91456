"""The few questions and orders for systemd that joining and leaving need, through `systemctl`."""

import subprocess
from typing import Protocol

from trimtab_protos.errors import Internal, Unavailable

TIMEOUT_S = 90.0
"""systemd's own limit for a job, after which it kills the unit."""


class Systemctl(Protocol):
    """What is used of systemd."""

    def enablement(self, unit: str) -> str:
        """Return `enabled`, `disabled`, `masked`, `static`, ... or `not-found`."""

    def is_active(self, unit: str) -> bool: ...

    def set_enablement(self, unit: str, word: str, *, before: str | None = None) -> None:
        """Make `enablement` say `enabled`, `disabled` or `masked`; other words are left alone. Starts and stops nothing.

        `before`: what it says now, where the caller just asked.
        """

    def run(self, verb: str, unit: str) -> None:
        """start, stop, restart; or daemon-reload with an empty unit."""


class RealSystemctl:
    """`systemctl` from the search path."""

    def enablement(self, unit: str) -> str:
        return _run("is-enabled", unit).stdout.strip() or "not-found"

    def is_active(self, unit: str) -> bool:
        return _run("is-active", unit).stdout.strip() == "active"

    def set_enablement(self, unit: str, word: str, *, before: str | None = None) -> None:
        before = self.enablement(unit) if before is None else before
        if before in {word, "not-found"}:
            return
        if before == "masked":
            self.run("unmask", unit)
        verb = {"enabled": "enable", "disabled": "disable", "masked": "mask"}.get(word)
        if verb is not None:
            self.run(verb, unit)

    def run(self, verb: str, unit: str) -> None:
        done = _run(verb, *([unit] if unit else []))
        if done.returncode != 0:
            raise Internal(
                "systemctl-failed", f"systemctl {verb} {unit} failed: {done.stderr.strip()[:300]}", verb=verb, unit=unit
            )


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            ["systemctl", "--no-ask-password", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise Unavailable("systemd-missing", "this host has no systemctl; Trimtab needs systemd") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable("systemd-silent", f"systemctl {' '.join(arguments)} did not end in {TIMEOUT_S:g} s") from error
