"""vm.set_resources: a vm gets another class of cpu time, or another floor of its balloon; a running guest at once.

| step   | do                                                   | undo                    |
|--------|------------------------------------------------------|-------------------------|
| own    | (the wish was recorded at acceptance)                 | what it was before      |
| apply  | define the domain so, and tell what runs of it        | as it was before        |
| finish | tell                                                  | - last                  |

A crash between the steps leaves what SQL says and what the guest has apart until the operation goes on: neither stops the guest.
"""

from dataclasses import dataclass, replace

from trimtab_controller.operations import live_changes
from trimtab_controller.operations.saga import Effect, Saga, Transaction, effect, transaction
from trimtab_controller.store import describe, events, vms


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    before_balloon_min_mib: int
    before_cpu_class: str


def _own(_context: Transaction[Params]) -> None:
    """The wish was recorded when the request was accepted."""


def _disown(context: Transaction[Params]) -> None:
    params = context.params
    before = {"balloon_min_mib": params.before_balloon_min_mib, "cpu_class": params.before_cpu_class}
    vms.update(context.session, params.vm_id, **before)


def _apply(context: Effect[Params]) -> None:
    _change(context, lambda parts: parts)


def _unapply(context: Effect[Params]) -> None:
    _change(context, lambda parts: _as_before(parts, context.params))


def _as_before(parts: describe.VmParts, params: Params) -> describe.VmParts:
    vm = replace(parts.vm, balloon_min_mib=params.before_balloon_min_mib, cpu_class=params.before_cpu_class)
    return replace(parts, vm=vm)


def _change(context: Effect[Params], parts_of: live_changes.PartsOf) -> None:
    vm = context.read(lambda session: vms.get(session, context.params.vm_id))
    if vm.host_id:
        # What of other devices a guest still holds on to is theirs to wait for.
        live_changes.ask_guest(context, host_id=vm.host_id, epoch=vm.epoch, parts_of=parts_of)


def _finish(context: Transaction[Params]) -> None:
    vm = vms.get(context.session, context.params.vm_id)
    balloon = f"a balloon down to {vm.balloon_min_mib} MiB" if vm.balloon_min_mib else "no balloon"
    events.append(
        context.session,
        kind="vm.resources_changed",
        project_id=vm.project_id,
        subject_id=vm.id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"vm {vm.name} has cpu class {vm.cpu_class or '(none)'} and {balloon}",
        context={"cpu_class": vm.cpu_class, "balloon_min_mib": vm.balloon_min_mib},
        now=context.now,
    )


SAGA = Saga(
    name="vm.set_resources",
    version=1,
    params=Params,
    steps=(
        transaction("own", _own, _disown),
        effect("apply", _apply, _unapply),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
