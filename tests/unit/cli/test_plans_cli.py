"""Carrying a plan out, as its operator watches it."""

from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, operation

PLAN = "/v1/plans/plan-12"


def plan(state: str, *steps: str, message: str = "") -> Answer:
    moves = [
        {"position": at, "kind": "migrate", "vm": f"web{at}", "state": step, "message": message if step == "failed" else ""}
        for at, step in enumerate(steps, 1)
    ]
    return Answer({"id": "plan-12", "state": state, "steps": moves})


def carried_out(controller: FakeController, *readings: Answer) -> None:
    controller.on("POST", f"{PLAN}:apply", Answer({"operation": operation("running", kind="plan.apply"), "plan": {}}, status=202))
    controller.on("GET", "/v1/operations/op-01:wait", Answer(operation("done", kind="plan.apply")))
    controller.on("GET", PLAN, *readings)


def test_each_step_is_told_once_as_it_changes(trimtab: Trimtab, controller: FakeController) -> None:
    carried_out(
        controller,
        plan("applying", "running", "pending"),
        plan("applying", "running", "pending"),
        plan("applied", "done", "done"),
    )
    found = trimtab("plan", "apply", "plan-12", "--watch")
    assert found.code == 0, found.err
    told = [line.split()[:4] for line in found.err.splitlines() if "migrate" in line]
    assert told == [["1", "running", "migrate", "web1"], ["1", "done", "migrate", "web1"], ["2", "done", "migrate", "web2"]]


def test_steps_that_failed_are_named_and_end_with_three(trimtab: Trimtab, controller: FakeController) -> None:
    carried_out(controller, plan("applied", "done", "failed", message="no host fits"))
    found = trimtab("plan", "apply", "plan-12", "--watch")
    assert found.code == 3
    assert "1 steps of plan-12 failed: web2: no host fits" in found.err
    assert "trimtab plan get plan-12" in found.err


def test_a_drain_for_review_shows_its_moves_in_order_who_is_in_the_way_its_cure_how_long_and_how_full_its_targets_get(
    trimtab: Trimtab, controller: FakeController
) -> None:
    moves = [
        {
            "position": at,
            "kind": "migrate",
            "vm": f"web{at}",
            "host": "node3",
            "target": "node1",
            "state": "pending",
            "starts_s": 90 * at,
        }
        for at in range(1, 3)
    ]
    blocker = {"cause": "device", "vm": "gpu1", "message": "it has a10", "cure": "trimtab vm update gpu1 --drain-policy restart"}
    drain = {
        "id": "plan-12", "kind": "drain", "state": "open", "duration_s": 270, "steps": moves, "blockers": [blocker],
        "peaks": [{"host": "node1", "vcpus": 0.75, "memory": 0.5, "load": 0.31}],
    }  # fmt: skip
    controller.on("POST", "/v1/plans", Answer(drain, status=201))
    found = trimtab("host", "drain", "node3", "--plan")
    assert found.code == 0, found.err
    assert controller.asked("POST", "/v1/plans")[0].document == {"kind": "drain", "hosts": ["node3"]}
    assert controller.asked("POST", f"{PLAN}:apply") == [], "for review alone"
    lines = [line.split() for line in found.out.splitlines()]
    assert ["takes", "about", "4m", "30s"] in lines
    assert [line[:6] for line in lines if line[2:3] == ["migrate"]] == [
        ["1", "pending", "migrate", "web1", "node3", "node1?"],
        ["2", "pending", "migrate", "web2", "node3", "node1?"],
    ]
    assert "gpu1 (device): it has a10" in found.out
    assert "cure: trimtab vm update gpu1 --drain-policy restart" in found.out
    assert ["node1", "75%", "50%", "31%"] in lines
    assert "trimtab plan apply plan-12" in found.err


def test_what_would_fit_with_other_hosts_and_without_some_is_asked_of_the_controller(
    trimtab: Trimtab, controller: FakeController
) -> None:
    fits = {"count": 12, "is_capped": False, "homeless": ["db"], "largest_by_memory": {"vcpus": 8, "memory_mib": 96 * 1024}}
    controller.on("POST", "/v1/capacity:fit", Answer(fits))
    found = trimtab(
        "capacity", "fit", "--vcpus", "4", "--memory", "16GiB", "--without", "node3", "--add", "2x64c/256GiB", "--keep-free"
    )
    assert found.code == 0, found.err
    asked = controller.asked("POST", "/v1/capacity:fit")[0].document
    assert asked == {"vcpus": 4, "memory_mib": 16384, "without": ["node3"], "add": ["2x64c/256GiB"], "keep_free_hosts": 1}
    assert "12 more vms of 4 vcpus and 16 GiB fit" in found.out
    assert "the largest that fits: 8 vcpus with 96 GiB" in found.out
    assert "vm db would have no place" in found.out
