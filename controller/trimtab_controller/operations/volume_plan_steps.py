"""The step of a plan that moves a volume: begun as an operation of the volume's vm, looked after like every other child."""

from typing import TYPE_CHECKING

from trimtab_controller.core.model import PlanStepRow, Volume
from trimtab_controller.core.planning.plan import Step
from trimtab_controller.operations.move_accept import accept_move
from trimtab_controller.store import describe, operations
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity, NotFound

if TYPE_CHECKING:
    from trimtab_controller.operations.plan_steps import Course


def start(course: "Course", row: PlanStepRow, step: Step) -> bool:
    """Begin the move whose turn has come; return whether it is under way."""
    session = course.session
    try:
        volume = describe.get_volume(session, step.volume_id)
    except NotFound:
        course.put(row, "skipped", message="it was deleted meanwhile")
        return False
    reason = _nothing_to_do(volume, step)
    if reason:
        course.put(row, "skipped", message=reason)
        return False
    live = operations.live_exclusive(session, volume.vm_id or volume.id)
    if live is not None:
        course.put(row, "pending", message=f"waits for {live.kind} {live.id}")
        return False
    try:
        with session.begin_nested():
            target = describe.get_pool(session, step.target_pool_id)
            child = accept_move(session, volume, target, bandwidth_mib_s=0, actor=course.actor, now=course.now)
    except (Conflict, InvalidRequest, NoCapacity, NotFound) as refused:
        course.put(row, "failed", message=refused.message)
        return False
    course.put(row, "running", operation_id=child.id, message="")
    return True


def _nothing_to_do(volume: Volume, step: Step) -> str:
    if volume.deleted_at is not None:
        return "it was deleted meanwhile"
    return "it left by itself" if volume.pool_id != step.pool_id else ""
