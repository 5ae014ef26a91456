"""Where failover lets a guest start that is down."""

from trimtab_controller.core.failover import FailoverSettings, step
from trimtab_controller.core.failover.effects import StartVm
from trimtab_controller.core.failover.events import Tick
from trimtab_controller.core.failover.records import HostRecord, Phase, State, VmRecord
from trimtab_controller.core.lifecycle import HostConnectivity

NOW_S = 10_000.0


def host(name: str, *, heard_for_s: float, quarantine_s: float) -> HostRecord:
    return HostRecord(
        id=name,
        standing=HostConnectivity.UP,
        since_s=NOW_S - heard_for_s,
        heard_s=NOW_S,
        handled_s=NOW_S,
        has_listed=True,
        losses=(NOW_S - heard_for_s,) * 5,
        quarantined_until_s=NOW_S + quarantine_s,
    )


def started_on(*hosts: HostRecord) -> tuple[str, str]:
    """Return where the guest is started ('' nowhere), and why it waits."""
    vm = VmRecord(id="vm-1", host="gone", phase=Phase.RECOVERING)
    state = State(settings=FailoverSettings(), hosts={one.id: one for one in hosts}, vms={vm.id: vm}, ticked_s=NOW_S)
    state, effects = step(state, Tick(), NOW_S)
    return next((one.host for one in effects if isinstance(one, StartVm)), ""), state.vms[vm.id].why


def test_a_guest_that_is_down_starts_on_a_steady_host_in_quarantine_where_no_other_is_left() -> None:
    flapped, fresh = host("a", heard_for_s=300, quarantine_s=900), host("b", heard_for_s=20, quarantine_s=40)
    assert started_on(flapped, fresh)[0] == "a"


def test_a_host_in_quarantine_takes_nothing_while_another_can() -> None:
    assert started_on(host("a", heard_for_s=300, quarantine_s=900), host("b", heard_for_s=300, quarantine_s=-1))[0] == "b"


def test_a_host_that_was_heard_for_seconds_only_takes_nothing_though_it_is_the_last() -> None:
    where, why = started_on(host("a", heard_for_s=20, quarantine_s=40))
    assert where == ""
    assert "in quarantine" in why
