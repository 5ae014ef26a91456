"""Power devices through programs that speak as fence-agents do: `key=value` on standard input, the status as exit status."""

import stat
from pathlib import Path

import pytest

from trimtab_controller.fencing import FenceAgents, FencePath, Power, check_path
from trimtab_protos.errors import InvalidRequest

AGENT = """#!/bin/sh
# Keeps the power in a file, as fence_dummy does; notes what it was given, and how.
here="$(dirname "$0")"
cat > "$here/said"
echo "$@" > "$here/argv"
action=$(sed -n 's/^action=//p' "$here/said")
case "$action" in
  off) {off}; exit 0 ;;
  status) [ "$(cat "$here/power")" = off ] && exit 2; exit 0 ;;
esac
exit 1
"""


def agent(directory: Path, *, off: str) -> FenceAgents:
    program = directory / "fence_dummy"
    program.write_text(AGENT.replace("{off}", off))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (directory / "power").write_text("on")
    return FenceAgents((directory,))


def path(directory: Path) -> FencePath:
    secret = directory / "secret"
    secret.write_text("hunter2\n")
    return FencePath(name="bmc", agent="fence_dummy", options={"ip": "10.0.0.9", "username": "root"}, secret_file=str(secret))


def test_off_is_believed_only_when_the_status_was_read_back_off(tmp_path: Path) -> None:
    fencer = agent(tmp_path, off='echo off > "$here/power"')
    assert fencer.status(path(tmp_path)).power is Power.ON
    assert fencer.switch_off(path(tmp_path), timeout_s=5, may_still=lambda: True).power is Power.OFF


def test_a_device_that_says_yes_and_does_nothing_is_not_believed(tmp_path: Path) -> None:
    answer = agent(tmp_path, off="true").switch_off(path(tmp_path), timeout_s=1, may_still=lambda: True)
    assert answer.power is Power.ON
    assert "status is on" in answer.message


def test_nothing_is_switched_off_once_the_host_is_heard_or_another_leads(tmp_path: Path) -> None:
    fencer = agent(tmp_path, off='echo off > "$here/power"')
    assert fencer.switch_off(path(tmp_path), timeout_s=5, may_still=lambda: False).power is Power.UNKNOWN
    assert (tmp_path / "power").read_text() == "on"


def test_a_secret_goes_by_standard_input_and_into_no_argument_and_no_message(tmp_path: Path) -> None:
    fencer = agent(tmp_path, off="exit 7")
    answer = fencer.switch_off(path(tmp_path), timeout_s=1, may_still=lambda: True)
    assert "password=hunter2" in (tmp_path / "said").read_text()
    assert (tmp_path / "argv").read_text().strip() == ""
    assert "hunter2" not in answer.message


def test_an_agent_that_hangs_or_is_missing_is_unknown(tmp_path: Path) -> None:
    hanging = agent(tmp_path, off="exec sleep 30")
    assert "did not answer" in hanging._call(path(tmp_path), "off", timeout_s=1).message
    missing = FencePath(name="x", agent="fence_nowhere", options={})
    answer = hanging.status(missing)
    assert answer.power is Power.UNKNOWN
    assert "apt install" in answer.message


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"agent": "rm"}, "agent"),
        ({"agent": "fence_ack_manual"}, "agent"),
        ({"agent": "fence_../../bin/sh"}, "agent"),
        ({"options": {"password": "hunter2"}}, "options"),
        ({"options": {"ip": "1\naction=on"}}, "options"),
    ],
)
def test_what_is_no_power_device_is_refused_by_field(wrong: dict[str, object], field: str) -> None:
    values = {"name": "bmc", "agent": "fence_redfish", "options": {}, **wrong}
    with pytest.raises(InvalidRequest) as refused:
        check_path(FencePath(**values))  # type: ignore[arg-type]
    assert refused.value.context["field"] == field
