"""Takes over what somebody changed by hand at a domain, where the model has a word for it: by the operation that would have made it.

    vcpus, memory                        vm.resize
    limits of one disk                   volume.limit
    a card on a network of Trimtab       vm.attach: the guest keeps the card that it has until its next stop
    a card or disk that is gone          vm.detach

Everything else (a cache mode, a bus, a file that is no volume, a CPU model) is named and refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from trimtab_controller.core.adoption import NetworkChoice
from trimtab_controller.core.drift_fields import Difference
from trimtab_controller.core.model import Operation, Project, Vm
from trimtab_controller.core.resize import When
from trimtab_controller.services import vm_devices, vm_resize
from trimtab_controller.services import volumes as volume_service
from trimtab_controller.services.vm_nics import NicWish
from trimtab_controller.services.vm_power import Caller
from trimtab_protos.adoption_messages import DescribedNic, DomainDescription
from trimtab_protos.errors import Conflict

_SHAPE = frozenset({"vcpus", "memory_mib"})
_LIMITS = (".iops_limit", ".bandwidth_limit_bytes_s")
_MIB = 1 << 20
_NAMED_MAX = 5


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The differences by what would take them over."""

    shape: Mapping[str, int]
    limits: Mapping[str, Mapping[str, int]]
    """By volume id: field -> value."""
    cards_added: tuple[DescribedNic, ...]
    cards_gone: tuple[str, ...]
    disks_gone: tuple[str, ...]
    other: tuple[str, ...]


def take_over(
    session: Session,
    vm: Vm,
    caller: Caller,
    found: Sequence[Difference],
    seen: DomainDescription,
    *,
    project: Project,
    networks: Mapping[str, NetworkChoice],
) -> Operation:
    """Accept the operation that makes the vm as its domain is, the first kind of thing of those in the table above.

    `seen`: the domain as it runs; `networks`: those of its project by what cards on its host are on.
    Conflict (`cannot-be-accepted`) names all that no operation makes; nothing is taken over then.
    """
    if all(one.live == one.desired for one in found):
        raise Conflict(
            "stored-only",
            f"vm {vm.name} runs as it shall; only its stored definition differs: `trimtab vm reconcile {vm.name} --revert`",
        )
    changes = _sort([one for one in found if one.live != one.desired], seen)
    if changes.other:
        raise Conflict(
            "cannot-be-accepted",
            f"vm {vm.name}: nothing of Trimtab says {', '.join(changes.other[:_NAMED_MAX])}; `trimtab vm reconcile {vm.name} "
            "--revert` puts ours back, `trimtab vm attach` gives it a volume or a card for good",
            fields=list(changes.other),
        )
    if changes.shape:
        shape = {"vcpus": 0, "memory_mib": 0, **changes.shape}
        return vm_resize.resize(session, vm, caller, vcpus=shape["vcpus"], memory_mib=shape["memory_mib"], when=When.AUTO)
    for volume_id, limits in changes.limits.items():
        bytes_s = limits.get(".bandwidth_limit_bytes_s")
        return volume_service.limit(
            session,
            volume_id,
            iops=limits.get(".iops_limit"),
            bandwidth_mib_s=None if bytes_s is None else bytes_s // _MIB,
            project=project,
            expected_version=None,
            actor=caller.actor,
            now=caller.now,
        )
    for mac in changes.cards_gone:
        return vm_devices.detach_nic(session, vm, caller, nic=mac)
    for volume_id in changes.disks_gone:
        return vm_devices.detach_volume(session, vm, caller, volume=volume_id, project=project)
    card = changes.cards_added[0]
    wish = NicWish(network=_network_of(vm, card, networks), mac=card.mac)
    return vm_devices.attach(session, vm, caller, volume="", wish=wish, project=project)


def _sort(found: Sequence[Difference], seen: DomainDescription) -> _Sorted:
    shape: dict[str, int] = {}
    limits: dict[str, dict[str, int]] = {}
    gone: list[str] = []
    added: list[DescribedNic] = []
    other: list[str] = []
    cards = {f"nic {card.mac}": card for card in seen.nics}
    for one in found:
        name, _, part = one.field.partition(".")
        suffix = f".{part}"
        if one.field in _SHAPE:
            shape[one.field] = int(one.live)
        elif suffix in _LIMITS and one.live and not (suffix == _LIMITS[1] and int(one.live) % _MIB):
            limits.setdefault(name.removeprefix("disk "), {})[suffix] = int(one.live)
        elif not part and not one.live:
            gone.append(name)
        elif not part and name in cards:
            added.append(cards[name])
        else:
            other.append(one.field)
    # What a device that came or went is like goes with it.
    settled = {*gone, *(f"nic {card.mac}" for card in added if card.model == "virtio")}
    other = [field for field in other if field.partition(".")[0] not in settled]
    return _Sorted(
        shape,
        limits,
        tuple(added),
        tuple(name.removeprefix("nic ") for name in gone if name.startswith("nic ")),
        tuple(name.removeprefix("disk ") for name in gone if name.startswith("disk ")),
        tuple(sorted(other)),
    )


def _network_of(vm: Vm, card: DescribedNic, networks: Mapping[str, NetworkChoice]) -> str:
    """Return the network of the vm's project, or a shared one, that the card is on. Conflict where Trimtab knows none."""
    source = card.bridge or card.network
    if source in networks:
        return networks[source].id
    raise Conflict(
        "cannot-be-accepted",
        f"vm {vm.name}: card {card.mac} is on {source or '(none)'}, which is no network of Trimtab on its host; "
        f"`trimtab network create` makes one of it, `trimtab vm reconcile {vm.name} --revert` takes the card away",
        fields=[f"nic {card.mac}"],
    )
