"""The end that one of our own files demands, as data: `expected.end`. Files that a search found demand the invariants alone (`{}`).

running   vm -> hosts on which its process really is       never     what must not have happened
standing  host -> what the core calls it                   alarms    codes that must have been raised
why       vm -> part of the reason that it shows           order     vms in the order of their first starts after `after_s`
starts    vm -> number of starts                           within_s  vm -> seconds from `after_s` to its first start
"""

from collections.abc import Mapping
from typing import Any

from tests.scenarios.schema import Run

KEYS = frozenset({"running", "standing", "why", "never", "alarms", "order", "starts", "within_s", "after_s", "degraded"})


def compare(run: Run, end: Mapping[str, Any]) -> None:
    unknown = set(end) - KEYS
    assert not unknown, f"expected.end does not know {unknown}"
    after_s = float(end.get("after_s", 60.0))
    started = [one for one in run.world.happened("started") if one.t > after_s]
    for vm, hosts in end.get("running", {}).items():
        assert run.world.running_on(vm) == hosts, f"{vm} runs on {run.world.running_on(vm)}: {_why(run, vm)}"
    for host, standing in end.get("standing", {}).items():
        assert run.core.hosts[host].standing.value == standing, f"{host} is {run.core.hosts[host].standing.value}"
    for host, text in end.get("degraded", {}).items():
        assert any(text in line for line in run.core.hosts[host].degraded), run.core.hosts[host].degraded
    for vm, text in end.get("why", {}).items():
        assert text in _why(run, vm), f"{vm} says: {_why(run, vm)!r}"
    for what in end.get("never", []):
        assert not [one for one in run.world.happened(what) if one.t > after_s], f"{what} happened"
    codes = {alarm.code for _at, alarm in run.world.engine.alarms}
    assert set(end.get("alarms", [])) <= codes, codes
    order = [one.subject for one in started]
    if "order" in end:
        assert [vm for vm in dict.fromkeys(order) if vm in end["order"]] == end["order"], order
    for vm, count in end.get("starts", {}).items():
        assert order.count(vm) == count, f"{vm} started {order.count(vm)} times"
    for vm, seconds in end.get("within_s", {}).items():
        firsts = [one.t for one in started if one.subject == vm]
        assert firsts, f"{vm} never started"
        assert firsts[0] - after_s <= seconds, f"{vm} took {firsts[0] - after_s:.1f} s"


def _why(run: Run, vm: str) -> str:
    record = run.core.vms.get(vm)
    return record.why if record is not None else ""
