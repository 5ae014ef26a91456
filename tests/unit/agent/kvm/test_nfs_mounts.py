"""What is asked of `mount`, and what is made of its answers. No kernel of the lab has an NFS client: these are the command lines."""

from dataclasses import replace

import pytest

from trimtab_agent.hypervisor.kvm import nfs_mounts
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
