"""Refuses what does not go with encrypted volumes. Copies in the clear are never made of them."""

from collections.abc import Iterable

from trimtab_controller.core.model import Volume
from trimtab_protos.errors import Conflict


def refuse_any(volumes: Iterable[Volume], what: str) -> None:
    """Raise Conflict where one of the volumes is encrypted: `what` completes "there are no ... of encrypted volumes"."""
    found = next((volume for volume in volumes if volume.is_encrypted), None)
    if found is not None:
        raise Conflict(
            "volume-encrypted",
            f"volume {found.name} is encrypted, and there are no {what} of encrypted volumes: copy what is to be kept inside the guest, "
            f"or leave the volume out with `trimtab vm detach VM --volume {found.name}`",
            volume=found.name,
        )
