"""The lab's own promises: hosts are separate machines, faults are what they are called, and nothing stays behind.

One lab of two hosts serves the whole module; every test gets it healed and booted.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest
from click.testing import CliRunner

from tests.lab.ticks import spoken
from trimtab_lab.domains import GuestSpec, domain_xml, write_seed
from trimtab_lab.errors import LabError
from trimtab_lab.guest import build_guest_image
from trimtab_lab.hosts import Lab, file_of
from trimtab_lab.main import main
from trimtab_lab.specs import CTL

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

GUEST_TIMEOUT_S = 120.0
"""A guest ticks after about 5 s on an idle machine; the rest is for a machine full of other tests."""

# Stands in for trimtab-agent: it beats into a file, so that running, stopped and dead can be told apart.
BEATING_AGENT = """\
#!/bin/sh
[ "$1 $2" = "run --config" ] || exit 2
while :; do date +%s%N > /var/lib/trimtab/beat.new && mv /var/lib/trimtab/beat.new /var/lib/trimtab/beat; sleep 0.05; done
"""


def eventually(condition: Callable[[], bool], *, within_s: float = 20.0) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def module_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("lab")
    agent = directory / "beating-agent"
    agent.write_text(BEATING_AGENT)
    agent.chmod(0o755)
    spec = Lab.named(f"t{os.getpid()}", state_directory=directory / "state").spec
    lab = Lab(spec, agent_command=[str(agent)])
    try:
        lab.up(hosts=2)
        shutil.copy(build_guest_image().qcow2, lab.spec.shared_mount / "micro.qcow2")
        yield lab
    finally:
        lab.down()


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    module_lab.up(hosts=2)
    for name in ("node1", "node2"):
        module_lab.thaw(name)
        module_lab.heal(name)
    module_lab.heal(CTL)
    return module_lab


def hardware_address(number: int) -> str:
    return f"52:54:00:12:34:{number:02x}"


def guest_address(lab: Lab, number: int) -> str:
    return f"10.{lab.spec.network}.1.{100 + number}"


def start_guest(lab: Lab, host: str, number: int) -> libvirt.virDomain:
    """Starts guest `gN` from a fresh linked clone on shared storage, with its address in the guests' network."""
    name = f"g{number}"
    shared = "/srv/trimtab-shared"
    write_seed(
        lab.spec.shared_mount / f"{name}.iso",
        hostname=name,
        hardware_address=hardware_address(number),
        address=f"{guest_address(lab, number)}/24",
    )
    clone = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"{shared}/micro.qcow2"]
    lab.run(host, [*clone, f"{shared}/{name}.qcow2"])
    connection = libvirt.open(lab.libvirt_uri(host))
    domain = connection.defineXML(
        domain_xml(
            GuestSpec(
                name=name,
                disk=f"{shared}/{name}.qcow2",
                hardware_address=hardware_address(number),
                seed=f"{shared}/{name}.iso",
            )
        )
    )
    domain.create()
    return domain


def remove_guest(domain: libvirt.virDomain) -> None:
    if domain.isActive():
        domain.destroy()
    domain.undefine()


def serial_log(lab: Lab, host: str, number: int) -> str:
    path = lab.spec.host(host).path_on_machine("/var/log/libvirt") / "qemu" / f"g{number}.serial"
    return path.read_text(errors="replace") if path.exists() else ""


def last_tick(lab: Lab, host: str, number: int) -> int:
    said = spoken(serial_log(lab, host, number))
    return said[-1][0] if said else 0


def reaches(lab: Lab, member: str, address: str) -> bool:
    return lab.run(member, ["busybox", "ping", "-c", "1", "-W", "1", address], check=False).returncode == 0


def beat(lab: Lab, host: str) -> str:
    path = lab.spec.host(host).path_on_machine("/var/lib/trimtab") / "beat"
    return path.read_text() if path.exists() else ""


def enable_agent(lab: Lab, host: str) -> None:
    (lab.spec.host(host).path_on_machine("/var/lib/trimtab") / "agent.toml").write_text("# a joined host has one\n")
    lab.run(host, ["systemctl", "enable", "--now", "trimtab-agent"])
    assert eventually(lambda: beat(lab, host) != "")


# -- hosts are machines ----------------------------------------------------------------------------------------------


def test_hosts_have_identities_of_their_own(lab: Lab) -> None:
    def identity(host: str) -> list[str]:
        files = ["/etc/machine-id", "/etc/hostname", "/proc/sys/kernel/random/boot_id"]
        return [*lab.run(host, ["cat", *files]).stdout.split(), lab.run(host, ["hostname"]).stdout.strip()]

    machine = Path("/etc/machine-id").read_text().strip()
    first, second = identity("node1"), identity("node2")
    assert first[1] == first[3] == "node1"
    assert second[1] == second[3] == "node2"
    assert len({first[0], second[0], machine}) == 3
    assert len({first[2], second[2], Path("/proc/sys/kernel/random/boot_id").read_text().strip()}) == 3
    uuids = {libvirt.open(lab.libvirt_uri(host)).getCapabilities().split("<uuid>")[1][:36] for host in ("node1", "node2")}
    assert len(uuids) == 2


def test_hosts_and_control_plane_reach_each_other_by_name_and_address(lab: Lab) -> None:
    assert reaches(lab, "node1", "node2")
    assert reaches(lab, "node2", lab.spec.ctl_address)
    assert reaches(lab, CTL, lab.spec.host("node1").address)


def test_what_a_host_writes_stays_off_the_machine(lab: Lab) -> None:
    script = "mkdir -p /etc/pki/CA /srv/made-here && echo private > /etc/pki/CA/key && echo x > /srv/trimtab-local/kept"
    lab.run("node1", ["sh", "-c", script])
    assert not Path("/etc/pki/CA/key").exists()
    assert not Path("/srv/made-here").exists()
    assert lab.run("node2", ["ls", "/etc/pki/CA/key"], check=False).returncode != 0
    lab.crash("node1")
    lab.boot("node1")
    assert lab.run("node1", ["cat", "/etc/pki/CA/key", "/srv/trimtab-local/kept"]).stdout.split() == ["private", "x"]


def test_shared_storage_is_one_directory_on_every_host(lab: Lab) -> None:
    lab.run("node1", ["sh", "-c", "echo from-node1 > /srv/trimtab-shared/marker"])
    assert lab.run("node2", ["cat", "/srv/trimtab-shared/marker"]).stdout.strip() == "from-node1"
    assert "fuse.glusterfs" in lab.run("node2", ["findmnt", "-no", "FSTYPE", "/srv/trimtab-shared"]).stdout


def test_a_warden_could_arm_itself(lab: Lab) -> None:
    script = (
        "import ctypes, os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50));"
        "print(os.sched_getscheduler(0) == os.SCHED_FIFO, ctypes.CDLL(None).mlockall(3))"
    )
    assert lab.run("node1", ["python3", "-c", script]).stdout.split() == ["True", "0"]


def test_lock_free_disk_is_written_on_one_host_and_read_on_another(lab: Lab) -> None:
    disk = lab.nbd_disk("fault", size_mib=16)
    assert lab.nbd_disk("fault", size_mib=16) == disk
    with_other_writer = f"nbd:{disk.address}:{disk.port}:exportname={disk.name}"
    lab.run("node1", ["qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 64k", with_other_writer])
    read = lab.run("node2", ["qemu-io", "-f", "raw", "-c", "read -P 0x5a 1M 64k", with_other_writer]).stdout
    assert "read 65536/65536" in read
    assert "Pattern verification failed" not in read


# -- daemons ---------------------------------------------------------------------------------------------------------


def test_agent_is_started_by_systemctl_and_again_after_it_dies(lab: Lab) -> None:
    enable_agent(lab, "node1")
    killed = lab.signal_service("node1", "trimtab-agent", signal.SIGKILL)
    assert eventually(lambda: lab.service_process_id("node1", "trimtab-agent") not in (None, killed))
    assert lab.run("node1", ["systemctl", "is-active", "trimtab-agent"]).stdout.strip() == "active"
    lab.run("node1", ["systemctl", "disable", "--now", "trimtab-agent"])
    assert lab.service_process_id("node1", "trimtab-agent") is None
    lab.crash("node1")
    lab.boot("node1")
    assert lab.service_process_id("node1", "trimtab-agent") is None
    assert lab.run("node1", ["systemctl", "is-active", "trimtab-agent"], check=False).returncode == 3


def test_agent_of_a_joined_host_starts_at_boot(lab: Lab) -> None:
    enable_agent(lab, "node2")
    lab.crash("node2")
    before = beat(lab, "node2")
    lab.boot("node2")
    assert eventually(lambda: beat(lab, "node2") != before)


def test_frozen_agent_is_silent_and_goes_on_after_thaw(lab: Lab) -> None:
    enable_agent(lab, "node1")
    process_id = lab.service_process_id("node1", "trimtab-agent")
    lab.freeze("node1")
    assert eventually(lambda: "State:\tT" in Path(f"/proc/{process_id}/status").read_text())
    before = beat(lab, "node1")
    lab.thaw("node1")
    assert eventually(lambda: beat(lab, "node1") != before)
    assert lab.service_process_id("node1", "trimtab-agent") == process_id


def test_restarting_libvirtd_waits_until_it_serves(lab: Lab) -> None:
    before = lab.service_process_id("node1", "libvirtd")
    lab.run("node1", ["systemctl", "restart", "libvirtd"])
    assert lab.service_process_id("node1", "libvirtd") not in (None, before)
    assert libvirt.open(lab.libvirt_uri("node1")).getHostname() == "node1"


def test_systemctl_refuses_a_unit_that_no_host_has(lab: Lab) -> None:
    refused = lab.run("node1", ["systemctl", "start", "nginx"], check=False)
    assert (refused.returncode, refused.stderr.strip()) == (5, "Unit nginx.service not found.")


# -- faults ----------------------------------------------------------------------------------------------------------


def test_cut_takes_a_host_off_its_network_until_healed(lab: Lab) -> None:
    address = lab.spec.host("node2").address
    lab.cut("node2")
    assert not reaches(lab, CTL, address)
    assert lab.status()[1].cut_networks == ("control",)
    lab.heal("node2")
    assert eventually(lambda: reaches(lab, CTL, address))
    lab.cut(CTL)
    assert not reaches(lab, "node1", lab.spec.ctl_address)
    assert reaches(lab, "node1", address)


def test_crash_is_silence_and_boot_is_a_new_boot(lab: Lab) -> None:
    old_boot = lab.run("node1", ["cat", "/proc/sys/kernel/random/boot_id"]).stdout
    listener = subprocess.Popen(lab.command("node1", ["busybox", "nc", "-l", "-p", "4000"]), stdin=subprocess.PIPE)
    try:
        address = lab.spec.host("node1").address

        def connect() -> socket.socket | None:
            try:
                return socket.create_connection((address, 4000), timeout=1)
            except OSError:
                return None

        opened: list[socket.socket | None] = []
        assert eventually(lambda: opened.append(connect()) or opened[-1] is not None)  # type: ignore[func-returns-value]
        connection = opened[-1]
        assert connection is not None
        lab.crash("node1")
        assert lab.status()[0].state == "crashed"
        with connection, pytest.raises(TimeoutError):
            connection.recv(1)
    finally:
        listener.communicate(timeout=10)
    lab.boot("node1")
    assert lab.run("node1", ["cat", "/proc/sys/kernel/random/boot_id"]).stdout != old_boot
    assert reaches(lab, "node2", lab.spec.host("node1").address)


def test_freezing_everything_stops_the_whole_host(lab: Lab) -> None:
    lab.freeze("node2", everything=True)
    assert lab.status()[1].is_frozen
    assert nobody_serves(lab, "node2")
    with pytest.raises(LabError, match="node2 is frozen"):
        lab.run("node2", ["true"])
    lab.thaw("node2")
    assert lab.run("node2", ["echo", "alive"]).stdout.strip() == "alive"


def nobody_serves(lab: Lab, host: str) -> bool:
    """A frozen daemon accepts connections (the kernel does) but never says a word."""
    init = lab.init_process_id(host)
    assert init is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1)
        connection.connect(str(file_of(init, "run/trimtab-lab/control.sock")))
        connection.sendall(b'["is-active", "libvirtd"]\n')
        try:
            return connection.recv(1) == b""
        except TimeoutError:
            return True


def test_frozen_host_can_be_crashed(lab: Lab) -> None:
    lab.freeze("node2", everything=True)
    lab.crash("node2")
    assert [host.state for host in lab.status()] == ["up", "crashed"]
    lab.up(hosts=2)
    assert [host.state for host in lab.status()] == ["up", "up"]


def test_a_host_that_forks_all_the_time_freezes_as_well(lab: Lab) -> None:
    """One write is not enough: the kernel leaves a group FREEZING for ever where a fork was under way in that instant."""
    forking = subprocess.Popen(lab.command("node2", ["sh", "-c", "while :; do /bin/true; done & while :; do /bin/true; done"]))
    try:
        for _ in range(20):
            lab.freeze("node2", everything=True)
            lab.thaw("node2")
    finally:
        lab.crash("node2")
        forking.wait()


def test_up_again_boots_only_what_crashed(lab: Lab) -> None:
    before = [host.init_process_id for host in lab.status()]
    lab.crash("node2")
    lab.up(hosts=2)
    after = [host.init_process_id for host in lab.status()]
    assert after[0] == before[0]
    assert after[1] not in (None, before[1])


# -- guests ----------------------------------------------------------------------------------------------------------


def test_guests_on_two_hosts_tick_answer_and_ping_each_other(lab: Lab) -> None:
    first, second = start_guest(lab, "node1", 1), start_guest(lab, "node2", 2)
    try:
        for host, number in (("node1", 1), ("node2", 2)):
            assert eventually(lambda h=host, n=number: last_tick(lab, h, n) >= 2, within_s=GUEST_TIMEOUT_S)  # type: ignore[misc]
        assert "SEED instance-id=i-g1 hostname=g1 ssh-keys=0" in serial_log(lab, "node1", 1)
        assert eventually(lambda: ping_from_guest(first, guest_address(lab, 2)), within_s=60)
        asked = ["sh", "-c", f"echo | busybox nc -w 5 {guest_address(lab, 2)} 7"]
        assert eventually(lambda: lab.run(CTL, asked, check=False).stdout.startswith("g2 tick "))
        lab.cut("node2", network="guest")
        assert not reaches(lab, CTL, guest_address(lab, 2))
        assert reaches(lab, CTL, lab.spec.host("node2").address)
    finally:
        remove_guest(first)
        remove_guest(second)


def ping_from_guest(domain: libvirt.virDomain, address: str) -> bool:
    """Asks the guest's agent to ping, and waits for the outcome."""

    def ask(command: str, **arguments: object) -> dict[str, object]:
        request = json.dumps({"execute": command, "arguments": arguments})
        answered = json.loads(libvirt_qemu.qemuAgentCommand(domain, request, 10, 0))
        outcome: dict[str, object] = answered["return"]
        return outcome

    try:
        started = ask("guest-exec", path="/bin/ping", arg=["-c", "1", "-W", "3", address])
    except libvirt.libvirtError:
        return False  # the agent is not connected yet
    outcome: list[dict[str, object]] = []
    assert eventually(lambda: outcome.append(ask("guest-exec-status", pid=started["pid"])) or bool(outcome[-1]["exited"]))  # type: ignore[func-returns-value]
    return outcome[-1]["exitcode"] == 0


def test_definition_and_counter_survive_a_power_cut(lab: Lab) -> None:
    domain = start_guest(lab, "node1", 3)
    assert eventually(lambda: last_tick(lab, "node1", 3) >= 3, within_s=GUEST_TIMEOUT_S)
    lab.crash("node1")
    reported = last_tick(lab, "node1", 3)
    lab.boot("node1")
    domain = libvirt.open(lab.libvirt_uri("node1")).lookupByName("g3")
    try:
        assert not domain.isActive()
        domain.create()
        assert eventually(lambda: last_tick(lab, "node1", 3) > reported, within_s=GUEST_TIMEOUT_S)
        first_after = serial_log(lab, "node1", 3).split("GUEST UP")[2].split("tick ")[1].split()[0]
        assert int(first_after) in (reported + 1, reported + 2)
    finally:
        remove_guest(domain)


def test_guest_moves_live_over_shared_storage_and_powers_off_by_button(lab: Lab) -> None:
    domain = start_guest(lab, "node1", 4)
    moved = domain
    try:
        assert eventually(lambda: last_tick(lab, "node1", 4) >= 1, within_s=GUEST_TIMEOUT_S)
        target = libvirt.open(lab.libvirt_uri("node2"))
        flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PERSIST_DEST | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
        where = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{lab.spec.host('node2').address}"}
        moved = domain.migrate3(target, where, flags)
        arrived = last_tick(lab, "node2", 4)
        assert eventually(lambda: last_tick(lab, "node2", 4) > arrived)
        moved.shutdown()
        assert eventually(lambda: not moved.isActive(), within_s=60)
        assert "GUEST DOWN poweroff" in serial_log(lab, "node2", 4)
    finally:
        remove_guest(moved)


# -- labs come and go ------------------------------------------------------------------------------------------------


def test_second_lab_runs_beside_the_first_and_goes_alone(lab: Lab, tmp_path: Path) -> None:
    second = Lab.named("beside", state_directory=tmp_path / "state")
    try:
        second.up(hosts=1)
        assert second.spec.subnet != lab.spec.subnet
        assert not reaches(lab, "node1", second.spec.host("node1").address)
        assert reaches(second, CTL, second.spec.host("node1").address)
        with pytest.raises(LabError, match="holds lab beside, not other"):
            Lab.named("other", state_directory=second.spec.state_directory)
        first_processes = [host.init_process_id for host in lab.status()]
    finally:
        second.down()
    assert [host.init_process_id for host in lab.status()] == first_processes
    assert reaches(lab, CTL, lab.spec.host("node1").address)


def test_command_line_shows_status_and_names_an_unknown_host(lab: Lab) -> None:
    where = ["--name", lab.spec.name, "--state-dir", str(lab.spec.state_directory)]
    shown = CliRunner().invoke(main, ["status", *where])
    assert shown.exit_code == 0
    assert f"{lab.spec.host('node2').address} " in shown.output
    unknown = CliRunner().invoke(main, ["crash", *where, "node9"])
    assert unknown.exit_code == 1
    assert "has no host 'node9'; it has node1 to node2" in unknown.output


def test_command_line_does_every_fault_and_takes_it_back(lab: Lab) -> None:
    where = ["--name", lab.spec.name, "--state-dir", str(lab.spec.state_directory)]

    def say(*arguments: str) -> str:
        ran = CliRunner().invoke(main, [arguments[0], *where, *arguments[1:]])
        assert ran.exit_code == 0, ran.output
        return ran.output

    def condition() -> str:
        line = next(line for line in say("status").splitlines() if line.startswith("node2"))
        return " ".join(line.split()[2:]).partition(" virtlogd")[0]

    assert condition() == "up"
    say("cut", "node2", "--network", "all")
    assert condition() == "up cut(control,guest)"
    say("heal", "node2")
    say("freeze", "node2", "--all")
    assert condition() == "up frozen"
    say("thaw", "node2")
    say("crash", "node2")
    assert condition() == "crashed"
    assert "node2" in say("up", "--no-controller", "--hosts", "2")
    assert condition() == "up"
    assert say("up", "--no-controller", "--hosts", "2") == say("status"), "up again changes nothing"
