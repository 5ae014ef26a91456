"""Charges a project for what it takes, in the transaction that takes it."""

from dataclasses import asdict, dataclass

from sqlalchemy.orm import Session

from trimtab_controller.store import project_quota
from trimtab_protos.errors import QuotaExceeded, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    vms: int = 0
    vcpus: int = 0
    memory_mib: int = 0
    disk_bytes: int = 0
    snapshots: int = 0
    floating: int = 0


def give_back(session: Session, project_id: str, *, vcpus: int = 0, memory_mib: int = 0, disk_bytes: int = 0) -> None:
    """Lower the project's used figures."""
    project_quota.lower_used(session, project_id, {"vcpus": vcpus, "memory_mib": memory_mib, "disk_bytes": disk_bytes})


def charge(session: Session, project_id: str, asked: Charge) -> None:
    """Raise the project's used figures. QuotaExceeded names the first figure that does not allow it."""
    more = {resource: amount for resource, amount in asdict(asked).items() if amount}
    if not more or project_quota.raise_used(session, project_id, more):
        return
    project = project_quota.get(session, project_id)
    for resource, amount in more.items():
        quota, used = getattr(project, f"{resource}_quota"), getattr(project, f"{resource}_used")
        if quota is not None and used + amount > quota:
            raise QuotaExceeded(
                "quota-exceeded",
                f"project {project.name}: the quota of {resource} is {quota}, {used} are used, {amount} more were asked for",
                resource=resource,
                quota=quota,
                used=used,
                asked=amount,
            )
    raise Unavailable("quota-moved", f"the quota of project {project.name} was changed just now; send the request again")
