"""Turns what a host says of its domains into what the fleet knows of its vms.

A host is believed about a vm only while it holds it (it is the vm's host, or has a claim: two hosts during a migration) and only
at the epoch it was given or a later one. Everything else is drift: told as an event, never written over what is known. Nothing
is decided here; the drift loop asks the host again before it acts.
"""

from collections.abc import Sequence
from datetime import datetime

from trimtab_controller.core.guest_agents import GuestAgent, follow
from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.services import behind
from trimtab_controller.store import events, observations, vms
from trimtab_controller.store.database import Session
from trimtab_controller.store.observations import Holding
from trimtab_protos.messages import DomainObservation, DomainState, StateReason

_ONE_SIDED = frozenset({DomainState.ABSENT, DomainState.INCOMING})
"""States that say something of one side of a migration only: the vm may well run on the other."""


def record(session: Session, host_id: str, observation: DomainObservation, now: datetime) -> None:
    """Record one domain's observation; an unmanaged domain's is ignored."""
    record_all(session, host_id, (observation,), now)


def record_all(
    session: Session,
    host_id: str,
    seen: Sequence[DomainObservation],
    now: datetime,
    *,
    is_complete: bool = False,
) -> None:
    """Record many; `is_complete` where these are all of the host's domains, so that one that is missing is absent."""
    managed = {one.vm_id: one for one in seen if one.vm_id}
    if is_complete:
        for vm_id in observations.held_by(session, host_id) - managed.keys():
            managed[vm_id] = DomainObservation(vm_id=vm_id)
    known = observations.holdings(session, sorted(managed))
    turns = ((holding.name, managed[vm_id].turn, holding.turn) for vm_id, holding in known.items())
    behind.notice_turns(session, host_id, turns, now=now)
    unchanged = []
    for vm_id in sorted(managed):  # one order everywhere: batches of two gateways must not wait for each other in a circle
        observation, holding = managed[vm_id], known.get(vm_id)
        drift = _drift_of(host_id, observation, holding)
        if drift:
            _note_drift(session, host_id, observation, holding, drift, now=now)
        elif holding is not None and not _is_other_sides_matter(host_id, observation, holding):
            if observation.balloon_mib != holding.observed_balloon_mib:
                _note_balloon(session, observation, holding, now=now)
            agent = follow(GuestAgent(holding.guest_agent), _state(observation), is_heard=observation.has_guest_agent)
            if agent != holding.guest_agent:
                observations.note_guest_agent(session, vm_id, agent, at=now)
            if _is_unchanged(host_id, observation, holding):
                unchanged.append(vm_id)
            else:
                _observe(session, host_id, observation, holding, now=now)
    observations.refresh(session, unchanged, at=now)


def _drift_of(host_id: str, observation: DomainObservation, holding: Holding | None) -> str:
    """Return in what way the report does not fit what is known; '' where it fits."""
    is_absent = observation.state is DomainState.ABSENT
    if holding is None:
        return "" if is_absent else "unknown-vm"
    if holding.is_deleted:
        return "" if is_absent or observation.state is DomainState.STOPPED else "deleted-vm"
    known_epoch = holding.known_epoch(host_id)
    if known_epoch is None:
        return "" if is_absent else "foreign-host"
    if observation.epoch < known_epoch and not is_absent:
        return "old-epoch"
    return ""


def _is_other_sides_matter(host_id: str, observation: DomainObservation, holding: Holding) -> bool:
    if holding.is_deleted:
        return observation.state is not DomainState.ABSENT
    if holding.known_epoch(host_id) is None:
        return True  # it holds nothing: a migration's source that tells, after the move, that its side is gone
    is_one_sided = observation.state in _ONE_SIDED or observation.reason is StateReason.MIGRATED
    return len(holding.claims) > 1 and is_one_sided


def _is_unchanged(host_id: str, observation: DomainObservation, holding: Holding) -> bool:
    return (
        holding.observed_state == _state(observation).value
        and holding.observed_reason == _reason(observation)
        and holding.observed_host_id == host_id
        and (not observation.addresses or holding.observed_addresses == observation.addresses)
    )


def _observe(session: Session, host_id: str, observation: DomainObservation, holding: Holding, *, now: datetime) -> None:
    state, reason = _state(observation), _reason(observation)
    has_changed = vms.observe(
        session,
        holding.vm_id,
        host_id=host_id,
        state=state,
        reason=reason,
        at=now,
        addresses=observation.addresses or None,
    )
    if has_changed:
        why = f" ({reason.replace('_', ' ')})" if reason else ""
        events.append(
            session,
            kind="vm.observed",
            project_id=holding.project_id,
            subject_id=holding.vm_id,
            message=f"{holding.name} is {state.value}{why}",
            context={"host_id": host_id, "state": state.value, "reason": reason, "was": holding.observed_state},
            now=now,
        )


def _note_balloon(session: Session, observation: DomainObservation, holding: Holding, *, now: datetime) -> None:
    """Note what the balloon leaves the guest; told where it gave or got, not where it began or ended."""
    observations.note_balloon(session, holding.vm_id, observation.balloon_mib)
    if observation.balloon_mib and holding.observed_balloon_mib:
        events.append(
            session,
            kind="vm.balloon_changed",
            project_id=holding.project_id,
            subject_id=holding.vm_id,
            message=f"the balloon of {holding.name} leaves it {observation.balloon_mib} of {observation.memory_mib} MiB",
            context={"balloon_mib": observation.balloon_mib, "was_mib": holding.observed_balloon_mib},
            now=now,
        )


def _note_drift(
    session: Session,
    host_id: str,
    observation: DomainObservation,
    holding: Holding | None,
    drift: str,
    *,
    now: datetime,
) -> None:
    """Append a `vm.drift` event unless the last one says the same: hosts repeat everything at each session."""
    context = {
        "drift": drift,
        "host_id": host_id,
        "vm_id": observation.vm_id[:40],
        "state": observation.state.value,
        "epoch": observation.epoch,
    }
    # An id that is none of ours cannot be the subject: it would be a stranger's text in our index.
    subject_id = holding.vm_id if holding else host_id
    if observations.last_drift(session, subject_id) == context:
        return
    name = holding.name if holding else observation.name[:63]
    events.append(
        session,
        kind="vm.drift",
        project_id=holding.project_id if holding else "",
        subject_id=subject_id,
        message=f"a host reports {name} as {observation.state.value}, which does not fit: {drift.replace('-', ' ')}",
        context=context,
        now=now,
    )


def _state(observation: DomainObservation) -> ObservedState:
    return ObservedState(observation.state.value)


def _reason(observation: DomainObservation) -> str:
    return "" if observation.reason is StateReason.NONE else observation.reason.value
