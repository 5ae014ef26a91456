"""Admission control: never accept what could not be restarted after the loss of one host. Pure.

It asks the failover proof of every single host, kept along as vms are accepted. What was not covered before is no reason to refuse:
only what a new vm would make worse is.
"""

from dataclasses import dataclass

from trimtab_controller.core.planning.domains import domains_of
from trimtab_controller.core.planning.estate import Estate, VmSnapshot
from trimtab_controller.core.planning.proof import FailoverProof

# So many vms an objection names.
_NAMED_MAX = 3


@dataclass(frozen=True, slots=True)
class Objection:
    """What the loss of one host would mean with the vm accepted."""

    host_id: str
    host_name: str
    vm_ids: tuple[str, ...]
    """Vms that could not be restarted then, and could without it; perhaps itself."""
    message: str


class Admission:
    """Belongs to one batch; not thread-safe."""

    __slots__ = ("_before", "_estate", "_proof")

    def __init__(self, estate: Estate) -> None:
        self._estate = estate
        self._proof = FailoverProof(estate, domains_of(estate, ["host"]))
        self._before = self._proof.uncovered()

    def add(self, vm: VmSnapshot) -> Objection | None:
        """Accept the vm on its host and count with it from now on; or return why not, and everything stays as it was."""
        after = self._estate.changed(vms=[vm])
        domains = domains_of(after, ["host"])
        self._proof.update(after, domains)
        found = self._objection(vm)
        if found is None:
            self._estate = after
            self._before = self._proof.uncovered()
            return None
        self._proof.update(self._estate, domains_of(self._estate, ["host"]))
        return found

    def _objection(self, vm: VmSnapshot) -> Objection | None:
        worse: dict[str, list[str]] = {}
        for vm_id, keys in self._proof.uncovered().items():
            for key in set(keys).difference(self._before.get(vm_id, ())):
                worse.setdefault(key, []).append(vm_id)
        if not worse:
            return None
        # The vm's own host first: that it could not be restarted itself is the plainest reason.
        domains = {domain.key: domain for domain in self._proof.domains}
        key = min(worse, key=lambda one: (vm.host_id not in domains[one].host_ids, one))
        (host_id,) = domains[key].host_ids
        vm_ids, estate = tuple(sorted(worse[key])), self._proof.estate
        if vm.vm_id in vm_ids:
            why = self._proof.why(vm.vm_id, key)
            message = f"it could not be restarted if host {estate.host_name(host_id)} were lost: {why}"
        else:
            names = [estate.vms[vm_id].name for vm_id in vm_ids]
            more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
            told = f"{', '.join(names[:_NAMED_MAX])}{more}"
            message = f"with it, vms {told} could not be restarted if host {estate.host_name(host_id)} were lost"
        return Objection(host_id, estate.host_name(host_id), vm_ids, message)
