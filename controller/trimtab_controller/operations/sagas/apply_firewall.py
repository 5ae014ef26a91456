"""firewall.apply: every host that may run a vm follows what its security groups say by now.

| step   | do                                                                     | undo                          |
|--------|------------------------------------------------------------------------|-------------------------------|
| own    | (the groups were written at acceptance)                                 | - from here on only forward   |
| apply  | each vm's firewall on each host that holds it, both sides of a migration | -                             |
| ask    | that OVN be told too, where a vm has a card on an overlay network        | -                             |
| follow | wait until it was told, for a while                                     | -                             |
| finish | record under which generation each vm's hosts are                       | - last                        |

What is told is read anew at each try and carries a generation, so that two changes may be under way at once and the later one stays.
A host that does not answer is left out after a while: `Upkeep.apply_firewalls` accepts the operation again when it is up.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.operations.fan_out import ask_each
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.operations.vm_steps import holders_of
from trimtab_controller.store import overlays, reach, secgroups
from trimtab_controller.store.database import Session
from trimtab_controller.store.reach import UpHost
from trimtab_protos.errors import NotFound, TrimtabError
from trimtab_protos.network_messages import FirewallSpec

# Tries of the step before hosts that do not answer are left for later.
PATIENCE = 2
OVERLAY_POLL_S = 0.5
OVERLAY_PATIENCE_S = 30.0
"""A round of the leader's takes a second; one that has no OVN any more never answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """One of the two: all vms of a group, or one vm."""

    secgroup_id: str = ""
    vm_id: str = ""


@dataclass(frozen=True, slots=True)
class _Wish:
    firewall: FirewallSpec
    hosts: tuple[str, ...]


def _own(_context: Transaction[Params]) -> None:
    """The groups were written when the request was accepted."""


def _read(session: Session, params: Params) -> Mapping[str, _Wish]:
    """Return, by vm, what may reach it and which hosts may hold it."""
    ids = [params.vm_id] if params.vm_id else secgroups.members(session, [params.secgroup_id])[params.secgroup_id]
    found = {}
    for vm_id in sorted(ids):
        firewall = secgroups.firewall_of(session, vm_id)
        try:
            hosts, _epoch = holders_of(session, vm_id)
        except NotFound:
            continue
        if firewall is not None:
            found[vm_id] = _Wish(firewall, hosts)
    return found


def _apply(context: Effect[Params]) -> Json:
    wishes = context.read(lambda session: _read(session, context.params))
    concerned = {host_id for wish in wishes.values() for host_id in wish.hosts}
    up = [host for host in context.read(reach.up_hosts) if host.id in concerned]

    def tell(host: UpHost) -> None:
        for vm_id, wish in wishes.items():
            if host.id in wish.hosts:
                # A subject of its own: the vm's turns are those of its exclusive operations. The generation is part of the key, since a
                # repeat under a later one asks for something else.
                part = f"{vm_id}-{wish.firewall.generation}"
                key = context.key(subject_id=f"firewall-{context.operation.subject_id}", part=part)
                context.agents.set_firewall(host.id, key, vm_id, wish.firewall)

    errors = {host_id: answer for host_id, answer in ask_each(up, tell).items() if isinstance(answer, TrimtabError)}
    for error in errors.values():
        if not error.retryable or context.operation.attempts < PATIENCE:
            raise error
    missed = (concerned - {host.id for host in up}) | set(errors)
    applied = {vm_id: wish.firewall.generation for vm_id, wish in wishes.items() if not missed & set(wish.hosts)}
    return {"applied": applied, "vms": len(wishes), "unreached": sorted(missed)}


def _ask(context: Transaction[Params]) -> Json:
    vm_ids = sorted(_read(context.session, context.params))
    asked = overlays.ask(context.session) if overlays.has_cards(context.session, vm_ids) else 0
    return {"asked": asked, "at": context.now.timestamp()}


def _follow(context: Effect[Params]) -> Json | Wait:
    """Groups of cards on overlay networks are kept by OVN, which follows within moments of its database."""
    asked = context.results["ask"]
    state = context.read(overlays.state)
    if state.answered >= asked["asked"]:
        return {"is_told": True}
    # The leader writes what differs once the database answers again; nothing has to be repeated for that.
    if not state.is_up or context.now.timestamp() - asked["at"] > OVERLAY_PATIENCE_S:
        return {"is_told": False}
    return Wait(OVERLAY_POLL_S, "OVN to be told")


def _finish(context: Transaction[Params]) -> None:
    secgroups.record_applied(context.session, {str(vm): int(at) for vm, at in context.results["apply"]["applied"].items()})


SAGA = Saga(
    name="firewall.apply",
    version=1,
    params=Params,
    is_exclusive=False,
    steps=(
        transaction("own", _own, None, because="from here on only forward", pivot=True),
        effect("apply", _apply, None, because="past the pivot"),
        transaction("ask", _ask, None, because="past the pivot"),
        effect("follow", _follow, None, because="past the pivot"),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
    result=lambda results: {
        "vms": results["apply"]["vms"],
        "unreached": results["apply"]["unreached"],
        **({} if results["follow"]["is_told"] else {"is_overlay_told": False}),
    },
)
