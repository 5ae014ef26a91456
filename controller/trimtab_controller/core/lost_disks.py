"""Which vms come back from their last backup by themselves, once their disks are lost with their host. Pure.

Only one that is proven not to run, and whose every disk was on that host: a disk elsewhere is newer than the backup, and both together
would be a state that never was.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

# A host that only rebooted brings its disks back, and loses nothing.
AFTER = timedelta(minutes=5)
# Proofs that cover a guest which the warden leaves alone since its disks are local.
PROOFS = frozenset({"power_off", "operator", "clean_stop"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """What is known of a vm whose host is fenced."""

    vm_name: str
    proof: str
    fenced_at: datetime | None
    is_wanted: bool
    """It is to run, and nobody has taken it out of failover's hands."""
    has_policy: bool
    """Its backup policy says that it comes back."""
    is_all_local: bool
    has_snapshots: bool
    is_all_files: bool = True
    """None of its disks is in a pool without files, where nothing is restored to."""
    backup_id: str
    """Its newest whole backup; '' for none."""
    backup_at: datetime | None
    disks_match: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    is_due: bool
    why: str
    """What the operator reads while it waits, or of what keeps it from coming back; '' where none of this concerns it."""


def judge(lost: Lost, *, now: datetime, after: timedelta = AFTER) -> Answer:
    """Tell whether the vm's disks are to be restored now: `after` so long beyond the proof."""
    if not (lost.is_wanted and lost.has_policy):
        return Answer(is_due=False, why="")
    if lost.proof not in PROOFS or lost.fenced_at is None:
        return Answer(is_due=False, why="nothing proves that its guest ended: only power off, or an operator's word, does")
    if not lost.is_all_local:
        return Answer(
            is_due=False, why="only some of its disks are lost; with the others, a backup would be a state that never was"
        )
    if lost.has_snapshots:
        return Answer(is_due=False, why="it has snapshots or clones, which a backup knows nothing of")
    if not lost.backup_id or lost.backup_at is None:
        return Answer(is_due=False, why="its policy would bring it back, and there is no whole backup of it")
    if not lost.is_all_files:
        return Answer(
            is_due=False,
            why=f"it has a disk in a pool without files, and what is restored is a file: `trimtab backup restore {lost.backup_id} --as NAME`",
        )
    if not lost.disks_match:
        return Answer(is_due=False, why=f"it has other disks than backup {lost.backup_id}")
    told = f"backup {lost.backup_id}, which loses {loss_text((now - lost.backup_at).total_seconds())} of it"
    left = lost.fenced_at + after - now
    if left > timedelta(0):
        return Answer(is_due=False, why=f"unless its host returns it comes back in {left.total_seconds():.0f} s from {told}")
    return Answer(is_due=True, why=f"its disks come back from {told}")


def foresee(lost: Lost, *, now: datetime) -> Answer:
    """Tell what would become of a vm on local disks, were its host lost now and proven off; `why` is never empty."""
    if not lost.has_policy:
        return Answer(is_due=False, why="its backup policy does not bring it back (`--recover-lost`)")
    if not lost.is_wanted:
        return Answer(is_due=False, why="it is not kept: `--ha restart`, switched on, and nothing that needs an operator")
    return judge(replace(lost, proof="power_off", fenced_at=now - AFTER), now=now)


def loss_text(seconds: float) -> str:
    """Return a span for people: `2 h 5 min`, `40 s`."""
    whole = max(0, int(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"
