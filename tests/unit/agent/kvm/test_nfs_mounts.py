"""What is asked of `mount`, when, and what is made of its answers. No kernel of the lab has an NFS client: these are the command lines."""

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from trimtab_agent.hypervisor.kvm import nfs_mounts
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.nfs_mounts import NfsMounts
from trimtab_agent.hypervisor.kvm.pools import Pools
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_protos.errors import Conflict, InvalidRequest, TrimtabError, Unavailable
from trimtab_protos.messages import PoolKind, PoolSpec
from trimtab_protos.pool_messages import NfsSource

POOL = PoolSpec(
    pool_id="pool-share",
    path="/srv/trimtab-mounts/pool-share",
    kind=PoolKind.NFS,
    is_shared=True,
    nfs=NfsSource(server="nas.example", export="/vms"),
)


def pool(**changes: object) -> PoolSpec:
    assert POOL.nfs is not None
    return replace(POOL, nfs=replace(POOL.nfs, **changes))  # type: ignore[arg-type]


def test_the_command_line_says_every_option_that_matters() -> None:
    assert nfs_mounts.mount_command(POOL) == [
        "mount",
        "-t",
        "nfs",
        "-o",
        "rw,nodev,nosuid,noexec,noatime,vers=4.2,proto=tcp,hard,timeo=600,retrans=2",
        "--",
        "nas.example:/vms",
        "/srv/trimtab-mounts/pool-share",
    ]
    soft = nfs_mounts.mount_command(pool(is_soft=True, timeout_s=5, retries=3, version="3", server="2001:db8::5"))
    assert soft[4] == "rw,nodev,nosuid,noexec,noatime,vers=3,proto=tcp,soft,timeo=50,retrans=3"
    assert soft[6] == "[2001:db8::5]:/vms"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"server": "nas,soft"}, "nfs.server"),
        ({"server": "-o"}, "nfs.server"),
        ({"server": ""}, "nfs.server"),
        ({"export": "vms"}, "nfs.export"),
        ({"export": "/vms/../etc"}, "nfs.export"),
        ({"export": "/a b"}, "nfs.export"),
        ({"version": "4.2,exec"}, "nfs.version"),
        ({"timeout_s": 0}, "nfs.timeout_s"),
        ({"retries": 101}, "nfs.retries"),
    ],
)
def test_what_could_become_another_option_or_path_is_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        nfs_mounts.mount_command(pool(**changes))
    assert refused.value.context["field"] == field


def test_it_mounts_nowhere_else() -> None:
    with pytest.raises(InvalidRequest, match="mounted at"):
        nfs_mounts.mount_command(replace(POOL, path="/etc"))


def test_the_kernels_table_tells_what_is_mounted() -> None:
    table = (
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:50 / /srv/trimtab-mounts/pool-share rw,nosuid - nfs4 nas.example:/vms rw,vers=4.2\n"
        "41 22 0:51 / /srv/with\\040space rw - nfs4 nas:/other rw\n"
    )
    assert nfs_mounts.mounted_at(POOL.path, table) == nfs_mounts.Mounted("nas.example:/vms", "nfs4")
    assert nfs_mounts.mounted_at("/srv/with space", table) == nfs_mounts.Mounted("nas:/other", "nfs4")
    assert nfs_mounts.mounted_at("/srv/none", table) is None


@pytest.mark.parametrize(
    ("complaint", "kind", "code"),
    [
        ("mount.nfs: access denied by server while mounting nas.example:/vms", Conflict, "nfs-refused"),
        ("mount: /x: unknown filesystem type 'nfs'.", Conflict, "nfs-not-here"),
        ("mount.nfs: No such device", Conflict, "nfs-not-here"),
        (
            "mount.nfs: mounting nas:/vms failed, reason given by server: No such file or directory",
            Conflict,
            "nfs-export-missing",
        ),
        ("mount.nfs: Connection refused", Unavailable, "nfs-unreachable"),
        ("timed out", Unavailable, "nfs-unreachable"),
    ],
)
def test_what_mount_says_becomes_an_error_with_a_way_on(complaint: str, kind: type[TrimtabError], code: str) -> None:
    error = nfs_mounts.failure(POOL, complaint)
    assert (type(error), error.code) == (kind, code)


def test_a_server_that_is_gone_is_unmounted_all_the_same() -> None:
    assert nfs_mounts.unmount_command("/srv/x", is_lazy=False) == ["umount", "--", "/srv/x"]
    assert nfs_mounts.unmount_command("/srv/x", is_lazy=True) == ["umount", "--lazy", "--force", "--", "/srv/x"]


# --- when it is asked ----------------------------------------------------------------------------------------------------------


@dataclass
class Kernel:
    """A mount table, and programs that change it as `mount` and `umount` do."""

    root: Path
    table: Path
    does_server_answer: bool = True
    asked: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.boot()

    def boot(self) -> None:
        self.table.write_text("22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n")

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        self.asked.append(list(command))
        path = command[-1]
        if not self.does_server_answer and "--lazy" not in command:
            return 32, "mount.nfs: Connection timed out"
        lines = [line for line in self.table.read_text().splitlines() if f" {path} " not in line or command[0] == "mount"]
        if command[0] == "mount":
            lines.append(f"40 22 0:50 / {path} rw,nosuid - nfs4 {command[-2]} rw")
        self.table.write_text("".join(f"{line}\n" for line in lines))
        return 0, ""

    def verbs(self) -> list[str]:
        return [" ".join(one[:3] if "--lazy" in one else one[:1]) for one in self.asked]

    def mounts(self) -> NfsMounts:
        return NfsMounts(self.root, table=self.table, run=self.run)

    def pool(self) -> PoolSpec:
        return replace(POOL, path=str(self.root / POOL.pool_id))


@pytest.fixture
def kernel(pool: PoolSpec) -> Kernel:
    base = Path(pool.path).parent
    return Kernel(base / "mounts", base / "mountinfo")


@pytest.fixture
def pools(kernel: Kernel) -> Iterator[Pools]:
    connection = Connection("test:///default", on_open=lambda _connection: None)
    connection.start()
    assert connection.wait_until_up(10)
    made = Pools(connection, VolumeKeys(), kernel.mounts())
    yield made
    made.remove(POOL.pool_id)  # the driver's state is the process's
    connection.stop()


def test_an_export_is_mounted_once_on_a_directory_that_is_closed_without_it(kernel: Kernel) -> None:
    mounts, share = kernel.mounts(), kernel.pool()
    assert not mounts.is_mounted(share)
    mounts.ensure(share)
    mounts.ensure(share)
    assert kernel.asked == [nfs_mounts.mount_command(share, kernel.root)]
    assert mounts.is_mounted(share)
    assert stat.S_IMODE(Path(share.path).stat().st_mode) == 0


def test_what_else_is_mounted_there_is_neither_taken_for_it_nor_covered(kernel: Kernel) -> None:
    kernel.table.write_text(f"40 22 0:50 / {kernel.pool().path} rw - nfs4 nas.example:/other rw\n")
    with pytest.raises(Conflict) as refused:
        kernel.mounts().ensure(kernel.pool())
    assert (refused.value.code, kernel.asked) == ("mount-differs", [])


def test_a_server_that_does_not_answer_is_told_and_asked_again_by_the_next(kernel: Kernel) -> None:
    kernel.does_server_answer = False
    with pytest.raises(Unavailable) as told:
        kernel.mounts().ensure(kernel.pool())
    assert (told.value.code, "nas.example:/vms" in told.value.message) == ("nfs-unreachable", True)
    kernel.does_server_answer = True
    kernel.mounts().ensure(kernel.pool())
    assert kernel.mounts().is_mounted(kernel.pool())


def test_it_is_unmounted_by_force_only_where_its_server_is_gone(kernel: Kernel) -> None:
    mounts = kernel.mounts()
    mounts.remove(POOL.pool_id)
    assert kernel.asked == [], "nothing is mounted"
    for does_answer, verbs in ((True, ["mount", "umount"]), (False, ["mount", "umount", "umount --lazy --force"])):
        kernel.asked, kernel.does_server_answer = [], True
        mounts.ensure(kernel.pool())
        kernel.does_server_answer = does_answer
        mounts.remove(POOL.pool_id)
        assert kernel.verbs() == verbs
        assert not mounts.is_mounted(kernel.pool())
        assert not Path(kernel.pool().path).exists()


def test_a_pool_is_mounted_again_after_a_boot_and_not_a_second_time(kernel: Kernel, pools: Pools) -> None:
    share = kernel.pool()
    pools.ensure(share)
    assert pools.observe(share).is_responsive
    kernel.boot()
    with pytest.raises(Unavailable) as refused:
        pools.require_responsive(share)
    assert refused.value.code == "pool-not-mounted", "the directory below is no empty pool"
    assert [pools.observe(share).is_responsive for _ in range(3)] == [True, True, True]
    assert kernel.verbs() == ["mount", "mount"]
    pools.require_responsive(share)


def test_a_pool_whose_server_is_gone_after_a_boot_says_so_and_can_be_removed(kernel: Kernel, pools: Pools) -> None:
    share = kernel.pool()
    pools.ensure(share)
    kernel.boot()
    kernel.does_server_answer = False
    seen = pools.observe(share)
    assert (seen.is_responsive, "nas.example:/vms" in seen.problem) == (False, True)
    kernel.does_server_answer = True
    assert pools.observe(share).is_responsive
    kernel.does_server_answer = False
    pools.remove(share.pool_id)
    assert kernel.verbs() == ["mount", "mount", "mount", "umount", "umount --lazy --force"]
    assert share.pool_id not in [known.pool_id for known in pools.known()]
