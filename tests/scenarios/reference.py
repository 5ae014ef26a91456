"""What binds of the reference's cases, and which of them are left out, each with its reason.

A named target host binds only where a strict rule forces it; `manager_state` never binds; what runs and what does not, which hosts
were fenced, which requests were refused, and that every recovery began after its fence do.
"""

from collections.abc import Mapping
from typing import Any

from tests.scenarios.schema import Run
from trimtab_controller.core.failover.records import HostRule, Proof

EXCLUDED_CATEGORIES = {
    "leader": "about how members of the reference's cluster elect a leader among themselves; ours is a lease in SQL",
    "disarm": "about switching the reference's HA stack off and on; ours is `failover pause`, with cases of its own",
    "upgrade": "about the format of the reference's own state files",
    "balancing": "about the rebalancer's arithmetic, which is not part of failover",
    "state-store": "the reference stores state on each member; ours is one database, whose loss has cases of its own",
    "agent": "about the reference's agent handing its watchdog over; hvc-rolling-upgrade covers ours",
    "ignore": "not among the categories that bind; a vm that is not kept is never touched",
}
EXCLUDED = {
    "pve-service-command7": "a half-written move in the reference's own state file, which cannot exist here: a move is one transaction",
    "pve-service-command9": "begins inside the reference's own fence state with its agent lock, which has no counterpart",
}


def exclusion(scenario: Mapping[str, Any]) -> str:
    """Return why this case does not bind, '' where it does."""
    if scenario["id"] in EXCLUDED:
        return EXCLUDED[scenario["id"]]
    if scenario["category"] in EXCLUDED_CATEGORIES:
        return EXCLUDED_CATEGORIES[scenario["category"]]
    if any(vm["kind"] == "container" for vm in scenario["vms"].values()):
        return "about containers, which move cold by a mechanism that vms do not have"
    return ""


def compare(run: Run) -> None:
    """Raise where the end differs from the reference's in what binds."""
    expected = run.scenario["expected"]
    _compare_running(run, expected["final_vms"])
    _compare_fenced(run, expected)
    _compare_refused(run, expected["milestones"])
    _compare_recoveries(run, expected["milestones"])


def _compare_running(run: Run, final: Mapping[str, Any]) -> None:
    for vm, facts in final.items():
        places = run.world.running_on(vm)
        record = run.core.vms.get(vm)
        why = record.why if record is not None else ""
        assert bool(places) == bool(facts["running_on"]), f"{vm} runs on {places}, the reference on {facts['running_on']}: {why}"
        forced = _forced_host(run, vm)
        if places and forced:
            assert places == [forced] == facts["running_on"], f"{vm} is bound to {forced}, runs on {places}: {why}"


def _forced_host(run: Run, vm: str) -> str:
    """Return the one host that a strict rule leaves to the vm, '' where it leaves more."""
    for rule in run.core.rules:
        if isinstance(rule, HostRule) and rule.is_strict and vm in rule.vms and len(rule.hosts) == 1:
            return next(iter(rule.hosts))
    return ""


def _compare_fenced(run: Run, expected: Mapping[str, Any]) -> None:
    """A host that went down cleanly on request is let go of by its own word; the reference calls that a fence, or does not."""
    wanted = {one["host"] for one in expected["fence_confirmed"]}
    fenced = {one.host: one.detail for one in run.world.happened("fence_confirmed")}
    closed = {one.host for one in run.world.happened("went_down")}
    assert wanted - closed <= set(fenced), f"fenced {set(fenced)}, the reference {wanted}"
    unexpected = {host for host, proof in fenced.items() if proof is not Proof.CLEAN_STOP} - wanted
    # A vm that is wished off holds no disk open in the reference's eyes; we prove the host silent before its disks are used elsewhere.
    assert unexpected <= {one["host"] for one in run.scenario["timeline"] if one.get("host")}, f"fenced {unexpected} for nothing"
    if not wanted:
        assert not unexpected, f"fenced {unexpected}, the reference nobody"


def _compare_refused(run: Run, milestones: list[Mapping[str, Any]]) -> None:
    wanted = [one["detail"] for one in milestones if one["what"] == "operator_request_refused"]
    refused = [refusal.subject for refusal in run.world.engine.refusals]
    for detail in wanted:
        assert any(subject in detail for subject in refused), f"not refused: {detail}"
    # We refuse a hand move against a strict rule; the reference carries it out and then undoes it.
    extra = [one for one in run.world.engine.refusals if not any(one.subject in detail for detail in wanted)]
    assert all("a strict rule" in one.message for one in extra), extra


def _compare_recoveries(run: Run, milestones: list[Mapping[str, Any]]) -> None:
    """Every recovery begins after the fence, and is not slower than the reference's."""
    slowest = {one["vm"]: one["seconds_since_host_failure"] for one in milestones if "seconds_since_host_failure" in one}
    for vm, seconds in slowest.items():
        faults = [one.t for one in run.world.log if one.what in {"link_cut", "power_cut"}]
        starts = [one.t for one in run.world.happened("started", vm) if faults and one.t > faults[0]]
        fences = [one.t for one in run.world.happened("fence_confirmed")]
        if starts and fences:
            assert fences[0] <= starts[0], f"{vm} started before the fence"
            assert starts[0] - faults[0] <= seconds, f"{vm} took {starts[0] - faults[0]:.0f} s, the reference {seconds} s"
