"""Recovery plans as values: the newest whole copy, groups in order, and a run that goes on from wherever it was cut short."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from trimtab_controller.core.recovery_plans import (
    Awaits,
    Begin,
    Copy,
    Group,
    Mode,
    Outcome,
    Over,
    Pause,
    begin,
    check,
    choose,
    next_step,
    with_vms,
)
from trimtab_protos.errors import InvalidRequest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GROUPS = (Group(name="data", vms=["db"]), Group(name="front", vms=["web1", "web2"], delay_s=30))


def copy(vm: str, hours: float, **fields: object) -> Copy:
    known = {"backup_id": f"bk-{vm}-{hours}", "vm_name": vm, "is_damaged": False, "level": 0}
    return Copy(taken_at=NOW - timedelta(hours=hours), **{**known, **fields})  # type: ignore[arg-type]


def test_the_newest_whole_copy_is_taken_and_its_age_is_what_is_lost() -> None:
    copies = [copy("db", 5), copy("db", 1, is_damaged=True), copy("db", 2), copy("web1", 0.5)]
    chosen = choose(copies, "db")
    assert chosen is not None
    assert chosen.backup_id == "bk-db-2"
    run = begin(GROUPS, copies, {}, mode=Mode.REAL, now=NOW)
    assert [(one.vm, one.loss_window_s) for one in run.groups[0].vms] == [("db", 7200.0)]
    assert [one.outcome for one in run.groups[1].vms] == [Outcome.WAITING, Outcome.FAILED]


def test_what_is_here_is_left_only_by_a_real_run() -> None:
    copies = [copy("db", 1)]
    real = begin(GROUPS[:1], copies, {"db": "vm-1"}, mode=Mode.REAL, now=NOW)
    test = begin(GROUPS[:1], copies, {"db": "vm-1"}, mode=Mode.TEST, now=NOW)
    assert [run.groups[0].vms[0].outcome for run in (real, test)] == [Outcome.PRESENT, Outcome.WAITING]


def test_groups_follow_each_other_with_their_delays_to_the_end() -> None:
    run = begin(GROUPS, [copy(vm, 1) for vm in ("db", "web1", "web2")], {}, mode=Mode.REAL, now=NOW)
    assert next_step(GROUPS, run, now=NOW) == Begin(group=0)
    run = with_vms(run, 0, [replace(one, outcome=Outcome.RUNNING) for one in run.groups[0].vms], now=NOW)
    assert isinstance(next_step(GROUPS, run, now=NOW), Pause)
    run = with_vms(run, 0, [replace(one, outcome=Outcome.BACK) for one in run.groups[0].vms], now=NOW)
    waits = next_step(GROUPS, run, now=NOW + timedelta(seconds=10))
    assert waits == Pause(seconds=20.0, why="the delay before group front")
    assert next_step(GROUPS, run, now=NOW + timedelta(seconds=30)) == Begin(group=1)
    run = with_vms(run, 1, [replace(one, outcome=Outcome.BACK) for one in run.groups[1].vms], now=NOW)
    assert next_step(GROUPS, run, now=NOW) == Over()


def test_a_failed_vm_stops_the_run_once_the_others_of_its_group_ended() -> None:
    run = begin(GROUPS, [copy("db", 1)], {}, mode=Mode.REAL, now=NOW)
    (db,) = run.groups[0].vms
    failed = with_vms(run, 0, [replace(db, outcome=Outcome.FAILED, problem="no room")], now=NOW)
    over = next_step(GROUPS, failed, now=NOW)
    assert isinstance(over, Over)
    assert "group data" in over.problem
    assert "no room" in over.problem


@pytest.mark.parametrize(
    ("groups", "field"),
    [
        ([], "groups"),
        ([Group(name="a", vms=["db"]), Group(name="a", vms=["web"])], "groups"),
        ([Group(name="a", vms=["db"]), Group(name="b", vms=["db"])], "groups"),
        ([Group(name="a", vms=[])], "groups[0].vms"),
        ([Group(name="a", vms=["db"], pattern="x")], "groups[0].pattern"),
        ([Group(name="a", vms=["db"], awaits=Awaits.PATTERN)], "groups[0].pattern"),
        ([Group(name="a", vms=["db"], awaits=Awaits.PATTERN, pattern="(")], "groups[0].pattern"),
        ([Group(name="a", vms=["db"]), Group(name="b", vms=["web"], tcp=-1)], "groups[1].tcp"),
        ([Group(name="a", vms=["db"], tcp=65536)], "groups[0].tcp"),
    ],
)
def test_what_no_run_can_follow_is_refused_by_field(groups: list[Group], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(groups)
    assert refused.value.context["field"] == field


@pytest.mark.parametrize("tcp", [0, 1, 65535])
def test_a_port_goes_with_whatever_else_is_awaited(tcp: int) -> None:
    check([Group(name="a", vms=["db"], awaits=Awaits.PATTERN, pattern="login:", tcp=tcp), Group(name="b", vms=["web"], tcp=tcp)])
