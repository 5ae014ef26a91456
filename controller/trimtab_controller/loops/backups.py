"""Policies at work: backups that are due, their verification, retention, prune, and the figures that tell who is not protected.

    due ── backup.run ── backup.verify (where the policy says so) ── retention hides what no period is left for ── backup.prune

Every round looks at rows only; what it accepts are operations like anybody else's.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.model import Actor, Backup, BackupPolicy, Vm
from trimtab_controller.core.retention import Candidate, Proof, judge
from trimtab_controller.core.schedule import parse_schedule
from trimtab_controller.nudge import Nudger
from trimtab_controller.services import backup_instants, backup_restore, backup_status, backups
from trimtab_controller.store import backup_repos, identity, leases, operations, vms, volumes
from trimtab_controller.store import backups as backup_store
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

SYSTEM = Actor(name="system:backups")
VMS_MAX = 10_000
# A backup that could not be asked for (its vm migrates) is asked for again this soon, not at the policy's next turn.
RETRY = timedelta(minutes=2)
PRUNE_EVERY = timedelta(hours=6)
KEEP_FAILED = timedelta(days=7)
BATCH = 200
BOOT_TIMEOUT_S = 600
BOOT_RETRY = timedelta(hours=1)
READ_AGAIN_AFTER = timedelta(days=30)
# What no guest has on its disks any more is never repaired: such a backup is not read again after each of a night's backups.
REREAD_EVERY = timedelta(hours=12)


class BackupLoop:
    def __init__(self, *, db: Database, clock: Clock, nudger: Nudger, read_again_after: timedelta = READ_AGAIN_AFTER) -> None:
        """`read_again_after` 0: what was read back once is not read again."""
        self._db, self._clock, self._nudger = db, clock, nudger
        self._read_again_after = read_again_after
        self._not_before: dict[str, datetime] = {}

    def ask(self, term: int) -> None:
        """Accept a backup of every vm whose policy says that it is due."""
        now = self._clock.now()
        policies, found = self._db.read(_with_policies)
        accepted = 0
        for group in (one for one in policies.values() if one.is_together):
            accepted += self._ask_together(term, group, [vm for vm in found if vm.backup_policy_id == group.id], now)
        for vm in found:
            policy = policies.get(vm.backup_policy_id)
            if policy is None or policy.is_together or self._not_before.get(vm.id, now) > now or not _is_due(policy, vm, now):
                continue
            accepted += self._ask_one(term, vm, now)
        if accepted:
            self._nudger.nudge()

    def verify(self, term: int) -> None:
        """Accept the verification of new backups whose vm's policy wants one, and of damaged ones that may be repaired."""
        now = self._clock.now()

        def work(session: Session) -> int:
            leases.assert_leader(session, term)
            policies, found = _with_policies(session)
            wanting = {vm.id for vm in found if _wants_proof(policies.get(vm.backup_policy_id))}
            unproven = [one for one in _newest(session, wanting) if _is_new(one)]
            unproven += self._perhaps_repaired(session, now)
            for backup in unproven:
                if not operations.page(session, limit=1, subject_id=backup.id, kind="backup.verify", is_done=False):
                    backups.accept_verify(session, backup, actor=SYSTEM, now=now)
            by_id = {vm.id: policies[vm.backup_policy_id] for vm in found}
            # One after the other: each takes the room of a vm.
            is_free = not operations.page(session, limit=1, kind="backup.boot", is_done=False)
            unbooted = [one for one in _newest(session, wanting) if by_id[one.vm_id].verify == "boot" and _is_bootable(one)]
            for backup in unbooted[: 1 if is_free else 0]:
                self._boot(session, backup, by_id[backup.vm_id], now)
            return len(unproven) + len(unbooted)

        if self._db.write(work):
            self._nudger.nudge()

    def read_again(self, term: int) -> None:
        """Accept the reading of the backup that was read back longest ago, where that is too long: what lies still rots unseen.

        One at a time in the whole fleet, and whatever others verify goes first: it takes as long as it takes.
        """
        now = self._clock.now()

        def work(session: Session) -> bool:
            leases.assert_leader(session, term)
            found = backup_store.longest_unread(session, read_before=now - self._read_again_after)
            if found is None or operations.page(session, limit=1, kind="backup.verify", is_done=False):
                return False
            backups.accept_verify(session, found, actor=SYSTEM, now=now)
            return True

        if self._read_again_after and self._db.write(work):
            self._nudger.nudge()

    def retain(self, term: int) -> None:
        """Hide what no period of its policy is left for, let each repository forget it, and prune each now and then."""
        now = self._clock.now()

        def work(session: Session) -> int:
            leases.assert_leader(session, term)
            backup_store.delete_failed_before(session, now - KEEP_FAILED, limit=BATCH)
            gone = _superfluous(session, now)
            count = 0
            for repo in backup_repos.live(session):
                if repo.state != "ready" or operations.live_background(session, repo.id, "backup.prune"):
                    continue
                mine = [one for one in gone if one.repo_id == repo.id][:BATCH]
                is_time = repo.pruned_at is None or now - repo.pruned_at >= PRUNE_EVERY
                if mine:
                    backups.forget(session, mine, actor=SYSTEM, now=now)
                elif is_time and backup_store.of_repo(session, repo.id):
                    backups.prune_repo(session, repo, actor=SYSTEM, now=now)
                else:
                    continue
                count += 1
            return count

        if self._db.write(work):
            self._nudger.nudge()

    def measure(self, _term: int) -> None:
        """Set the figures: how many vms lack what, the oldest of each, bytes and dedup of each repository."""
        now = self._clock.now()
        found = self._db.read(lambda session: backup_status.status(session, project_ids=None, now=now))
        totals, repos = self._db.read(lambda session: (backup_store.totals(session), backup_repos.live(session)))
        protected = [one for one in found if one.policy is not None]
        metrics.BACKUP_VMS.labels("with_policy").set(len(protected))
        metrics.BACKUP_VMS.labels("overdue").set(sum(1 for one in protected if one.protection.problem))
        metrics.BACKUP_VMS.labels("without_backup").set(sum(1 for one in found if one.protection.last_good is None))
        ages = {
            "last_good": [one.protection.loss_window_s for one in protected],
            "last_verified": [_age(_verified_at(one.protection.last_verified), now) for one in protected],
            "last_booted": [_age(_booted_at(one.protection.last_booted), now) for one in protected],
            "widest_gap": [one.protection.widest_gap_s for one in protected],
        }
        for what, seconds in ages.items():
            metrics.BACKUP_WORST_SECONDS.labels(what).set(max((one for one in seconds if one is not None), default=0.0))
        recoveries = [one.protection.last_booted.recovery_ms for one in protected if one.protection.last_booted]
        metrics.BACKUP_WORST_SECONDS.labels("recovery").set(max(recoveries, default=0) / 1000)
        newest = [one.protection.last_good for one in found if one.protection.last_good is not None]
        for what in ("size", "dirty", "read", "stored"):
            metrics.BACKUP_LAST_BYTES.labels(what).set(sum(getattr(one, f"{what}_bytes") for one in newest))
        for repo in repos:
            count, size_bytes, stored_bytes = totals.get(repo.id, (0, 0, 0))
            metrics.BACKUP_REPO_BACKUPS.labels(repo.name).set(count)
            metrics.BACKUP_REPO_BYTES.labels(repo.name, "disks").set(size_bytes)
            metrics.BACKUP_REPO_BYTES.labels(repo.name, "stored").set(stored_bytes)
            metrics.BACKUP_REPO_BYTES.labels(repo.name, "kept").set(repo.kept_bytes)
            metrics.BACKUP_DEDUP_RATIO.labels(repo.name).set(size_bytes / stored_bytes if stored_bytes else 0.0)

    def _perhaps_repaired(self, session: Session, now: datetime) -> list[Backup]:
        """Return the damaged backup of each repository that was read longest ago, where one was made since any of them was read.

        One stands for all: its verification judges the others too.
        """
        found = []
        for repo in backup_repos.live(session):
            damaged = sorted(backup_store.damaged(session, repo.id), key=_read_at)
            if not damaged or repo.state != "ready" or self._not_before.get(repo.id, now) > now:
                continue
            made_at = backup_store.last_taken(session, repo.id)
            if made_at is not None and made_at > _read_at(damaged[-1]):
                self._not_before[repo.id] = now + REREAD_EVERY
                found.append(damaged[0])
        return found

    def _boot(self, session: Session, backup: Backup, policy: BackupPolicy, now: datetime) -> None:
        project = identity.find_project(session, backup.project_id)
        if project is None or self._not_before.get(backup.id, now) > now:
            return
        # One that was refused, or lost its host, is asked for again. One that ended has given the backup its level.
        self._not_before[backup.id] = now + BOOT_RETRY
        try:
            with session.begin_nested():
                backup_restore.boot_test(
                    session,
                    backup,
                    project=project,
                    pattern=policy.verify_pattern,
                    tcp_port=policy.verify_tcp,
                    timeout_s=BOOT_TIMEOUT_S,
                    actor=SYSTEM,
                    now=now,
                )
        except TrimtabError as error:
            backup_store.update(session, backup.id, problem=f"boot test not begun: {error.message}"[:1000])
            log.warning("boot test not accepted", backup_id=backup.id, code=error.code, error=error.message)

    def _ask_together(self, term: int, policy: BackupPolicy, members: Sequence[Vm], now: datetime) -> bool:
        """Accept one instant of all vms of the policy, where it is due; a single one is backed up by itself."""
        if not members or self._not_before.get(policy.id, now) > now or not any(_is_due(policy, vm, now) for vm in members):
            return False
        if len(members) == 1:
            return self._ask_one(term, members[0], now)

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            project = identity.find_project(session, policy.project_id)
            assert project is not None
            spec = backup_instants.InstantSpec(
                name=policy.name,
                policy=policy.id,
                needs_filesystem=policy.needs_filesystem,
                needs_application=policy.needs_application,
                bandwidth_mib_s=policy.bandwidth_mib_s,
            )
            backup_instants.create(session, spec, project=project, actor=SYSTEM, now=now)
            for vm in members:
                vms.update(session, vm.id, backup_asked_at=now)

        return self._accepted(policy.id, work, now)

    def _accepted(self, subject_id: str, work: Callable[[Session], None], now: datetime) -> bool:
        try:
            self._db.write(work)
        except TrimtabError as error:
            self._not_before[subject_id] = now + RETRY
            log.info("backup put off", subject_id=subject_id, code=error.code, error=error.message)
            return False
        self._not_before.pop(subject_id, None)
        return True

    def _ask_one(self, term: int, vm: Vm, now: datetime) -> bool:
        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            present = vms.get(session, vm.id)
            backups.run(session, present, backups.RunSpec(), project_id=vm.project_id, actor=SYSTEM, now=now)
            vms.update(session, vm.id, backup_asked_at=now)

        return self._accepted(vm.id, work, now)


def _with_policies(session: Session) -> tuple[dict[str, BackupPolicy], Sequence[Vm]]:
    policies = backup_repos.policies(session)
    if not policies:
        return {}, ()
    return policies, [vm for vm in vms.page(session, limit=VMS_MAX) if vm.backup_policy_id in policies]


def _is_due(policy: BackupPolicy, vm: Vm, now: datetime) -> bool:
    if vm.backup_asked_at is None:
        return True
    schedule = parse_schedule(policy.schedule, zone=policy.zone, jitter_s=policy.jitter_s)
    return schedule.next_after(vm.backup_asked_at, subject_id=policy.id if policy.is_together else vm.id) <= now


def _newest(session: Session, vm_ids: Collection[str]) -> list[Backup]:
    return [some[-1] for some in backup_store.of_vms(session, vm_ids).values() if some]


def _is_bootable(backup: Backup) -> bool:
    return backup.state == "ready" and backup.level == 1


def _wants_proof(policy: BackupPolicy | None) -> bool:
    return policy is not None and policy.verify != "none"


def _read_at(backup: Backup) -> datetime:
    return backup.verified_at or backup.created_at


def _is_new(backup: Backup) -> bool:
    return backup.state == "ready" and backup.verified_at is None


def _superfluous(session: Session, now: datetime) -> list[Backup]:
    """Return the backups that no policy keeps; those of vms without a policy, and of deleted vms, stay until somebody deletes them."""
    policies, found = _with_policies(session)
    listed = backup_store.of_vms(session, [vm.id for vm in found])
    judged_at = {
        repo_id: max(map(_read_at, backup_store.damaged(session, repo_id)))
        for repo_id in {one.repo_id for some in listed.values() for one in some if one.state == "damaged"}
    }
    gone = []
    for vm in found:
        mine = {one.id: one for one in listed[vm.id]}
        candidates = [_candidate(one, listed[vm.id][-1], judged_at) for one in mine.values()]
        verdicts = judge(candidates, policies[vm.backup_policy_id].retention, now=now)
        gone += [mine[verdict.backup_id] for verdict in verdicts if not verdict.is_kept]
    return [one for one in gone if not volumes.that_fill(session, backup_id=one.id)]


def _candidate(backup: Backup, newest: Backup, judged_at: Mapping[str, datetime]) -> Candidate:
    taken_at = backup.taken_at or backup.created_at
    if backup.state == "damaged":
        return Candidate(
            backup.id,
            taken_at,
            Proof.DAMAGED,
            backup.held_until,
            _may_be_repaired(newest, backup.repo_id, judged_at[backup.repo_id]),
        )
    return Candidate(backup.id, taken_at, Proof.VERIFIED if backup.level >= 1 else Proof.NONE, backup.held_until)


def _may_be_repaired(newest: Backup, repo_id: str, judged_at: datetime) -> bool:
    """Tell whether a damaged backup may be whole by the next judgement, given its vm's newest one.

    One flipped bit damages every backup that shares the chunk, the newest too: the next run stores it anew, and all are whole again.
    """
    is_later = (newest.taken_at or newest.created_at) > judged_at
    return newest.state == "damaged" or (newest.repo_id == repo_id and is_later)


def _age(at: datetime | None, now: datetime) -> float | None:
    return (now - at).total_seconds() if at is not None else None


def _verified_at(backup: Backup | None) -> datetime | None:
    return backup.verified_at if backup is not None else None


def _booted_at(backup: Backup | None) -> datetime | None:
    return backup.booted_at if backup is not None else None
