"""CPU features in definitions and in our lists, and what a host says that guests can have."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt
import pytest

from tests.unit.agent.kvm import factories as make
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import cpu_features, description
from trimtab_agent.hypervisor.kvm.config import KvmConfig
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.cpu_features import HostFeatures, HostFeaturesReader
from trimtab_agent.hypervisor.kvm.domain_xml import HostTraits, build
from trimtab_agent.hypervisor.kvm.inventory import InventoryReader
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DomainState

POLICIES = [("require", "vmx"), ("disable", "-vmx"), ("optional", "?vmx"), ("forbid", "!vmx"), ("force", "+vmx")]


@pytest.mark.parametrize(("policy", "said"), [*POLICIES, (None, "vmx")])
def test_a_feature_is_said_with_the_sign_of_its_policy(policy: str | None, said: str) -> None:
    attribute = f"policy='{policy}'" if policy else ""
    assert cpu_features.described(parse(f"<cpu><feature {attribute} name='vmx'/></cpu>")) == (said,)


def test_a_definition_without_a_cpu_says_none() -> None:
    assert cpu_features.described(None) == ()


def test_what_was_written_is_described_alike() -> None:
    spec = make.domain(cpu_features=("aes", "-vmx", "?svm"))
    xml = build(spec, Stamp(1, 1), HostTraits(accelerator="kvm", console_log="/l", console_socket="/s"))
    seen = description.describe(
        xml, state=DomainState.RUNNING, is_persistent=True, has_autostart=False, volumes={}, obstacles=()
    )  # fmt: skip
    assert (seen.cpu_model, seen.cpu_features) == (spec.cpu_model, ("aes", "-vmx", "?svm"))


@pytest.mark.parametrize("feature", ["!vmx", "+vmx", "-", "--vmx", "?-vmx", ""])
def test_what_no_vm_has_is_not_written(feature: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        cpu_features.write(ElementTree.Element("cpu"), (feature,))
    assert refused.value.context["field"] == "cpu_features"


# --- the host's own ----------------------------------------------------------------------------------------------------------

OFFERED = """
<domainCapabilities><cpu><mode name='host-passthrough' supported='yes'/>
<mode name='host-model' supported='yes'><model fallback='forbid'>EPYC</model><vendor>AMD</vendor>
<feature policy='require' name='umip'/><feature policy='disable' name='sha-ni'/></mode></cpu></domainCapabilities>
"""
# What libvirt 9.0 makes of such a model, shortened.
EXPANDED = """
<cpu mode='custom' match='exact'><model fallback='forbid'>EPYC</model><vendor>AMD</vendor>
<feature policy='require' name='umip'/><feature policy='require' name='aes'/><feature policy='disable' name='sha-ni'/></cpu>
"""


class Refused(libvirt.libvirtError):
    """An error of libvirt's with a code, which its own constructor takes from the last call."""

    def __init__(self, code: int) -> None:
        super().__init__("refused")
        self.code = code

    def get_error_code(self) -> int:
        return self.code


@dataclass
class Libvirt:
    """A connection that says what a CPU's name implies, or refuses to."""

    code: int = 0
    version: int = 9_000_000
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def getLibVersion(self) -> int:
        return self.version

    def getVersion(self) -> int:
        return 7_002_000

    def getInfo(self) -> list[Any]:
        return ["x86_64", 1024, 4, 0, 1, 1, 4, 1]

    def getCapabilities(self) -> str:
        return "<capabilities><host><cpu><arch>x86_64</arch><model>EPYC</model></cpu></host></capabilities>"

    def getDomainCapabilities(self, *_given: Any) -> str:
        return OFFERED

    def baselineHypervisorCPU(self, *given: Any) -> str:
        self.asked.append(given)
        if self.code:
            raise Refused(self.code)
        return EXPANDED


def read(reader: HostFeaturesReader, connection: Libvirt, offered: str = OFFERED) -> HostFeatures:
    return reader.read(connection, parse(offered), machine="q35", domain_type="kvm")


def test_what_the_model_of_the_host_implies_is_listed_and_what_it_lacks_is_not() -> None:
    connection = Libvirt()
    assert read(HostFeaturesReader(), connection) == HostFeatures(("aes", "umip"), are_all=True)
    ((emulator, arch, machine, domain_type, cpus, flags),) = connection.asked
    assert (emulator, arch, machine, domain_type) == (None, "x86_64", "q35", "kvm")
    assert flags == libvirt.VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES
    (cpu,) = map(parse, cpus)
    assert (cpu.tag, cpu.attrib, cpu.findtext("model"), len(cpu.findall("feature"))) == ("cpu", {}, "EPYC", 2)


def test_libvirt_is_asked_again_only_when_its_answer_may_be_another() -> None:
    reader, connection = HostFeaturesReader(), Libvirt()
    for _repeat in range(3):
        read(reader, connection)
    assert len(connection.asked) == 1
    read(reader, connection, OFFERED.replace("umip", "vaes"))
    connection.version += 1
    read(reader, connection, OFFERED.replace("umip", "vaes"))
    assert len(connection.asked) == 3


@pytest.mark.parametrize("code", [libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_CONFIG_UNSUPPORTED, libvirt.VIR_ERR_INTERNAL_ERROR])
def test_a_libvirt_that_cannot_say_it_leaves_what_the_host_has_beyond_its_model(code: int) -> None:
    assert read(HostFeaturesReader(), Libvirt(code)) == HostFeatures(("umip",), are_all=False)


def test_another_error_is_an_error_and_is_not_remembered() -> None:
    reader, connection = HostFeaturesReader(), Libvirt(libvirt.VIR_ERR_RPC)
    with pytest.raises(libvirt.libvirtError):
        read(reader, connection)
    connection.code = 0
    assert read(reader, connection).are_all


def test_a_host_without_a_model_of_its_own_lists_nothing() -> None:
    connection = Libvirt()
    assert read(HostFeaturesReader(), connection, "<domainCapabilities/>") == HostFeatures((), are_all=False)
    assert connection.asked == []


class Lent(Connection):
    """A connection to such a libvirt."""

    def __init__(self, to: Libvirt) -> None:
        super().__init__("test:///default", on_open=lambda _connection: None, on_up=lambda: None)
        self._to = to

    @contextmanager
    def use(self, doing: str, *, changes: bool = False) -> Iterator[Any]:
        yield self._to


@pytest.mark.parametrize(("code", "listed"), [(0, ("aes", "umip")), (libvirt.VIR_ERR_NO_SUPPORT, ("umip",))])
def test_a_host_says_whether_it_lists_all_of_them(tmp_path: Path, code: int, listed: tuple[str, ...]) -> None:
    config = KvmConfig(migration_address="192.0.2.1", state_dir=tmp_path)
    reader = InventoryReader(config, Lent(Libvirt(code)), boot_id="b-1", accelerator=lambda: "kvm")
    told = reader.read(only_fitness=True)
    assert told.cpu_features == listed
    assert ("all-cpu-features" in told.capabilities) == (code == 0)
    assert {"optional-cpu-features", "migrate-tls"} <= set(told.capabilities)
