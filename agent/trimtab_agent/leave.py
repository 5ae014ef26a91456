"""Makes a host a plain libvirt machine again: what the join changed is restored, guests and their disks are not touched."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from trimtab_agent.host_setup import AGENT_UNIT, BEACON_UNIT, WARDEN_UNIT, restart_libvirtd
from trimtab_agent.join import CERTIFICATE_DIRECTORY, STATE_DIRECTORY
from trimtab_agent.libvirt_tls import LibvirtCertificates
from trimtab_agent.systemd import Systemctl
from trimtab_agent.undo import UndoLog
from trimtab_protos.errors import NotFound, TrimtabError

log = structlog.get_logger(__name__)

STATE_FILES = (
    "join.json",
    "gateways.json",
    "journal.db",
    "journal.db-wal",
    "journal.db-shm",
    "agent.lock",
    "warden-killed.jsonl",
    "uplinks.json",
)


def stop_units(systemctl: Systemctl) -> None:
    """Stop what the join made, the warden first: without the agent it would end the guests when the lease does.

    Also what does not run just now: an agent that the fleet refuses ends by itself, and systemd is about to start it anew.
    """
    for unit in (WARDEN_UNIT, BEACON_UNIT, AGENT_UNIT):
        if systemctl.enablement(unit) != "not-found":
            systemctl.run("stop", unit)


def leave(
    systemctl: Systemctl,
    *,
    root: Path = Path("/"),
    keep_certificates: bool = False,
    release: Callable[[], Sequence[str]] = tuple,
) -> Sequence[str]:
    """Undo the join; return what was undone, for people. May be repeated after a cut. NotFound where this host is no member.

    The agent's unit is disabled, not stopped: the caller may be that agent. `keep_certificates` keeps the identity, with which
    the host can prove who it was when it joins the same fleet again, and its domains stay Trimtab's; without it `release` makes
    them plain ones and says what it did.
    """
    state, certificates = root / STATE_DIRECTORY, root / CERTIFICATE_DIRECTORY
    undo = UndoLog(state / "undo.json", root=root)
    if not undo.exists():
        raise NotFound("not-a-member", "this host is in no fleet")
    undone = [] if keep_certificates else list(release())
    # First of the files, so that the directories which the join made are empty when their turn comes.
    LibvirtCertificates(root).remove()
    undone.append("libvirt's certificates of the fleet removed")
    undone += undo.restore(systemctl, kept=(certificates,) if keep_certificates else ())
    for name in STATE_FILES:
        (state / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody keeps something there, or it is a mount point
        state.rmdir()
    try:
        restart_libvirtd(systemctl)
        undone.append("libvirtd restarted with its former settings (guests go on running)")
    except TrimtabError as error:
        # Everything is undone; only the running daemon still has the old settings.
        log.warning("libvirtd not restarted", error=error.message)
        undone.append("libvirtd could not be restarted; restart it by hand")
    return undone
