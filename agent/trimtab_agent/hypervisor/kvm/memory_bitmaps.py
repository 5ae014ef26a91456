"""What changes on disks that keep no bitmaps: raw ones, such as LUNs. libvirt makes checkpoints on qcow2 only; QEMU follows any disk.

A checkpoint of such a disk is a bitmap in QEMU's memory, of the same name as libvirt's of the others, and ends with QEMU: stop, crash,
migration. It is added just before the instant, and the one before it goes on until the backup is listed: both say a little more than
what changed, never less, so that nothing has to happen at one moment. libvirt is not told, so it has nothing to trip over.

    add N ── backupBegin ── copy of B, standing still, beside libvirt's exports ── read ── N is kept, B removed; or N removed
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_agent.hypervisor.kvm import monitor

PREFIX = "tt-"
_READ = f"{PREFIX}read"
"""The copy that is read: a bitmap that goes on is not served to a reader."""


@dataclass(frozen=True, slots=True)
class Followed:
    """A disk of a running domain, as QEMU knows it."""

    node: str
    bitmaps: frozenset[str]


def followed(domain: Any) -> Mapping[str, Followed]:
    """Return alias → disk, of every disk of the domain."""
    found = {}
    for block in monitor.ask(domain, "query-block"):
        inserted, alias = block.get("inserted"), _alias_of(block.get("qdev", ""))
        if inserted is None or not alias:
            continue
        names = (one.get("name", "") for one in inserted.get("dirty-bitmaps", ()))
        found[alias] = Followed(inserted["node-name"], frozenset(name for name in names if name.startswith(PREFIX)))
    return found


def add(domain: Any, disk: Followed, checkpoint: str) -> None:
    """Follow the disk from now on under this name."""
    if checkpoint in disk.bitmaps:
        remove(domain, disk, checkpoint)
    monitor.ask(domain, "block-dirty-bitmap-add", node=disk.node, name=checkpoint, persistent=False)


def remove(domain: Any, disk: Followed, checkpoint: str) -> None:
    monitor.ask(domain, "block-dirty-bitmap-remove", node=disk.node, name=checkpoint)


def serve(domain: Any, disk: Followed, checkpoint: str, export: str) -> str:
    """Serve what changed since the checkpoint beside what libvirt's job serves; return the context that says it."""
    at = {"node": disk.node, "name": _READ}
    if _READ in disk.bitmaps:  # of an agent that died here
        monitor.ask(domain, "block-dirty-bitmap-remove", **at)
    actions = [
        {"type": "block-dirty-bitmap-add", "data": {**at, "disabled": True, "persistent": False}},
        {"type": "block-dirty-bitmap-merge", "data": {"node": disk.node, "target": _READ, "bitmaps": [checkpoint]}},
    ]
    monitor.ask(domain, "transaction", actions=actions)
    named = {"type": "nbd", "id": export, "node-name": disk.node, "name": export, "writable": False, "bitmaps": [_READ]}
    monitor.ask(domain, "block-export-add", **named)
    return f"qemu:dirty-bitmap:{_READ}"


def end(domain: Any, disk: Followed, export: str) -> None:
    """End what `serve` began."""
    monitor.ask(domain, "block-export-del", id=export, mode="hard")
    monitor.ask(domain, "block-dirty-bitmap-remove", node=disk.node, name=_READ)


def keep_only(domain: Any, aliases: Iterable[str], checkpoint: str) -> None:
    """Remove what older checkpoints of these disks left in QEMU's memory."""
    for disk in _of(domain, aliases):
        for name in disk.bitmaps - {checkpoint}:
            remove(domain, disk, name)


def drop(domain: Any, aliases: Iterable[str], checkpoint: str) -> None:
    for disk in _of(domain, aliases):
        if checkpoint in disk.bitmaps:
            remove(domain, disk, checkpoint)


def _of(domain: Any, aliases: Iterable[str]) -> Iterable[Followed]:
    wanted = set(aliases)
    if not wanted or not domain.isActive():
        return []
    return [disk for alias, disk in followed(domain).items() if alias in wanted]


def _alias_of(device: str) -> str:
    """Return ua-vol-1 of /machine/peripheral/ua-vol-1/virtio-backend."""
    _, found, rest = device.partition("/peripheral/")
    return rest.partition("/")[0] if found else ""
