"""Admission control: never accept what could not be restarted after the loss of one host. Pure.

It asks the failover proof of every single host, kept along as vms are accepted and, by `follow`, from one batch to the next. What
was not covered before is no reason to refuse: only what a new vm would make worse is.

Vms are asked about together: where all of them make nothing worse, one look at the proof accepts them all; where they do, each half
is asked about by itself. So what is accepted is proven in every case, and a batch without an objection costs what one vm costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab_controller.core.planning.domains import Domain, domains_of
from trimtab_controller.core.planning.estate import Estate, VmSnapshot
from trimtab_controller.core.planning.proof import FailoverProof

# So many vms an objection names.
_NAMED_MAX = 3
# So many domains that the last refusals would have made worse are asked first: one of them refuses the next vm without the others.
_SUSPECTS_MAX = 4


@dataclass(frozen=True, slots=True)
class Objection:
    """What the loss of one host would mean with the vm accepted."""

    host_id: str
    host_name: str
    vm_ids: tuple[str, ...]
    """Vms that could not be restarted then, and could without it; perhaps itself."""
    message: str


class Admission:
    """Not thread-safe."""

    __slots__ = ("_before", "_domains", "_estate", "_proof", "_suspects")

    def __init__(self, estate: Estate) -> None:
        self._estate = estate
        self._domains = domains_of(estate, ["host"])
        self._proof = FailoverProof(estate, self._domains)
        self._before = self._proof.uncovered()
        self._suspects: tuple[str, ...] = ()

    def follow(self, estate: Estate) -> None:
        """Go on from this estate: what was accepted and is not in it is forgotten."""
        self._domains = domains_of(estate, ["host"])
        self._proof.update(estate, self._domains)
        self._estate, self._before, self._suspects = estate, self._proof.uncovered(), ()

    def add(self, vm: VmSnapshot) -> Objection | None:
        """Accept the vm on its host and count with it from now on; or return why not, and everything stays as it was."""
        return self.add_all([vm]).get(vm.vm_id)

    def add_all(self, vms: Sequence[VmSnapshot]) -> dict[str, Objection]:
        """Accept these vms on their hosts, in order; return the objections by vm to those that are not accepted."""
        if not vms:
            return {}
        after = self._estate.changed(vms=vms)
        proof, worse = self._worse(after)
        if not worse:
            self._estate, self._proof, self._before = after, proof, proof.uncovered()
            return {}
        if len(vms) == 1:
            self._suspects = (*[key for key in worse if key not in self._suspects], *self._suspects)[:_SUSPECTS_MAX]
            return {vms[0].vm_id: self._objection(vms[0], proof, worse)}
        middle = len(vms) // 2
        return {**self.add_all(vms[:middle]), **self.add_all(vms[middle:])}

    def accept_all(self, vms: Sequence[VmSnapshot]) -> None:
        """Count with these vms, whatever it means for others: somebody else decides about them."""
        self._estate = self._estate.changed(vms=vms)
        self._proof.update(self._estate, self._domains)
        self._before = self._proof.uncovered()

    def _worse(self, after: Estate) -> tuple[FailoverProof, dict[str, list[str]]]:
        """Return a proof of `after` and whom it leaves uncovered that was covered, by domain; of some domains alone if they say it."""
        for domains in (self._suspected(), self._domains):
            proof = self._proof.copy()
            proof.update(after, domains)
            worse: dict[str, list[str]] = {}
            for vm_id, keys in proof.uncovered().items():
                for key in set(keys).difference(self._before.get(vm_id, ())):
                    worse.setdefault(key, []).append(vm_id)
            if worse:
                break
        return proof, worse

    def _suspected(self) -> tuple[Domain, ...]:
        return tuple(domain for domain in self._domains if domain.key in self._suspects) if self._suspects else ()

    def _objection(self, vm: VmSnapshot, proof: FailoverProof, worse: Mapping[str, list[str]]) -> Objection:
        # The vm's own host first: that it could not be restarted itself is the plainest reason.
        domains = {domain.key: domain for domain in proof.domains}
        key = min(worse, key=lambda one: (vm.host_id not in domains[one].host_ids, one))
        (host_id,) = domains[key].host_ids
        vm_ids, estate = tuple(sorted(worse[key])), proof.estate
        if vm.vm_id in vm_ids:
            why = proof.why(vm.vm_id, key)
            message = f"it could not be restarted if host {estate.host_name(host_id)} were lost: {why}"
        else:
            names = [estate.vms[vm_id].name for vm_id in vm_ids]
            more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
            told = f"{', '.join(names[:_NAMED_MAX])}{more}"
            message = f"with it, vms {told} could not be restarted if host {estate.host_name(host_id)} were lost"
        return Objection(host_id, estate.host_name(host_id), vm_ids, message)
