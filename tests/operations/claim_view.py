"""What a vm holds on which host, as the tests of moves and failover ask for it."""

from tests.operations.kit import FleetStory
from trimtab_controller.store import claims


def claims_of(story: FleetStory, vm_id: str) -> dict[str, str]:
    """Return host -> role of the vm's claims."""
    return {claim.host_id: claim.role for claim in story.db.read(lambda session: claims.of_vm(session, vm_id))}
