"""Keys on a host: how long they stay, what libvirt is told of them, and that they stand in no argument while a disk is made."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab_agent.hypervisor.kvm import volume_keys, volumes
from trimtab_agent.hypervisor.kvm.pool_layout import VOLUMES, PoolLayout
from trimtab_agent.hypervisor.kvm.volume_keys import KEPT_FOR_S, Need, VolumeKeys
from trimtab_protos.errors import Conflict, InvalidRequest, TrimtabError, Unavailable
from trimtab_protos.messages import DiskFormat, PoolSpec, VolumeSpec

KEY = "0123456789abcdef" * 4
OTHER_KEY = "f" * 64
MIB = 1 << 20
VOLUME = VolumeSpec(volume_id="vol-1", pool_id="pool-1", format=DiskFormat.QCOW2, size_bytes=MIB, is_encrypted=True)


def volume(**changes: object) -> VolumeSpec:
    return replace(VOLUME, **changes)  # type: ignore[arg-type]


@pytest.fixture
def layout(tmp_path: Path) -> PoolLayout:
    path = tmp_path / "pool"
    path.mkdir()
    made = PoolLayout.of(PoolSpec(pool_id="pool-1", path=str(path)))
    made.create_subdirectories()
    return made


def test_a_key_is_kept_for_an_hour_and_then_asked_for_again() -> None:
    now = [0.0]
    keys = VolumeKeys(clock=lambda: now[0])
    keys.give({"vol-1": KEY, "pool-1": "a password"})
    now[0] = KEPT_FOR_S - 1
    assert (keys.of("vol-1"), keys.of("pool-1")) == (KEY.encode(), b"a password")
    now[0] = KEPT_FOR_S
    with pytest.raises(Unavailable) as missing:
        keys.of("vol-1")
    assert missing.value.code == "volume-key-missing"


@pytest.mark.parametrize("key", ["", "short", KEY.upper(), KEY + "0"])
def test_what_is_no_key_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        VolumeKeys().give({"vol-1": key})
    assert not key or key not in str(refused.value)


def test_libvirt_is_told_secrets_that_it_neither_stores_nor_shows() -> None:
    xml = volume_keys.secret_xml(Need(volume_keys.secret_uuid("vol-1"), "volume"))
    assert 'ephemeral="yes"' in xml
    assert 'private="yes"' in xml
    assert volume_keys.secret_uuid("vol-1") != volume_keys.secret_uuid("vol-2")


def test_only_the_disks_of_ours_say_which_secrets_they_need() -> None:
    ours = volume_keys.secret_uuid("vol-1")
    source = f'<source file="/x"><encryption format="luks"><secret type="passphrase" uuid="{ours}"/></encryption></source>'
    theirs = source.replace(ours, volume_keys.secret_uuid("vol-2"))
    san = f'<source protocol="iscsi" name="t/1"><auth username="u"><secret type="iscsi" uuid="{ours}"/></auth></source>'
    disks = (
        f'<disk>{source}<alias name="ua-vol-1"/></disk><disk>{theirs}<alias name="virtio-disk0"/></disk>'
        f'<disk>{san}<alias name="ua-vol-3"/></disk><disk><source file="/y"/><alias name="ua-vol-4"/></disk>'
    )
    xml = f"<domain><devices>{disks}</devices></domain>"
    assert volume_keys.needed_in(xml) == (Need(ours, "volume"), Need(ours, "iscsi"))


# --- files -----------------------------------------------------------------------------------------------------------------


def commands_seen(until: threading.Event) -> set[str]:
    """Return every process's arguments that were to be seen until then."""
    seen: set[str] = set()
    while not until.is_set():
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    seen.add((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue  # it ended meanwhile
    return seen


def test_a_disk_is_made_and_grown_encrypted_and_its_key_is_in_no_processs_arguments(layout: PoolLayout) -> None:
    over = threading.Event()
    watched: list[set[str]] = []
    watcher = threading.Thread(target=lambda: watched.append(commands_seen(over)))
    watcher.start()
    try:
        for _twice in range(2):
            seen = volumes.ensure(VOLUME, layout, key=KEY.encode())
        grown = volumes.grow(volume(size_bytes=2 * MIB), layout, key=KEY.encode())
    finally:
        over.set()
        watcher.join()
    assert (seen.size_bytes, grown.size_bytes) == (MIB, 2 * MIB)
    (lines,) = watched
    assert any("qemu-img" in line for line in lines), "it was watched while it worked"
    assert not [line for line in lines if KEY in line]
    header = (layout.path / VOLUMES / "vol-1.qcow2").read_bytes()[:40]
    assert int.from_bytes(header[32:36], "big") == 2, "LUKS, by qcow2's own header"


def test_another_key_opens_nothing(layout: PoolLayout) -> None:
    volumes.ensure(VOLUME, layout, key=KEY.encode())
    with pytest.raises(TrimtabError):
        volumes.grow(volume(size_bytes=2 * MIB), layout, key=OTHER_KEY.encode())


def test_a_plain_file_is_not_taken_for_an_encrypted_one_nor_the_other_way_round(layout: PoolLayout) -> None:
    volumes.ensure(volume(is_encrypted=False), layout)
    with pytest.raises(Conflict, match="unencrypted"):
        volumes.ensure(VOLUME, layout, key=KEY.encode())


@pytest.mark.parametrize("change", [{"base_image_id": "img-1"}, {"base_volume_id": "vol-2"}, {"format": DiskFormat.RAW}])
def test_what_would_leave_bytes_in_the_clear_is_refused(layout: PoolLayout, change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        volumes.ensure(volume(**change), layout, key=KEY.encode())
    assert refused.value.code == "volume-encrypted"


def test_without_its_key_nothing_is_made(layout: PoolLayout) -> None:
    with pytest.raises(Unavailable):
        volumes.ensure(VOLUME, layout)
    assert list((layout.path / VOLUMES).iterdir()) == []
