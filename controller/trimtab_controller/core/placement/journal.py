"""The digest of everything that a decision was made on: equal digests under one policy mean equal decisions.

It runs along a batch, since each decision sees the claims of those before it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from trimtab_controller.core.placement.fleet import FleetSnapshot


class InputDigest:
    """Of one batch: the fleet, then each request with what was chosen for it, in order."""

    def __init__(self, fleet: FleetSnapshot) -> None:
        seen = hashlib.sha256()
        for host in fleet.hosts:
            seen.update(
                f"{host.host_id} {host.generation} {host.is_cordoned} {host.connectivity} {host.host_class} "
                f"{sorted(host.labels.items())} {sorted(host.taints)} {host.exclusive_project_id}\n".encode()
            )
        for resource, column in sorted(fleet.free.items()):
            seen.update(resource.encode() + column.tobytes())
        seen.update(json.dumps([sorted(fleet.shared_free_bytes.items()), _plain(fleet.members)]).encode())
        self._state = seen.digest()

    def next(self, stored: Mapping[str, Any]) -> str:
        """Return the digest of the inputs of a decision, given in its stored form."""
        asked = json.dumps(stored["request"], sort_keys=True).encode()
        inputs = hashlib.sha256(self._state + asked)
        self._state = hashlib.sha256(inputs.digest() + str(stored["chosen_host_id"]).encode()).digest()
        return inputs.hexdigest()


def _plain(members: Mapping[str, Mapping[str, int]]) -> list[Any]:
    return sorted((group_id, sorted(rows.items())) for group_id, rows in members.items())
