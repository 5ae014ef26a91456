"""The nouns of the control plane as frozen dataclasses: what `store` returns and every layer above passes on."""

from trimtab_controller.core.model.backups import Backup, BackupInstant, BackupPolicy, BackupRepo, RecoveryPlan
from trimtab_controller.core.model.compute import (
    Claim,
    FloatingAddress,
    MigrationRow,
    Nic,
    Router,
    SecGroup,
    Vm,
    VmGroup,
    VmSummary,
)
from trimtab_controller.core.model.fleet import Host, HostClass
from trimtab_controller.core.model.identity import Actor, Project, Role, Token, User
from trimtab_controller.core.model.operations import Event, JournalEntry, Operation, OperationError
from trimtab_controller.core.model.placement import DecisionRow, Maintenance, PlacementAsk, PlanRow, PlanStepRow
from trimtab_controller.core.model.storage import (
    Image,
    ImageReplica,
    Network,
    Pool,
    PoolSpace,
    Snapshot,
    Template,
    Volume,
    VolumeSummary,
)

__all__ = [
    "Actor",
    "Backup",
    "BackupInstant",
    "BackupPolicy",
    "BackupRepo",
    "Claim",
    "DecisionRow",
    "Event",
    "FloatingAddress",
    "Host",
    "HostClass",
    "Image",
    "ImageReplica",
    "JournalEntry",
    "Maintenance",
    "MigrationRow",
    "Network",
    "Nic",
    "Operation",
    "OperationError",
    "PlacementAsk",
    "PlanRow",
    "PlanStepRow",
    "Pool",
    "PoolSpace",
    "Project",
    "RecoveryPlan",
    "Role",
    "Router",
    "SecGroup",
    "Snapshot",
    "Template",
    "Token",
    "User",
    "Vm",
    "VmGroup",
    "VmSummary",
    "Volume",
    "VolumeSummary",
]
