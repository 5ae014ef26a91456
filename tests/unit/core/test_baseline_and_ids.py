"""The baseline keeps migration possible inside a class; ids say what they are."""

import random
from dataclasses import replace

import pytest

from tests.unit.core.test_migration import HOST
from trimtab_controller.core.baseline import Baseline, common_baseline, newest_q35
from trimtab_controller.core.ids import domain_uuid, free_mac_address, kind_of, mac_address, new_id
from trimtab_controller.core.lifecycle import ENDED_STATES, LIVE_STATES, TRANSITIONS, OperationState


def test_the_baseline_is_what_every_member_runs() -> None:
    new = replace(HOST, machines=("pc-q35-7.2", "pc-q35-8.0"), usable_cpu_models=("EPYC", "Nehalem", "qemu64"))
    old = replace(HOST, machines=("pc-q35-6.2", "pc-q35-7.2"), usable_cpu_models=("Nehalem", "qemu64"))
    assert common_baseline([new, old]) == Baseline("pc-q35-7.2", "Nehalem")


def test_hosts_that_share_nothing_have_no_baseline() -> None:
    assert common_baseline([]) is None
    assert common_baseline([HOST, replace(HOST, machines=("virt-7.2",))]) is None


def test_an_alias_is_never_taken_for_a_machine_type_and_numbers_compare_as_numbers() -> None:
    assert newest_q35(["q35", "pc-q35-9.2", "pc-q35-10.0", "pc-i440fx-9.2"]) == "pc-q35-10.0"
    assert newest_q35(["q35"]) == ""


def test_ids_carry_their_kind_and_sort_by_time() -> None:
    rng = random.Random(1)
    earlier, later = (new_id("vm", now_ms=now_ms, rng=rng) for now_ms in (1000, 1001))
    assert earlier < later
    assert kind_of(earlier) == "vm"
    assert kind_of("web1") == ""
    assert kind_of("vm-short") == ""
    with pytest.raises(ValueError, match="unknown id kind"):
        new_id("node", now_ms=0, rng=rng)


def test_a_vm_has_one_uuid_for_ever_and_macs_are_local_unicast() -> None:
    assert domain_uuid("vm-1") == domain_uuid("vm-1") != domain_uuid("vm-2")
    first_octet = int(mac_address(random.Random(2))[:2], 16)
    assert first_octet & 0b11 == 0b10


def test_a_mac_that_somebody_has_is_drawn_anew() -> None:
    rng = random.Random(3)
    drawn = [mac_address(rng) for _ in range(20)]
    for taken in (drawn[:0], drawn[:1], drawn[:5]):
        assert free_mac_address(random.Random(3), is_taken=taken.__contains__) == drawn[len(taken)]
    assert free_mac_address(random.Random(3), is_taken=lambda _mac: True) in drawn, "it ends, and the database refuses"


def test_every_state_has_its_transitions_and_ended_ones_have_none_but_attention() -> None:
    assert TRANSITIONS.keys() == set(OperationState)
    assert set(OperationState) == LIVE_STATES | ENDED_STATES
    assert {state for state in ENDED_STATES if TRANSITIONS[state]} == {OperationState.NEEDS_ATTENTION}
