"""Operations whose undo failed: nothing goes on by itself, and their vm takes no other work."""

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity


def parked(fleet: FleetFacts) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            severity=Severity.CRITICAL,
            kind="operation-needs-attention",
            subject=f"operation {operation.id}",
            message=f"{operation.kind} could not be undone and waits for a decision",
            cure=f"trimtab op retry {operation.id}",
        )
        for operation in fleet.parked_operations
    )
