"""Random histories of a simulated fleet, shrunk to the shortest that breaks an invariant and saved as a scenario file.

The rules are the events of the scenario schema; the invariants (I1 to I13) are checked after every event of the world, and those about
what may not stay (I4, I8) at the end, when all that was cut off is well again and has had its time. With the wait for the lease's end taken
out of the core the same machine finds a double run: it is not blind.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.scenarios.invariants import Violation
from tests.scenarios.schema import Run, build
from tests.scenarios.timeline import EVENTS
from trimtab_controller.core.failover import FailoverSettings

CASES = Path(__file__).resolve().parents[1] / "scenarios" / "cases"
HOSTS = ("h1", "h2", "h3", "h4")
VMS = ("a", "b", "c", "d", "e")
hosts, vms = st.sampled_from(HOSTS), st.sampled_from(VMS)
seconds = st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.0, 12.0, 16.0, 25.0, 60.0])


@dataclass(frozen=True)
class WithoutTheWait(FailoverSettings):
    """A lease's end is not waited for."""

    def lease_wait_s(self, kill_s: float) -> float:
        return 0.0


class Fleet(RuleBasedStateMachine):
    tuned: FailoverSettings = FailoverSettings()
    saves = True

    def __init__(self) -> None:
        super().__init__()
        self.run_: Run | None = None
        self.timeline: list[dict[str, Any]] = []

    @initialize(
        seed=st.integers(0, 50), beacon=st.booleans(), device=st.sampled_from(["works", "none", "error", "slow", "lying"])
    )
    def found(self, seed: int, beacon: bool, device: str) -> None:
        scenario: dict[str, Any] = {
            "id": "found",
            "category": "search",
            "title": "Found by a random search, shrunk",
            "seed": seed,
            "cluster": {
                "storage": "shared",
                "beacon": beacon,
                "lease": {"controller_wait_extra_s": 1},
                "hosts": {name: {"powered": True, "power_fence": device, "mem_bytes": 24 << 30} for name in HOSTS},
            },
            "vms": {
                name: {"kind": "vm", "host": HOSTS[index % 4], "desired": "started", "mem_bytes": 4 << 30}
                for index, name in enumerate(VMS)
            },
            "rules": [{"kind": "vm-vm", "vms": ["a", "e"], "affinity": "keep-apart"}],
            "timeline": self.timeline,
            "expected": {"end": {}},
        }
        self.scenario = scenario
        self.run_ = build(scenario, settings=self.tuned)
        self.run_.world.begin()
        self.advance(12.0)

    @property
    def run(self) -> Run:
        assert self.run_ is not None
        return self.run_

    def advance(self, delay_s: float) -> None:
        self.hold_to(lambda: self.run.world.run_until(self.run.world.now + delay_s))

    def hold_to(self, check: Callable[[], None]) -> None:
        """Run a check; what breaks an invariant is saved as a scenario."""
        try:
            check()
        except Violation as violation:
            if self.saves:
                name = str(violation).split(" ", 1)[0].lower()
                self.scenario["title"] = f"Found by a random search, shrunk: {violation}"
                self.scenario["id"] = f"found-{name}"
                (CASES / f"found-{name}.json").write_text(json.dumps(self.scenario, indent=1) + "\n")
            raise

    def happen(self, event: str, **facts: Any) -> None:
        one = {"t": round(self.run.world.now, 3), "event": event, **facts}
        self.timeline.append(one)
        EVENTS[event](self.run, one)

    @rule(delay_s=seconds)
    def time_passes(self, delay_s: float) -> None:
        self.advance(delay_s)

    @rule(host=hosts, value=st.sampled_from(["off", "on"]), delay_s=seconds)
    def power(self, host: str, value: str, delay_s: float) -> None:
        self.happen("host_power", host=host, value=value)
        self.advance(delay_s)

    @rule(
        host=st.sampled_from([*HOSTS, "*"]),
        value=st.sampled_from(["cut", "ok", "cut_one_way", "drop_replies"]),
        delay_s=seconds,
    )
    def link(self, host: str, value: str, delay_s: float) -> None:
        self.happen("link", a="controller", b=host, value=value)
        self.advance(delay_s)

    @rule(host=hosts, rate=st.sampled_from([0.99, 1.0, 1.01]))
    def clock_rate(self, host: str, rate: float) -> None:
        self.happen("clock_rate", who=host, rate=rate)

    @rule(host=hosts, event=st.sampled_from(["sigstop", "sigcont", "kill9"]), delay_s=seconds)
    def agent(self, host: str, event: str, delay_s: float) -> None:
        self.happen(event, what="agent", host=host)
        self.advance(delay_s)

    @rule(how=st.sampled_from(["kill9", "sigstop"]), what=st.sampled_from(["controller", "control-plane"]), delay_s=seconds)
    def controller_away(self, how: str, what: str, delay_s: float) -> None:
        if how == "sigstop":
            self.happen("sigstop", what="controller")
        else:
            self.happen("kill9", what=what)
        self.advance(delay_s)
        if how == "sigstop":
            self.happen("sigcont", what="controller")
        else:
            self.happen("start", what=what)

    @rule(host=hosts, value=st.sampled_from(["works", "error", "slow", "lying"]))
    def device(self, host: str, value: str) -> None:
        self.happen("power_fence_device", host=host, value=value, seconds=20)

    @rule(host=hosts, value=st.sampled_from(["lost", "ok"]), delay_s=seconds)
    def storage(self, host: str, value: str, delay_s: float) -> None:
        self.happen("storage_access", host=host, value=value)
        self.advance(delay_s)

    @rule(vm=vms, times=st.integers(1, 3))
    def crash(self, vm: str, times: int) -> None:
        self.happen("guest_crash", vm=vm, times=times)

    @rule(vm=vms, host=hosts, event=st.sampled_from(["vm_live_migrate", "vm_cold_move"]), delay_s=seconds)
    def move(self, vm: str, host: str, event: str, delay_s: float) -> None:
        self.happen(event, vm=vm, target=host)
        self.advance(delay_s)

    @rule(vm=vms, value=st.sampled_from(["started", "stopped"]), delay_s=seconds)
    def wish(self, vm: str, value: str, delay_s: float) -> None:
        self.happen("vm_desired_state", vm=vm, value=value)
        self.advance(delay_s)

    @precondition(lambda self: len(self.timeline) > 3)
    @rule(vm=vms)
    def delete(self, vm: str) -> None:
        self.happen("submit", op="delete", vm=vm)

    @rule(host=hosts, value=st.sampled_from(["on", "off"]), delay_s=seconds)
    def maintenance(self, host: str, value: str, delay_s: float) -> None:
        self.happen("host_maintenance", host=host, value=value)
        self.advance(delay_s)

    @rule(host=hosts)
    def release(self, host: str) -> None:
        self.happen("failover_release", host=host)

    def teardown(self) -> None:
        if self.run_ is None or self.run.world.now >= 5000:
            return
        self.advance(200.0)
        self.happen("link", a="controller", b="*", value="ok")
        for host in HOSTS:
            self.happen("storage_access", host=host, value="ok")
            self.happen("sigcont", what="agent", host=host)
        self.advance(400.0)
        self.hold_to(lambda: self.run.invariants.at_end(self.run.world))


def machine_of(base: FailoverSettings, *, saves: bool) -> type[Fleet]:
    return type("TunedFleet", (Fleet,), {"tuned": base, "saves": saves})


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.mark.timeout(600)
def test_no_history_breaks_an_invariant() -> None:
    found = settings(max_examples=60, stateful_step_count=14, deadline=None, suppress_health_check=QUIET, derandomize=True)
    run_state_machine_as_test(machine_of(FailoverSettings(), saves=True), settings=found)


@pytest.mark.timeout(600)
def test_the_machine_finds_the_double_run_where_the_lease_is_not_waited_for() -> None:
    tried = settings(
        max_examples=300,
        stateful_step_count=8,
        deadline=None,
        suppress_health_check=QUIET,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(Violation, match="I1"):
        run_state_machine_as_test(machine_of(WithoutTheWait(), saves=False), settings=tried)
