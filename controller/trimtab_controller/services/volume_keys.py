"""Keys of encrypted volumes, drawn by lot and sealed before they reach a row."""

import secrets
from datetime import datetime
from typing import Protocol

from sqlalchemy.orm import Session

from trimtab_controller.store import volume_keys
from trimtab_protos.errors import Unavailable

KEY_BYTES = 32


class Sealer(Protocol):
    def seal(self, secret: str, *, place: str) -> str: ...


class _NoBox:
    def seal(self, secret: str, *, place: str) -> str:
        raise Unavailable(
            "secrets-not-kept", f"this process has no key to keep the secret of {place} with ({len(secret)} digits)"
        )


NO_BOX: Sealer = _NoBox()


def add(session: Session, volume_id: str, box: Sealer, *, now: datetime) -> None:
    """Draw the key of a volume and keep it sealed."""
    volume_keys.insert(session, volume_id, box.seal(secrets.token_hex(KEY_BYTES), place=volume_id), now=now)
