"""Cards on no network, of vms that prove their backup: kept among the vm's wishes and not as nics, since they are copies.

Each has the MAC and the addresses that the card had when it was backed up, so that the guest comes up as it was. Nobody else sees them:
they are unique in no network, and their frames end in the agent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Vm
from trimtab_protos.messages import NetworkKind, NetworkSpec, NicSpec

WISH = "wires"
CAPABILITY = "network-wire"
NETWORK = NetworkSpec(network_id="net-wire", kind=NetworkKind.WIRE, name="wire")


def wish_of(saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the wish for cards like those of a backup's settings."""
    return [
        {"nic_id": mint("nic"), "mac": str(one["mac"]), "model": str(one["model"]), "addresses": list(one["addresses"])}
        for one in saved
    ]


def nics_of(vm: Vm) -> tuple[NicSpec, ...]:
    return tuple(
        NicSpec(
            nic_id=one["nic_id"],
            network_id=NETWORK.network_id,
            mac=one["mac"],
            index=i,
            model=one["model"],
            addresses=tuple(one["addresses"]),
        )
        for i, one in enumerate(vm.wishes.get(WISH, ()))
    )
