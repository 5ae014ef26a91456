"""Pools without files: what is refused, what is run, what QEMU is told. No LVM, no Ceph and no target is needed here."""

import json
from collections.abc import Sequence
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tests.unit.agent.kvm import factories
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import adoption_files, block_pools, domain_xml, filling, migration_xml, state_files, volume_keys
from trimtab_agent.hypervisor.kvm.block_pools import SECRET_FILE
from trimtab_agent.hypervisor.kvm.domain_xml import HostTraits
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity, NotFound, TrimtabError, Unavailable
from trimtab_protos.messages import DiskFormat, DiskSpec, PoolKind, PoolSpec, VolumeSpec
from trimtab_protos.pool_messages import IscsiSource, LvmSource, RbdSource

GIB = 1 << 30
TARGET = "iqn.2026-01.example:san"
SAN = PoolSpec(
    pool_id="pool-san",
    path="/",
    name="san",
    kind=PoolKind.ISCSI,
    is_shared=True,
    iscsi=IscsiSource(portal="10.0.0.5", target=TARGET),
)
CHAP = replace(SAN, iscsi=IscsiSource(portal="10.0.0.5:3261", target=TARGET, chap_user="fleet"))
THIN = PoolSpec(pool_id="pool-thin", path="/", kind=PoolKind.LVM_THIN, lvm=LvmSource(volume_group="vg0", thin_pool="thin"))
CEPH = PoolSpec(
    pool_id="pool-ceph",
    path="/",
    kind=PoolKind.RBD,
    is_shared=True,
    rbd=RbdSource(monitors=("10.0.0.6", "[fd00::1]:3300"), pool="vms", user="trimtab"),
)
SECRET = b"what-nobody-may-read"


class Recorded:
    """Answers commands in order and keeps what was run."""

    def __init__(self, *answers: tuple[int, str, str]) -> None:
        self.answers = list(answers)
        self.commands: list[list[str]] = []
        self.secrets: list[bytes | None] = []

    def __call__(self, command: Sequence[str], secret: bytes | None) -> tuple[int, str, str]:
        self.commands.append(list(command))
        self.secrets.append(secret)
        return self.answers.pop(0)


def volume_of(pool: PoolSpec, **changes: object) -> VolumeSpec:
    unit = "1" if pool.kind is PoolKind.ISCSI else ""
    made = VolumeSpec(volume_id="vol-data1", pool_id=pool.pool_id, format=DiskFormat.RAW, size_bytes=GIB, unit=unit)
    return replace(made, **changes)  # type: ignore[arg-type]


def image_of(size_bytes: int) -> tuple[int, str, str]:
    return 0, json.dumps({"virtual-size": size_bytes}), ""


def logical(size_bytes: int, percent: str = "25.00", metadata: str = "1.00") -> tuple[int, str, str]:
    found = {"lv_size": str(size_bytes), "data_percent": percent, "metadata_percent": metadata}
    return 0, json.dumps({"report": [{"lv": [found]}]}), ""


def refusal(pool: PoolSpec) -> tuple[type[TrimtabError], str]:
    with pytest.raises(TrimtabError) as refused:
        block_pools.check(pool)
    return type(refused.value), refused.value.code


@pytest.mark.parametrize(
    ("pool", "code"),
    [
        (replace(SAN, iscsi=None), "pool-source-missing"),
        (replace(SAN, iscsi=IscsiSource(portal="10.0.0.5,lun=0", target=TARGET)), "portal-wrong"),
        (replace(SAN, iscsi=IscsiSource(portal="10.0.0.5:0", target=TARGET)), "portal-wrong"),
        (replace(SAN, iscsi=IscsiSource(portal="-oProxy", target=TARGET)), "portal-wrong"),
        (replace(SAN, iscsi=IscsiSource(portal="10.0.0.5", target="iqn.2026-01.x,user=root")), "pool-source-wrong"),
        (replace(SAN, iscsi=IscsiSource(portal="10.0.0.5", target=TARGET, chap_user="a,b")), "pool-source-wrong"),
        (replace(THIN, lvm=LvmSource(volume_group="--yes", thin_pool="thin")), "pool-source-wrong"),
        (replace(THIN, lvm=LvmSource(volume_group="vg0", thin_pool="../x")), "pool-source-wrong"),
        (replace(CEPH, rbd=RbdSource(monitors=("10.0.0.6",), pool="vms,user=x", user="a")), "pool-source-wrong"),
        (PoolSpec(pool_id="pool-d", path="/srv/d"), "pool-kind-unknown"),
    ],
)
def test_what_could_become_an_option_is_refused(pool: PoolSpec, code: str) -> None:
    assert refusal(pool) == (InvalidRequest, code)


@pytest.mark.parametrize("unit", ["", "x", "256", "-1", "1,user=root", "１"])
def test_a_lun_is_a_number(unit: str) -> None:
    with pytest.raises(InvalidRequest, match="LUN"):
        block_pools.lun_of("vol-data1", unit)


# --- what QEMU is told -----------------------------------------------------------------------------------------------------


def disk_xml(pool: PoolSpec) -> str:
    element = ElementTree.Element("disk")
    unit = "1" if pool.kind is PoolKind.ISCSI else ""
    disk = DiskSpec(volume_id="vol-data1", pool_id=pool.pool_id, format=DiskFormat.RAW, index=1, unit=unit)
    block_pools.describe_source(element, disk, pool, "11111111-2222-3333-4444-555555555555")
    return ElementTree.tostring(element, encoding="unicode")


@pytest.mark.parametrize(
    ("pool", "xml"),
    [
        (
            SAN,
            f'<disk type="network"><source protocol="iscsi" name="{TARGET}/1"><host name="10.0.0.5" port="3260" /></source></disk>',
        ),
        (
            CHAP,
            f'<disk type="network"><source protocol="iscsi" name="{TARGET}/1"><host name="10.0.0.5" port="3261" />'
            '<auth username="fleet"><secret type="iscsi" uuid="11111111-2222-3333-4444-555555555555" /></auth></source></disk>',
        ),
        (THIN, '<disk type="block"><source dev="/dev/vg0/vol-data1" /></disk>'),
        (
            CEPH,
            '<disk type="network"><source protocol="rbd" name="vms/vol-data1"><host name="10.0.0.6" port="6789" />'
            '<host name="fd00::1" port="3300" /><auth username="trimtab">'
            '<secret type="ceph" uuid="11111111-2222-3333-4444-555555555555" /></auth></source></disk>',
        ),
    ],
    ids=["iscsi", "iscsi with CHAP", "lvm-thin", "rbd"],
)
def test_a_disk_names_its_storage_and_never_a_secret(pool: PoolSpec, xml: str) -> None:
    assert disk_xml(pool) == xml


def test_a_whole_definition_is_built_kept_and_retargeted_without_a_pool_of_files() -> None:
    disk = DiskSpec(volume_id="vol-x1", pool_id="pool-san", format=DiskFormat.RAW, index=0, boot_order=1, unit="1")
    spec = factories.domain(disks=(disk,), pools=(CHAP,), seed=None)
    xml = domain_xml.build(spec, Stamp(1, 1), HostTraits("tcg", "/log", "/socket"), exports=filling.exports_of(spec))
    assert f'name="{TARGET}/1"' in xml
    adoption_files.drop_names(adoption_files.former_names(xml, spec), spec)
    state_files.remove(spec.vm_id, CHAP)
    assert f'name="{TARGET}/1"' in migration_xml.retarget(xml, spec, Stamp(2, 2)), (
        "what is in the network is the same from everywhere"
    )
    assert volume_keys.needed_in(xml) == (volume_keys.Need(volume_keys.secret_uuid("pool-san"), "iscsi"),)


# --- what is run -----------------------------------------------------------------------------------------------------------


def test_a_lun_is_looked_at_by_qemu_with_its_password_in_memory() -> None:
    run = Recorded(image_of(GIB))
    seen = block_pools.ensure_volume(volume_of(CHAP), CHAP, SECRET, run)
    assert (seen.is_present, seen.size_bytes) == (True, GIB)
    assert run.commands == [
        [
            "qemu-img",
            "info",
            "--output=json",
            "--object",
            f"secret,id=pool-secret,file={SECRET_FILE}",
            "--image-opts",
            f"driver=iscsi,transport=tcp,portal=10.0.0.5:3261,target={TARGET},lun=1,user=fleet,password-secret=pool-secret",
        ]
    ]
    assert run.secrets == [SECRET]


def test_the_key_of_a_ceph_user_is_said_to_be_base64_already() -> None:
    """QEMU writes it in base64 for the cluster, which refuses a key that was so twice."""
    run = Recorded(image_of(GIB))
    block_pools.observe_volume(volume_of(CEPH), CEPH, SECRET, run)
    assert f"secret,id=pool-secret,format=base64,file={SECRET_FILE}" in run.commands[0]


def test_a_cluster_without_a_manager_has_an_unknown_space_and_not_a_missing_pool() -> None:
    answers = iter([(0, json.dumps({"pools": []}), ""), (0, json.dumps({"pools": [{"name": "other", "stats": {}}]}), "")])
    unknown = block_pools.observe_ceph(CEPH, SECRET, lambda _command, _secret: next(answers), 7)
    assert (unknown.is_responsive, unknown.capacity_bytes, unknown.problem) == (True, 0, "")
    with pytest.raises(Conflict, match="other"):
        block_pools.observe_ceph(CEPH, SECRET, lambda _command, _secret: next(answers), 7)


def test_a_lun_of_another_size_is_refused_with_its_size() -> None:
    with pytest.raises(Conflict, match=str(2 * GIB)) as refused:
        block_pools.ensure_volume(volume_of(SAN), SAN, None, Recorded(image_of(2 * GIB)))
    assert refused.value.code == "volume-differs"


@pytest.mark.parametrize(
    ("complaint", "kind", "code"),
    [
        ("Failed to connect to LUN : Login failed: Authorization failure(514)", Conflict, "pool-refused"),
        ("Failed to connect to LUN : Login failed: Target not found(515)", Conflict, "target-not-found"),
        ("Failed to connect to LUN : Failed to connect to iSCSI socket. No route to host", Unavailable, "pool-hung"),
        ("iSCSI: SENSE KEY:ILLEGAL_REQUEST(5) ASCQ:LOGICAL_UNIT_NOT_SUPPORTED: LUN not supported", NotFound, "lun-not-found"),
    ],
)  # fmt: skip
def test_what_a_target_says_is_told_by_its_kind(complaint: str, kind: type[TrimtabError], code: str) -> None:
    with pytest.raises(kind) as refused:
        block_pools.ensure_volume(volume_of(SAN), SAN, None, Recorded((1, "", complaint)))
    assert refused.value.code == code


def test_a_thin_volume_is_made_once_grown_and_removed() -> None:
    absent = (5, "", '  Failed to find logical volume "vg0/vol-data1"')
    run = Recorded(absent, (0, "", ""), logical(GIB))
    seen = block_pools.ensure_volume(volume_of(THIN), THIN, None, run)
    assert (seen.size_bytes, seen.allocated_bytes) == (GIB, GIB // 4)
    look = ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", "lv_size,data_percent", "--", "vg0/vol-data1"]
    make = ["lvcreate", "--quiet", "--yes", "--wipesignatures", "n", "--name", "vol-data1"]
    assert run.commands == [look, [*make, "--thinpool", "thin", "--virtualsize", f"{GIB}b", "--", "vg0"], look]
    again = Recorded(logical(GIB))
    block_pools.ensure_volume(volume_of(THIN), THIN, None, again)
    assert again.commands == [look]
    grown = Recorded(logical(GIB), (0, "", ""), logical(2 * GIB))
    assert block_pools.grow_volume(volume_of(THIN, size_bytes=2 * GIB), THIN, None, grown).size_bytes == 2 * GIB
    assert grown.commands[1] == ["lvextend", "--quiet", "--size", f"{2 * GIB}b", "--", "vg0/vol-data1"]
    gone = Recorded(logical(GIB), (0, "", ""))
    block_pools.delete_volume(volume_of(THIN), THIN, None, gone)
    assert gone.commands[1] == ["lvremove", "--quiet", "--yes", "--", "vg0/vol-data1"]
    nothing = Recorded(absent)
    block_pools.delete_volume(volume_of(THIN), THIN, None, nothing)
    assert len(nothing.commands) == 1


def test_a_full_thin_pool_and_a_missing_one_are_told_apart() -> None:
    absent = (5, "", "Failed to find logical volume")
    with pytest.raises(NoCapacity):
        block_pools.ensure_volume(
            volume_of(THIN), THIN, None, Recorded(absent, (5, "", "Insufficient free space: 1 extents needed"))
        )
    seen = block_pools.observe(THIN, None, Recorded((5, "", 'Volume group "vg0" not found')))
    assert (seen.is_responsive, seen.is_hung) == (False, False)
    assert "vg0/thin" in seen.problem


def test_the_space_of_a_thin_pool_is_what_it_has_left() -> None:
    kept = [("thin", "", 10, "40.00"), ("vol-a", "thin", 4, "25.00"), ("vol-b", "thin", 8, ""), ("root", "thin", 3, "100.00")]
    kept += [("vol-c", "other", 5, "100.00")]
    rows = [{"lv_name": name, "pool_lv": of, "lv_size": str(size * GIB), "data_percent": used} for name, of, size, used in kept]
    listed = (0, json.dumps({"report": [{"lv": rows}]}), "")
    run = Recorded(logical(10 * GIB, "40.00"), listed)
    seen = block_pools.observe(THIN, None, run)
    assert (seen.is_responsive, seen.capacity_bytes, seen.available_bytes) == (True, 10 * GIB, 6 * GIB)
    assert seen.written_bytes == GIB, "of its own volumes; the rest of what is used was written by others"
    assert run.commands[1][-2:] == ["--", "vg0"]
    crowded = block_pools.observe(THIN, None, Recorded(logical(10 * GIB, "40.00", "90.00"), (5, "", "no such luck")))
    assert crowded.written_bytes is None, "not known, which is not nothing"
    assert crowded.available_bytes == GIB, "it takes no writes either once there is no room for the addresses of its blocks"


def test_a_ceph_image_is_made_and_removed_with_the_key_in_memory() -> None:
    run = Recorded((1, "", "error reading header from vol-data1: No such file or directory"), (0, "", ""), image_of(GIB))
    block_pools.ensure_volume(volume_of(CEPH), CEPH, SECRET, run)
    options = ["--conf", "/dev/null", "--mon-host", "10.0.0.6:6789,[fd00::1]:3300", "--id", "trimtab", "--keyfile", SECRET_FILE]
    assert run.commands[1] == ["rbd", *options, "create", "--size", f"{GIB}B", "--", "vms/vol-data1"]
    assert run.secrets == [SECRET] * 3
    opened = run.commands[0][-1]
    assert opened.startswith("driver=rbd,pool=vms,image=vol-data1,user=trimtab,")
    assert all(SECRET.decode() not in word for command in run.commands for word in command)
    gone = Recorded(image_of(GIB), (0, "", ""), (0, "", ""))
    block_pools.delete_volume(volume_of(CEPH), CEPH, SECRET, gone)
    assert gone.commands[1] == ["rbd", *options, "snap", "purge", "--no-progress", "--", "vms/vol-data1"]
    assert gone.commands[2] == ["rbd", *options, "rm", "--no-progress", "--", "vms/vol-data1"]


def test_a_lun_is_neither_grown_nor_removed_by_its_volume() -> None:
    with pytest.raises(Conflict) as refused:
        block_pools.grow_volume(volume_of(SAN, size_bytes=2 * GIB), SAN, None, Recorded(image_of(GIB)))
    assert refused.value.code == "lun-fixed"
    nothing = Recorded()
    block_pools.delete_volume(volume_of(SAN), SAN, None, nothing)
    assert nothing.commands == []


@pytest.mark.parametrize("change", [{"copy_image_id": "img-1"}, {"format": DiskFormat.QCOW2}, {"is_encrypted": True}])
def test_a_volume_of_a_pool_without_files_is_raw_and_empty(change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="raw and empty"):
        block_pools.ensure_volume(volume_of(THIN, **change), THIN, None, Recorded())


def test_a_program_that_is_missing_is_said_by_name() -> None:
    assert block_pools.run_command(["no-such-program"], None) == (127, "", "no-such-program is not installed on this host")


def test_the_secret_of_a_command_is_in_no_argument_and_readable_once_asked_for() -> None:
    code, output, _complaint = block_pools.run_command(
        ["sh", "-c", f"cat {SECRET_FILE}; tr '\\0' ' ' </proc/self/cmdline"], SECRET
    )
    assert code == 0
    assert output.count(SECRET.decode()) == 1, "from the file, not from the arguments"
