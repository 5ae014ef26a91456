"""The agent of a host, or the whole control plane, dies in the middle of verbs on running guests: each has its effect once, and no guest
notices.

Three guests of one host live through all of it: `elder`, a domain that somebody made with virsh, and `worn` and `peer`, vms of ours; each
death strikes verbs on two or all of them. What libvirt does for a verb is short, so the QEMU of the guest is held still while the verb
begins: the agent dies with its call under way, or the control plane with nobody to hear the answer, and what libvirt and QEMU then do is
seen by nobody. Networks and what is accepted of a change by hand ask libvirt alone, which is held still then, as is a change of medium.
Adopting, releasing, firewalls, images and what moves without a guest: there the death comes soon after acceptance; a move is caught while
QEMU copies. A domain that was adopted keeps its own definition until its next stop, so `elder` takes no other verb.

A backup is struck twice: while its guest's disk is read, slowly, and while QEMU is asked to begin.

Elsewhere: migrations (test_fleet.py, test_fleet_migration.py), and of backups the boot test and the filling of restored disks
(test_fleet_backup.py).
"""

import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, answers_ping, wait_until
from tests.lab.guest_view import disk_mib, domain_says, has_card, memory_mib, online_cpus
from tests.lab.os_images import data_cd
from tests.lab.ticks import breaks, spoken
from trimtab_lab.guest import build_guest_image

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(1800)]

HOST = "node1"
DISK = "/srv/trimtab-shared/elder.qcow2"
SERIAL = "/var/log/libvirt/qemu/elder-serial.log"
INDEX = {"worn": 91, "peer": 92}
EMPTIED = "/srv/emptied"
DEFINITION = f"""
<domain type='qemu'><name>elder</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os><features><acpi/>
<tcg><tb-cache unit='MiB'>16</tb-cache></tcg></features>
<cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='{DISK}'/><target dev='vda' bus='virtio'/></disk>
<interface type='bridge'><mac address='52:54:00:0f:0b:01'/><source bridge='br-guest'/><model type='virtio'/></interface>
<serial type='file'><source path='{SERIAL}' append='on'/></serial>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<memballoon model='virtio'/>
</devices></domain>
"""


@dataclass(slots=True)
class Guest:
    """One guest by the name of its domain, which no verb here changes: its own view, and what it said."""

    fleet: Fleet
    name: str
    domain: str
    log: str
    first: int = 0
    """The number from which it must have left none out."""

    @property
    def id(self) -> str:
        return self.domain.removeprefix("trimtab-")

    def signal(self, number: signal.Signals) -> None:
        self.fleet.sh(HOST, f"kill -{int(number)} $(cat /run/libvirt/qemu/{self.domain}.pid)")

    def is_asked(self) -> bool:
        """Tell whether libvirt waits for its QEMU."""
        seen = self.fleet.sh(HOST, f"virsh domcontrol {self.domain}", check=False)
        return "occupied" in seen or "background job" in seen

    def says(self, script: str) -> str:
        return domain_says(self.fleet.lab, HOST, self.domain, script)

    def heard(self) -> list[tuple[int, float]]:
        return spoken(self.fleet.sh(HOST, f"cat {self.log} 2>/dev/null", check=False))

    def counts_on(self) -> None:
        """From its first number to one later than its newest, it was never started anew and left none out."""
        since = self.heard()[-1][0]
        last = wait_until(lambda: said[-1][0] if (said := self.heard())[-1][0] >= since + 2 else 0, f"{self.name} to count on")
        log = self.fleet.sh(HOST, f"cat {self.log}")
        assert breaks(log, first=self.first, last=last) == []

    def devices(self) -> tuple[int, int]:
        """Return how many disks and cards its process has, asked of libvirt."""
        disks = self.fleet.sh(HOST, f"virsh domblklist {self.domain} --details").split().count("disk")
        return disks, self.fleet.sh(HOST, f"virsh domiflist {self.domain}").count("52:54:00")

    def has_job(self) -> bool:
        """Tell whether a backup of it is under way, as libvirt says."""
        return "Backup" in self.fleet.sh(HOST, f"virsh domjobinfo {self.domain}", check=False)

    def iops_limit(self) -> int:
        shown = self.fleet.sh(HOST, f"virsh blkdeviotune {self.domain} vda")
        return int(next(line.split(":")[1] for line in shown.splitlines() if line.startswith("total_iops_sec ")))

    def is_as_wished(self) -> None:
        assert self.fleet.ok("vm", "diff", self.name, "-o", "json").json()["differences"] == []


@dataclass(slots=True)
class Story:
    fleet: Fleet
    elder: Guest
    worn: Guest
    peer: Guest
    scratch: Path
    """A folder for files of the test's own, those with keys of repositories among them."""

    def guests(self) -> tuple[Guest, ...]:
        return self.elder, self.worn, self.peer

    def is_as_wished(self) -> None:
        for guest in self.guests():
            guest.is_as_wished()

    def interrupted(self, who: str, *verbs: tuple[str, ...], begun: tuple[str, ...] = (), held: tuple[Guest, ...] = ()) -> None:
        """Begin these verbs, let `who` die in the middle of all, and wait until each is done. `begun`: operations under way; `held`:
        guests whose QEMU answers libvirt only afterwards."""
        for guest in held:
            guest.signal(signal.SIGSTOP)
        try:
            operations = [self.fleet.begin(*verb) for verb in verbs]
            wait_until(lambda: all(guest.is_asked() for guest in held) or self.has_failed(operations), "libvirt to ask QEMU")
            self.kill(who)
        finally:
            for guest in held:
                guest.signal(signal.SIGCONT)
        self.ends_well(who, *begun, *operations)

    def interrupted_without_libvirt(
        self, who: str, *verbs: tuple[str, ...], begun: tuple[str, ...] = (), more: tuple[tuple[str, ...], ...] = ()
    ) -> None:
        """As `interrupted`, where the host's libvirt answers only afterwards: none of the verbs is done before, but some of `more` may."""
        self.fleet.lab.signal_service(HOST, "libvirtd", signal.SIGSTOP)
        try:
            operations = [self.fleet.begin(*verb) for verb in verbs]
            wait_until(lambda: self.states_of(operations) <= {"running", "waiting"}, "all to be under way")
            others = [self.fleet.begin(*verb) for verb in more]
            assert self.states_of(operations) <= {"running", "waiting"}
            self.kill(who)
        finally:
            self.fleet.lab.signal_service(HOST, "libvirtd", signal.SIGCONT)
        self.ends_well(who, *begun, *operations, *others)

    def states_of(self, operations: list[str]) -> set[str]:
        return {self.fleet.operation(one)["state"] for one in operations}

    def kill(self, who: str) -> None:
        if who == "agent":
            self.fleet.lab.signal_service(HOST, "trimtab-agent", signal.SIGKILL)
        else:
            self.fleet.plane.crash()

    def ends_well(self, who: str, *operations: str) -> None:
        if who == "controller":
            self.fleet.plane.start()
        for operation in operations:
            ended = self.fleet.end_of(operation)
            assert ended["state"] == "done", f"{ended['kind']} {ended['state']}: {ended['error']}"
        self.fleet.wait_for_host(HOST)

    def has_failed(self, operations: list[str]) -> bool:
        return any(self.fleet.operation(one)["state"] == "failed" for one in operations)


@pytest.fixture(scope="module")
def story(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    scratch = tmp_path_factory.mktemp("restarts")
    raw = Path(shutil.copy(build_guest_image().raw, scratch))
    (definition := scratch / "elder.xml").write_text(DEFINITION)
    fleet.sh(HOST, f"qemu-img convert -f raw -O qcow2 {raw} {DISK}; virsh define {definition}; virsh start elder")
    fleet.sh(HOST, f"mkdir -p {EMPTIED}; mount -t tmpfs -o size=100m,mode=755 emptied {EMPTIED}")
    fleet.ok("secgroup", "create", "worn", "--allow", "icmp")
    fleet.ok("image", "import", "disc", str(data_cd(scratch, "DISC")), "--kind", "iso", "--pool", "shared", "--wait")
    grows = ("--memory-max", "224MiB", "--vcpus", "1", "--vcpus-max", "3", "--secgroup", "worn")
    for name, more in (("worn", grows), ("peer", ())):
        fleet.ok(
            "vm", "create", name, "--image", "micro", "--memory", "96MiB", "--pool", "shared",
            "--network", f"default,ip={address_of(fleet, name)}/24", *more, "--to", HOST, "--no-start", "--wait",
        )  # fmt: skip
        if name == "worn":
            fleet.ok("vm", "cdrom", name, "--iso", "disc", "--wait")
        fleet.ok("vm", "start", name, "--to", HOST, "--wait")
    fleet.ok("vm", "cdrom", "worn", "--eject", "--wait")  # a disk does not move from beside a medium; the drive stays
    guests = {}
    for name in ("elder", "worn", "peer"):
        domain = name if name == "elder" else f"trimtab-{fleet.vm(name)['id']}"
        log = re.search(r"<log file='([^']+)'", fleet.sh(HOST, f"virsh dumpxml {domain}"))
        guests[name] = Guest(fleet, name, domain, log[1] if log else SERIAL)
    for guest in guests.values():
        wait_until(lambda one=guest: one.heard(), f"{guest.name} to count")
        wait_until(lambda one=guest: one.says("echo up") == "up", f"the agent inside {guest.name}")
        guest.first = guest.heard()[-1][0]
    yield Story(fleet, **guests, scratch=scratch)
    fleet.sh(HOST, "virsh destroy elder; virsh undefine elder", check=False)
    fleet.delete("worn", "peer")
    fleet.sh(HOST, f"umount --lazy {EMPTIED}", check=False)
    fleet.trimtab("secgroup", "delete", "worn", "--yes", "--wait")


def address_of(fleet: Fleet, name: str) -> str:
    return f"{fleet.lab.spec.guest_prefix}.{INDEX[name]}"


@pytest.mark.parametrize(("who", "vcpus"), [("agent", 2), ("controller", 3)])
def test_each_verb_takes_effect_once_whoever_dies_in_the_middle_of_it(fleet: Fleet, story: Story, who: str, vcpus: int) -> None:
    iops = 300 * vcpus
    is_backed_up(story, who)
    adopts_resizes_and_limits(story, who, vcpus=vcpus, iops=iops)
    attaches_closes_and_reconciles(story, who, iops=iops)
    moves_and_grows(story, who, to={"agent": "local", "controller": "shared"}[who], mib=40 + 20 * vcpus)
    accepts_empties_and_makes(story, who, iops=iops + 7)
    changes_its_medium_and_its_floor(story, who, floor_mib=96 - 8 * vcpus)
    detaches_and_releases(story, who)
    for guest in story.guests():
        guest.counts_on()
    for guest in (story.worn, story.peer):
        assert fleet.hosts_that_define(guest.id) == [HOST]


def is_backed_up(story: Story, who: str) -> None:
    fleet, worn, peer, repo = story.fleet, story.worn, story.peer, f"repo-{who}"
    fleet.ok(
        "backup", "repo", "create", repo, "--url", f"file:///srv/trimtab-shared/{repo}", "--key-file", str(story.scratch / repo)
    )
    reading = fleet.begin("backup", "run", "worn", "--repo", repo, "--bandwidth", "2")
    wait_until(lambda: worn.has_job() or story.has_failed([reading]), "the disk to be read")
    story.interrupted(who, begun=(reading,))
    story.interrupted(who, ("backup", "run", "peer", "--repo", repo), held=(peer,))
    for guest in (worn, peer):
        [full] = fleet.ok("backup", "list", "--vm", guest.name, "-o", "json").json()
        assert (full["state"], full["full_reason"]) == ("ready", "vda: first backup"), full
        assert not guest.has_job()
        fleet.ok("vm", "pause", guest.name, "--wait")  # so that its disk is still what was backed up
        increment = fleet.ok("backup", "run", guest.name, "--repo", repo, "-o", "json").json()
        assert (increment["base_id"], increment["full_reason"]) == (full["id"], ""), increment
        assert increment["read_bytes"] < full["read_bytes"] // 2, (increment, full)
        fleet.ok("backup", "restore-volume", increment["id"], "vda", "--as", "same", "--pool", "shared")
        same = fleet.ok("volume", "get", "same", "-o", "json").json()["id"]
        own = fleet.sh(HOST, f"virsh domblklist {guest.domain} | awk '$1 == \"vda\" {{print $2}}'").strip()
        compared = f"qemu-img compare -U -f qcow2 -F qcow2 {own} /srv/trimtab-shared/volumes/{same}.qcow2"
        assert "identical" in fleet.sh(HOST, compared)
        fleet.ok("vm", "resume", guest.name, "--wait")
        fleet.ok("volume", "delete", "same", "--yes", "--wait")
        listed = fleet.sh(HOST, f"virsh checkpoint-list --name {guest.domain}").split()
        assert listed == [f"tt-{increment['id']}"], "no checkpoint of a backup that broke off"
    looked = "find /srv/trimtab-shared /srv/trimtab-local /var/lib/libvirt/qemu -name '*scratch*' -o -name '*backup.sock' -o -name '*.held'"
    # The file systems of a paused guest cannot be frozen, and it is asked to thaw until its agent answers again.
    wait_until(lambda: fleet.sh(HOST, looked) == "", "nothing to be left behind", patience_s=60)
    fleet.ok("backup", "repo", "delete", repo, "--yes")


def adopts_resizes_and_limits(story: Story, who: str, *, vcpus: int, iops: int) -> None:
    fleet, elder, worn, peer = story.fleet, story.elder, story.worn, story.peer
    process, mib = fleet.sh(HOST, "cat /run/libvirt/qemu/elder.pid"), memory_mib(fleet.lab, HOST, worn.id)
    more = ("vm", "resize", "worn", "--vcpus", str(vcpus), "--memory", f"{96 + 32 * (vcpus - 1)}MiB")
    limit = ("volume", "limit", "peer-root", "--iops", str(iops))
    adopting = fleet.begin("vm", "adopt", f"{HOST}/{elder.domain}")
    story.interrupted(who, more, limit, begun=(adopting,), held=(worn, peer))
    assert online_cpus(fleet.lab, HOST, worn.id) == vcpus
    assert memory_mib(fleet.lab, HOST, worn.id) == mib + 32
    assert peer.iops_limit() == iops
    assert fleet.sh(HOST, "cat /run/libvirt/qemu/elder.pid") == process
    assert fleet.vm("elder")["observed"]["state"] == "running"
    assert fleet.domains_of(HOST).split().count("elder") == 1
    story.is_as_wished()


def attaches_closes_and_reconciles(story: Story, who: str, *, iops: int) -> None:
    fleet, worn, peer = story.fleet, story.worn, story.peer
    fleet.ok("volume", "create", f"spare-{who}", "--size", "16MiB", "--pool", "shared", "--wait")
    fleet.sh(HOST, f"virsh blkdeviotune {peer.domain} vda --total-iops-sec 50 --live --config")
    changed = fleet.ok("vm", "diff", "peer", "-o", "json").json()["differences"]
    assert [one["field"].partition(".")[2] for one in changed] == ["iops_limit"], changed
    disks, cards = worn.devices()
    story.interrupted(
        who,
        ("vm", "attach", "worn", "--volume", f"spare-{who}", "--network", "default"),
        ("secgroup", "update", "worn", "--closed"),
        ("vm", "reconcile", "peer", "--revert"),
        held=(worn, peer),
    )
    serial, card = fleet.vm("worn")["volumes"][1]["id"][-20:], fleet.vm("worn")["nics"][1]
    wait_until(lambda: disk_mib(fleet.lab, HOST, worn.id, serial) == 16, "the guest to see its disk")
    wait_until(lambda: has_card(fleet.lab, HOST, worn.id, card["mac"]), "the guest to see its card")
    assert worn.devices() == (disks + 1, cards + 1)
    assert peer.iops_limit() == iops
    assert not answers_ping(fleet, address_of(fleet, "worn")), "the group lets nothing in"
    fleet.ok("secgroup", "update", "worn", "--allow", "icmp", "--wait")
    assert answers_ping(fleet, address_of(fleet, "worn"))
    story.is_as_wished()


def moves_and_grows(story: Story, who: str, *, to: str, mib: int) -> None:
    fleet, worn, peer = story.fleet, story.worn, story.peer
    root, grown = fleet.vm("worn")["volumes"][0], fleet.vm("peer")["volumes"][0]
    moving = fleet.begin("volume", "move", root["name"], "--to", to, "--bandwidth", "4")
    wait_until(lambda: "<mirror" in fleet.sh(HOST, f"virsh dumpxml {worn.domain}"), "QEMU to copy")
    story.interrupted(who, ("volume", "resize", grown["name"], f"{mib}MiB"), begun=(moving,), held=(peer,))
    places = {path.rpartition(":")[2].rpartition("/")[0] for path in fleet.files_of(root["id"])}
    assert places == {f"/srv/trimtab-{to}/volumes"}
    assert fleet.vm("worn")["volumes"][0]["pool"] == to
    wait_until(lambda: disk_mib(fleet.lab, HOST, peer.id, grown["id"][-20:]) == mib, "the guest to see its disk grown")
    story.is_as_wished()


def detaches_and_releases(story: Story, who: str) -> None:
    fleet, worn, elder = story.fleet, story.worn, story.elder
    spare, card = fleet.vm("worn")["volumes"][1], fleet.vm("worn")["nics"][1]
    disks, cards = worn.devices()
    process = fleet.sh(HOST, "cat /run/libvirt/qemu/elder.pid")
    story.interrupted(who, ("vm", "detach", "worn", "--volume", spare["name"]), ("vm", "release", "elder"), held=(worn,))
    assert disk_mib(fleet.lab, HOST, worn.id, spare["id"][-20:]) == 0
    fleet.ok("vm", "detach", "worn", "--nic", card["id"], "--wait")
    assert worn.devices() == (disks - 1, cards - 1)
    fleet.ok("volume", "delete", spare["name"], "--yes", "--wait")
    worn.is_as_wished()

    left = fleet.sh(HOST, f"virsh dumpxml {elder.domain}")
    assert "<trimtab:" not in left, "nothing of ours stays in it"
    assert fleet.trimtab("vm", "get", "elder").code == 4
    assert fleet.sh(HOST, "cat /run/libvirt/qemu/elder.pid") == process


def accepts_empties_and_makes(story: Story, who: str, *, iops: int) -> None:
    """What somebody did by hand becomes the vm's own, a network and an image come, a pool is left."""
    fleet, peer, name = story.fleet, story.peer, f"emptied-{who}"
    fleet.ok("pool", "create", name, "--path", EMPTIED, "--wait")
    fleet.ok("volume", "create", name, "--size", "16MiB", "--pool", name, "--wait")
    plan = fleet.ok("pool", "drain", name, "--plan", "-o", "json").json()
    fleet.sh(HOST, f"virsh blkdeviotune {peer.domain} vda --total-iops-sec {iops} --live --config")
    disc = data_cd(story.scratch, f"OTHER{who.upper()}")
    accepting = fleet.begin("vm", "reconcile", "peer", "--accept")  # libvirt must answer until it is accepted
    story.interrupted_without_libvirt(
        who,
        ("network", "create", f"inner-{who}", "--isolated", "--subnet", "10.199.9.0/24", "--dhcp"),
        begun=(accepting,),
        more=(("image", "import", f"other-{who}", str(disc), "--kind", "iso", "--pool", "shared"), ("plan", "apply", plan["id"])),
    )
    assert (peer.iops_limit(), fleet.ok("volume", "get", "peer-root", "-o", "json").json()["iops_limit"]) == (iops, iops)
    network = fleet.ok("network", "get", f"inner-{who}", "-o", "json").json()
    # A host that did not answer is left out after a few tries and told when it is back.
    wait_until(lambda: networks_of(fleet).count(f"trimtab-{network['id']}") == len(HOSTS), "the network to be on each host, once")
    image = fleet.ok("image", "get", f"other-{who}", "-o", "json").json()
    files = [path for path in fleet.files_of(image["id"]) if path.endswith(".iso")]
    assert (image["state"], image["kind"], len(files)) == ("ready", "iso", len(HOSTS)), f"one, seen by each: {files}"
    volume = fleet.ok("volume", "get", name, "-o", "json").json()
    assert volume["pool"] != name
    assert fleet.sh(HOST, f"find {EMPTIED} -type f").strip() == ""
    assert fleet.files_of(volume["id"])
    fleet.ok("volume", "delete", name, "--yes", "--wait")
    fleet.ok("volume", "purge", name, "--yes", "--wait")
    fleet.ok("pool", "delete", name, "--yes", "--wait")
    story.is_as_wished()


def networks_of(fleet: Fleet) -> list[str]:
    return [name for host in HOSTS for name in fleet.sh(host, "virsh net-list --all --name").split()]


def changes_its_medium_and_its_floor(story: Story, who: str, *, floor_mib: int) -> None:
    fleet, worn, peer = story.fleet, story.worn, story.peer
    network = fleet.ok("network", "get", f"inner-{who}", "-o", "json").json()["id"]
    image = fleet.ok("image", "get", f"other-{who}", "-o", "json").json()["id"]
    story.interrupted_without_libvirt(
        who,
        ("vm", "cdrom", "worn", "--iso", f"other-{who}"),
        ("vm", "update", "peer", "--balloon-min", f"{floor_mib}MiB"),
        ("network", "delete", f"inner-{who}", "--yes"),
    )
    for stored in ("", "--inactive"):
        shown = fleet.sh(HOST, f"virsh dumpxml {stored} {worn.domain}")
        assert (shown.count("device='cdrom'"), shown.count(image)) == (1, 1)
        assert re.search(rf"min_mib=['\"]{floor_mib}['\"]", fleet.sh(HOST, f"virsh dumpxml {stored} {peer.domain}"))
    assert fleet.vm("worn")["cdrom"] == f"other-{who}"
    assert fleet.trimtab("network", "get", f"inner-{who}").code == 4
    wait_until(lambda: f"trimtab-{network}" not in networks_of(fleet), "it to be on none")
    story.is_as_wished()
    fleet.ok("vm", "cdrom", "worn", "--eject", "--wait")
