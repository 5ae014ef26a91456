"""How repositories, policies, backups and protection are shown to people."""

from datetime import datetime

from trimtab_controller.cli import humanise, render
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource


def _size(path: str) -> Column:
    return Column(path.removesuffix("_bytes"), path, lambda item, _now: humanise.size(item.get(path)))


def _since(header: str, path: str, *, is_wide: bool = False) -> Column:
    return Column(header, path, lambda item, now: humanise.since(item.get(path), now), is_wide=is_wide)


def _proof(item: Document, now: datetime) -> str:
    """A backup is good only as far as it was proven, and as long ago."""
    state, level = str(item.get("state", "")), str(item.get("level", ""))
    if state != "ready":
        return state
    if not item.get("verified_at"):
        return f"{level}, never read back"
    return f"{level}, {humanise.since(item.get('verified_at'), now)}"


def _proof_wanted(item: Document) -> str:
    wanted = [str(item.get("verify", ""))]
    wanted += [f"`{item['verify_pattern']}`"] if item.get("verify_pattern") else []
    wanted += [f"tcp {item['verify_tcp']}"] if item.get("verify_tcp") else []
    return ", ".join(wanted)


def _window(item: Document, _now: datetime) -> str:
    seconds = item.get("loss_window_s")
    return "everything" if seconds is None else humanise.duration(seconds)


def describe_backup(item: Document) -> None:
    moment = render.now()
    render.pairs(
        [
            ("id", str(item.get("id", ""))),
            ("vm", str(item.get("vm", ""))),
            ("repository", str(item.get("repo", ""))),
            ("state", str(item.get("state", ""))),
            ("proof", _proof(item, moment)),
            ("problem", str(item.get("problem") or "")),
            ("consistency", str(item.get("consistency", ""))),
            ("downgraded because", str(item.get("downgrade") or "")),
            ("taken", humanise.since(item.get("taken_at"), moment)),
            ("increment of", str(item.get("base_id") or "")),
            ("read in full because", str(item.get("full_reason") or "")),
            ("booted", humanise.since(item.get("booted_at"), moment) if item.get("booted_at") else ""),
            ("held until", str(item.get("held_until") or "")),
        ]
    )
    disks = item.get("disks") or []
    if disks:
        render.heading("disks")
        rows = [
            [str(one.get("name", "")), *(humanise.size(one.get(f"{what}_bytes")) for what in ("size", "dirty", "read", "stored"))]
            for one in disks
        ]
        render.table(["DISK", "SIZE", "DIRTY", "READ", "STORED"], rows)


REPO = Resource(
    noun="backup repository",
    collection="backup-repos",
    is_fleet=True,
    columns=(
        Column("name", "name"),
        Column("state", "state"),
        Column("url", "url"),
        Column("backups", "backups"),
        _size("size_bytes"),
        _size("stored_bytes"),
        Column("dedup", "dedup_ratio"),
        Column("host", "host", is_wide=True),
        Column("project", "project", is_wide=True),
        Column("key", "key_id", is_wide=True),
        Column("problem", "problem", is_wide=True),
        _since("pruned", "pruned_at", is_wide=True),
    ),
)

POLICY = Resource(
    noun="backup policy",
    collection="backup-policies",
    columns=(
        Column("name", "name"),
        Column("schedule", "schedule"),
        Column("repo", "repo"),
        Column("keeps", "keep_last", lambda item, _now: _keeps(item)),
        Column("verify", "verify", lambda item, _now: _proof_wanted(item)),
        Column("vms", "vms"),
        Column("demands", "needs_filesystem", lambda item, _now: _demands(item), is_wide=True),
        Column("zone", "zone", is_wide=True),
        Column("next", "next_at", is_wide=True),
    ),
)

BACKUP = Resource(
    noun="backup",
    collection="backups",
    columns=(
        Column("id", "id"),
        Column("vm", "vm"),
        _since("taken", "taken_at"),
        Column("proof", "level", _proof),
        Column("consistency", "consistency"),
        _size("size_bytes"),
        _size("read_bytes"),
        _size("stored_bytes"),
        Column("repo", "repo", is_wide=True),
        Column("base", "base_id", is_wide=True),
        Column("full because", "full_reason", is_wide=True),
        Column("problem", "problem", is_wide=True),
    ),
    describe=describe_backup,
)

STATUS = Resource(
    noun="protection",
    collection="backup-status",
    columns=(
        Column("vm", "vm"),
        Column("policy", "policy"),
        Column("would lose", "loss_window_s", _window),
        _since("last good", "last_good_at"),
        _since("verified", "last_verified_at"),
        _since("booted", "last_booted_at"),
        Column("problem", "problem"),
        Column("next", "next_at", is_wide=True),
        Column("last good id", "last_good", is_wide=True),
    ),
)


def _demands(item: Document) -> str:
    """What of its guest a backup needs to be kept."""
    if item.get("needs_application"):
        return "application"
    return "filesystem" if item.get("needs_filesystem") else ""


def _keeps(item: Document) -> str:
    kept = [(period, item.get(f"keep_{period}")) for period in ("last", "hourly", "daily", "weekly", "monthly", "yearly")]
    return " ".join(f"{count} {period}" for period, count in kept if count) or "everything"
