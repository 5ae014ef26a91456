"""backup.boot: a backup is restored to a vm of its own, without any network, and counts as proven once its guest shows a sign of life.

| step          | do                                                                     | undo                                      |
|---------------|------------------------------------------------------------------------|-------------------------------------------|
| own           | (row, disks and placement request came with the acceptance)              | withdraw, erase names, say why            |
| place         | wait for the leader's answer: host and epoch                             | give the claims back                      |
| make_volumes  | the agent's jobs: fill each disk, read it back, compare                  | cancel the jobs, delete each volume       |
| define        | define the domain                                                        | kill and undefine                         |
| power_on      | start it                                                                 | - define's undo kills                     |
| sign          | wait for the guest agent, or for pattern and TCP port, or too long       | - it only looks                           |
| remove        | kill, undefine, delete each volume (pivot)                               | - it goes as it came                      |
| finish        | erase the rows; record level 3 with the recovery time, or why not        | - last                                    |

The guest is on no network: it can meet neither its original nor anybody else. It has no card, or, where a TCP port is asked for, cards
whose frames end in the agent. A guest that does not come up makes no operation
fail: the test has told what it was asked, and the backup shows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.operations import restore_steps, vm_steps
from trimtab_controller.operations.saga import Effect, Json, Saga, Transaction, Wait, effect, transaction
from trimtab_controller.store import backups, describe, events, placements


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    vm_id: str
    backup_id: str
    # Volume -> the disk of the backup that fills it.
    disks: Mapping[str, str]
    # A regular expression that the serial port shall show, and a TCP port that shall answer; of neither, the guest agent.
    pattern: str = ""
    tcp_port: int = 0
    timeout_s: int = 300
    # Its start counts already; nothing that the guest shows is waited for, so it is not shown as booted.
    is_start_enough: bool = False
    # Its agent has to show itself beside the pattern and the port too.
    needs_agent: bool = False
    to_host_id: str = ""


def _own(_context: Transaction[Params]) -> None:
    """Nothing to do: the rows were inserted with the operation."""


def _disown(context: Transaction[Params]) -> None:
    placements.withdraw(context.session, context.operation.id)
    vm_steps.erase_vm(context)
    error = context.operation.error
    if error is not None and not context.operation.is_cancel_requested:
        # It says nothing of the backup, which stays as proven as it was; a policy that wants a boot test asks for it again.
        problem = f"boot test came to nothing: {error.message}"
        backups.update(context.session, context.params.backup_id, problem=problem[:1000])


def _sign(context: Effect[Params]) -> Json | Wait:
    params = context.params
    if _is_start_enough(params):
        return {"recovery_ms": 0, "problem": ""}
    return restore_steps.sign(
        context,
        pattern=params.pattern,
        tcp_port=params.tcp_port,
        needs_agent=params.needs_agent,
        timeout_s=params.timeout_s,
    )


def _is_start_enough(params: Params) -> bool:
    return params.is_start_enough and not params.pattern and not params.tcp_port


def _remove(context: Effect[Params]) -> Json:
    vm_steps.undefine_everywhere(context)
    host_id, epoch = vm_steps.chosen_host(context.results), int(context.results["place"]["epoch"])
    disks = context.read(lambda session: describe.read_disks(session, context.params.vm_id))
    for volume in disks.volumes:
        key = context.key(subject_id=context.params.vm_id, epoch=epoch, part=volume.id)
        context.agents.delete_volume(host_id, key, volume.id, volume.format, describe.pool_spec(disks.pools[volume.pool_id]))
    return {"host_id": host_id}


def _finish(context: Transaction[Params]) -> None:
    session, sign = context.session, context.results["sign"]
    vm_steps.erase_vm(context)
    backup = backups.get(session, context.params.backup_id)
    if _is_start_enough(context.params):
        backups.update(session, backup.id, level=max(2, backup.level), verified_at=context.now)
    elif sign["problem"]:
        # Its disks were restored and compared all the same.
        problem = f"boot test: {sign['problem']}"
        backups.update(session, backup.id, level=2, verified_at=context.now, problem=problem[:1000])
    else:
        backups.update(
            session,
            backup.id,
            level=3,
            verified_at=context.now,
            booted_at=context.now,
            recovery_ms=int(sign["recovery_ms"]),
            problem="",
        )
    events.append(
        session,
        kind="backup.did_not_boot" if sign["problem"] else "backup.booted",
        project_id=backup.project_id,
        subject_id=backup.vm_id,
        operation_id=context.operation.id,
        actor=context.operation.actor,
        message=f"backup {backup.id} of vm {backup.vm_name}: {sign['problem'] or 'booted'}",
        context={"recovery_ms": sign["recovery_ms"]},
        now=context.now,
    )


SAGA = Saga(
    name="backup.boot",
    version=1,
    params=Params,
    result=lambda results: {**results["sign"], "host_id": results["place"]["host_id"]},
    steps=(
        transaction("own", _own, _disown),
        vm_steps.place("create"),
        effect("make_volumes", restore_steps.fill, restore_steps.empty, cancel=restore_steps.cancel_fill),
        effect("define", vm_steps.define, vm_steps.undefine_everywhere),
        effect("power_on", vm_steps.power_on, None, because="the undo of `define` kills"),
        effect("sign", _sign, None, because="it only looks"),
        effect("remove", _remove, None, because="it goes as it came", pivot=True),
        transaction("finish", _finish, None, because="nothing follows it"),
    ),
)
