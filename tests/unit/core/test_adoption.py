"""Which CPU the vm has that a domain becomes, and what refuses it before anything changes."""

from dataclasses import replace

import pytest

from trimtab_controller.core.adoption import AdoptionPlan, HostFacts, NetworkChoice, PoolPlace, plan
from trimtab_protos.adoption_messages import DescribedDisk, DomainDescription
from trimtab_protos.messages import DomainState

HOST = HostFacts(
    name="node1",
    machines=("pc-q35-7.2",),
    cpu_model="EPYC",
    usable_cpu_models=frozenset({"EPYC", "Nehalem", "Westmere", "kvm64", "qemu64"}),
    cpu_features=frozenset({"aes", "vmx"}),
    lists_all_cpu_features=True,
    pools=(PoolPlace(id="pool-a", name="fast", path="/srv"),),
    networks={"br0": NetworkChoice("net-a", "lan")},
)
LEGACY = DomainDescription(
    uuid="3b0e7a52-1c1c-4f43-8a53-0f0a0b0c0d0e",
    name="legacy",
    state=DomainState.RUNNING,
    is_persistent=True,
    machine="pc-q35-7.2",
    vcpus=1,
    memory_mib=96,
    disks=(DescribedDisk(target="vda", path="/srv/a.img", bus="virtio", size_bytes=1 << 20),),
)


def planned(mode: str, model: str, *features: str, host: HostFacts = HOST) -> AdoptionPlan:
    return plan(replace(LEGACY, cpu_mode=mode, cpu_model=model, cpu_features=features), host)


@pytest.mark.parametrize(
    ("mode", "model", "becomes", "told"),
    [
        ("custom", "Nehalem", "Nehalem", ""),
        ("", "", "qemu64", ""),
        ("", "kvm64", "kvm64", ""),
        ("host-passthrough", "", "EPYC", "CPU host-passthrough becomes model EPYC"),
        ("host-model", "", "EPYC", "CPU host-model becomes model EPYC"),
        ("maximum", "", "EPYC", "CPU maximum becomes model EPYC"),
    ],
)
def test_a_domain_gets_a_named_model(mode: str, model: str, becomes: str, told: str) -> None:
    found = planned(mode, model)
    assert (found.cpu_model, found.refusals) == (becomes, ())
    assert [one for one in found.changes if "CPU" in one] == ([told] if told else [])


@pytest.mark.parametrize(
    ("mode", "model", "wanted"),
    [
        ("custom", "Icelake-Server", "Icelake-Server"),
        ("host-passthrough", "", "EPYC"),
        ("host-model", "", "EPYC"),
        ("", "", "qemu64"),
    ],
)
def test_a_model_that_its_host_cannot_run_is_refused_with_those_that_it_can(mode: str, model: str, wanted: str) -> None:
    host = replace(HOST, usable_cpu_models=frozenset({"kvm64", "Nehalem", "Westmere"}))
    (refusal,) = planned(mode, model, host=host).refusals
    assert (refusal.code, refusal.message) == (
        "cpu-model-unusable",
        f"cpu_model: domain legacy would get {wanted}, which host node1 cannot run; name another in its definition "
        "(`virsh edit legacy`: Westmere, Nehalem) and stop and start it",
    )


def test_a_host_that_names_no_model_and_one_that_tells_none_are_refused() -> None:
    (unknown,) = planned("host-model", "", host=replace(HOST, cpu_model="")).refusals
    assert unknown.code == "cpu-unknown"
    (none,) = planned("custom", "Nehalem", host=replace(HOST, usable_cpu_models=())).refusals
    assert (none.code, "one that it can" in none.message) == ("cpu-model-unusable", True)
    (rest,) = planned("custom", "Nehalem", host=replace(HOST, usable_cpu_models=("z2", "z1"))).refusals
    assert "z1, z2" in rest.message


@pytest.mark.parametrize("mode", ["custom", "host-passthrough", "host-model"])
@pytest.mark.parametrize(
    ("described", "kept", "told"),
    [
        ("aes", "aes", ""),
        ("-vmx", "-vmx", ""),
        ("-svm", "-svm", ""),
        ("?svm", "?svm", ""),
        ("!vmx", "-vmx", "disabled instead of forbidden"),
        ("+vmx", "vmx", "required instead of forced"),
    ],
)
def test_each_policy_of_a_feature_is_kept_or_told(mode: str, described: str, kept: str, told: str) -> None:
    found = planned(mode, "Nehalem" if mode == "custom" else "", described)
    assert (found.cpu_features, found.refusals) == ((kept,), ())
    assert [told in one for one in found.changes if "CPU feature" in one] == ([True] if told else [])


@pytest.mark.parametrize("described", ["sha-ni", "+sha-ni"])
def test_a_feature_that_its_host_does_not_have_is_refused_for_no_host_would_start_it(described: str) -> None:
    (refusal,) = planned("custom", "Nehalem", described).refusals
    assert (refusal.code, refusal.message) == (
        "cpu-features-missing",
        "cpu_features: domain legacy requires sha-ni, which host node1 does not list; "
        "take them out of its definition (`virsh edit legacy`) and stop and start it",
    )
    (older,) = planned("custom", "Nehalem", described, host=replace(HOST, lists_all_cpu_features=False)).refusals
    assert "its agent tells only some, update it; or take them out" in older.message
