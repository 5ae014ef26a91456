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
