"""What every hypervisor promises, asked of the simulated one always and of libvirt in the lab (marker `lab`).

Each test brings a vm of its own and takes it away again. A guest is booted for real where the question needs no more than its
process: TCG guests take 10 to 20 s to reach their first line, so only one test waits for that.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.hosts import (
    IMAGE_ID,
    MIB,
    Control,
    Hosts,
    Vm,
    bring_image,
    refusal,
)
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound
from trimtab_protos.messages import (
    DiskFormat,
    ImageSpec,
    UploadSource,
    VolumeSpec,
)

pytestmark = [pytest.mark.timeout(900)]


# --- the host ------------------------------------------------------------------------------------------------------------


def test_the_inventory_says_what_guests_need(hosts: Hosts) -> None:
    found = hosts.first.hypervisor.inventory()
    assert found.cpus > 0
    assert found.memory_mib > 0
    assert (found.arch, found.accelerator in {"kvm", "tcg"}) == ("x86_64", True)
    assert "pc-q35-7.2" in found.machines
    assert "qemu64" in found.usable_cpu_models
    assert found.boot_id
    assert found.machine_id
    assert {"pool-dir", "network-bridge", "network-nat", "migrate", "copy-disks"} <= set(found.capabilities)
    assert hosts.first.network.bridge in {bridge.name for bridge in found.bridges}
    assert hosts.first.hypervisor.is_up()
    assert hosts.first.hypervisor.load().memory_available_mib > 0


def test_two_hosts_are_told_apart(hosts: Hosts) -> None:
    first, second = hosts.first.hypervisor.inventory(), hosts.second.hypervisor.inventory()
    assert first.machine_id != second.machine_id
    assert first.smbios_uuid != second.smbios_uuid


# --- pools ---------------------------------------------------------------------------------------------------------------


def test_a_pool_is_ensured_again_and_observed_with_its_space(hosts: Hosts) -> None:
    side = hosts.first
    assert side.hypervisor.ensure_pool(side.local_pool).pool_id == side.local_pool.pool_id
    seen = side.hypervisor.observe_pool(side.local_pool)
    assert seen.is_responsive
    assert 0 < seen.available_bytes <= seen.capacity_bytes
    assert abs(seen.observed_at_ms - time.time() * 1000) < 60_000


@pytest.mark.parametrize("path", ["relative/path", "", "/srv/../etc"])
def test_a_pool_at_no_absolute_path_is_refused(hosts: Hosts, path: str) -> None:
    pool = replace(hosts.first.local_pool, pool_id="pool-wrong", path=path)
    assert refusal(lambda: hosts.first.hypervisor.ensure_pool(pool))[0] is InvalidRequest


def test_a_marker_is_seen_by_every_host_of_a_shared_pool_and_by_no_other(hosts: Hosts) -> None:
    first, second = hosts.first, hosts.second
    for pool, is_seen in ((first.shared_pool, True), (first.local_pool, False)):
        assert first.hypervisor.check_marker(pool, "contract", "word", False) == "word"
        assert first.hypervisor.check_marker(pool, "contract", "", False) == "word"
        assert second.hypervisor.check_marker(pool, "contract", "", False) == ("word" if is_seen else "")
        first.hypervisor.check_marker(pool, "contract", "", True)
        assert first.hypervisor.check_marker(pool, "contract", "", False) == ""
        first.hypervisor.check_marker(pool, "contract", "", True)


def test_a_marker_cannot_leave_the_pool(hosts: Hosts) -> None:
    call = hosts.first.hypervisor.check_marker
    assert refusal(lambda: call(hosts.first.local_pool, "../../escape", "x", False))[0] is InvalidRequest


# --- volumes -------------------------------------------------------------------------------------------------------------


def test_a_volume_is_made_once_and_removed_twice(hosts: Hosts, name: str) -> None:
    side = hosts.first
    volume = VolumeSpec(volume_id=f"vol-{name}", pool_id="pool-local", format=DiskFormat.RAW, size_bytes=8 * MIB)
    assert not side.hypervisor.observe_volume(volume.volume_id, side.local_pool).is_present
    made = side.hypervisor.ensure_volume(volume, side.local_pool)
    assert (made.is_present, made.size_bytes) == (True, 8 * MIB)
    assert made.allocated_bytes < 8 * MIB, "sparse"
    assert side.hypervisor.ensure_volume(volume, side.local_pool).size_bytes == 8 * MIB
    for _repetition in range(2):
        side.hypervisor.delete_volume(volume.volume_id, side.local_pool)
    assert not side.hypervisor.observe_volume(volume.volume_id, side.local_pool).is_present


def test_another_volume_under_the_same_id_is_a_conflict(hosts: Hosts, name: str) -> None:
    side = hosts.first
    volume = VolumeSpec(volume_id=f"vol-{name}", pool_id="pool-local", format=DiskFormat.QCOW2, size_bytes=8 * MIB)
    side.hypervisor.ensure_volume(volume, side.local_pool)
    for other in (replace(volume, size_bytes=16 * MIB), replace(volume, size_bytes=64 * MIB, base_image_id=IMAGE_ID)):
        assert refusal(lambda other=other: side.hypervisor.ensure_volume(other, side.local_pool)) == (  # type: ignore[misc]
            Conflict,
            "volume-differs",
        )
    side.hypervisor.delete_volume(volume.volume_id, side.local_pool)


def test_a_clone_needs_its_image_and_room_for_it(hosts: Hosts, name: str) -> None:
    side = hosts.first
    clone = VolumeSpec(
        volume_id=f"vol-{name}", pool_id="pool-local", format=DiskFormat.QCOW2, size_bytes=64 * MIB, base_image_id="img-none"
    )
    assert refusal(lambda: side.hypervisor.ensure_volume(clone, side.local_pool)) == (NotFound, "image-not-found")
    small = replace(clone, base_image_id=IMAGE_ID, size_bytes=512)
    assert refusal(lambda: side.hypervisor.ensure_volume(small, side.local_pool)) == (
        InvalidRequest,
        "volume-smaller-than-image",
    )
    assert not side.hypervisor.observe_volume(clone.volume_id, side.local_pool).is_present


def test_a_volume_of_no_size_takes_its_images(hosts: Hosts, name: str) -> None:
    side = hosts.first
    virtual_bytes = bring_image(side, side.local_pool, hosts.image).virtual_size_bytes
    for suffix, fields in (("a", {"base_image_id": IMAGE_ID}), ("b", {"copy_image_id": IMAGE_ID})):
        volume = VolumeSpec(
            volume_id=f"vol-{name}{suffix}", pool_id="pool-local", format=DiskFormat.QCOW2, size_bytes=0, **fields
        )
        assert side.hypervisor.ensure_volume(volume, side.local_pool).size_bytes == virtual_bytes
        side.hypervisor.delete_volume(volume.volume_id, side.local_pool)


def test_a_volume_that_a_domain_has_is_not_removed(hosts: Hosts, vm: Vm) -> None:
    call = hosts.first.hypervisor.delete_volume
    assert refusal(lambda: call(vm.volume.volume_id, vm.pool)) == (Conflict, "volume-in-use")


@pytest.mark.parametrize("volume_id", ["../../etc/passwd", "vol-x/../y", "", "-rf", "vol-\0"])
def test_an_id_that_is_no_id_is_refused(hosts: Hosts, volume_id: str) -> None:
    volume = VolumeSpec(volume_id=volume_id, pool_id="pool-local", format=DiskFormat.RAW, size_bytes=MIB)
    assert refusal(lambda: hosts.first.hypervisor.ensure_volume(volume, hosts.first.local_pool))[0] is InvalidRequest


# --- images --------------------------------------------------------------------------------------------------------------


def test_an_import_is_proven_and_found_again(hosts: Hosts) -> None:
    import hashlib

    side = hosts.first
    digest = hashlib.sha256(hosts.image.read_bytes()).hexdigest()
    result = bring_image(side, side.local_pool, hosts.image, source_sha256=digest)
    assert (result.source_sha256, result.format) == (digest, DiskFormat.QCOW2)
    assert result.virtual_size_bytes == hosts.image.stat().st_size
    assert bring_image(side, side.local_pool, hosts.image) == result
    assert side.hypervisor.open_image(IMAGE_ID, side.local_pool).startswith("/")


@pytest.mark.parametrize(
    ("content", "changes", "code"),
    [
        (b"x" * 65536, {"source_sha256": "0" * 64}, "image-checksum-mismatch"),
        (b"x" * 65536, {"format": DiskFormat.QCOW2}, "image-format-mismatch"),
        (b"x" * 65536, {"max_bytes": 4096}, "image-too-large"),
    ],
    ids=["checksum", "format", "size"],
)
def test_a_refused_image_leaves_nothing_behind(
    hosts: Hosts, name: str, tmp_path: Path, content: bytes, changes: dict[str, Any], code: str
) -> None:
    side, image_id = hosts.first, f"img-{name}"
    (tmp_path / "image").write_bytes(content)
    assert refusal(lambda: bring_image(side, side.local_pool, tmp_path / "image", image_id=image_id, **changes)) == (
        InvalidRequest,
        code,
    )
    assert refusal(lambda: side.hypervisor.open_image(image_id, side.local_pool)) == (NotFound, "image-not-found")


def test_an_image_that_refers_to_another_file_is_refused(hosts: Hosts, name: str, tmp_path: Path) -> None:
    import subprocess

    secret, evil = tmp_path / "secret", tmp_path / "evil.qcow2"
    secret.write_bytes(b"secret" * 1000)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(evil)]
    subprocess.run(command, check=True, timeout=30)
    call = lambda: bring_image(  # noqa: E731
        hosts.first, hosts.first.local_pool, evil, image_id=f"img-{name}", format=DiskFormat.QCOW2
    )
    assert refusal(call) == (InvalidRequest, "image-has-backing-file")


def test_a_cancelled_import_leaves_nothing_behind(hosts: Hosts, name: str) -> None:
    side, control = hosts.first, Control()
    control.cancelled.set()
    image = ImageSpec(image_id=f"img-{name}", pool_id="pool-local", format=DiskFormat.RAW)
    source = UploadSource(upload_id=str(hosts.image), size_bytes=hosts.image.stat().st_size)
    assert refusal(lambda: side.hypervisor.import_image(image, side.local_pool, source, control)) == (
        Conflict,
        "job-cancelled",
    )
    assert refusal(lambda: side.hypervisor.open_image(image.image_id, side.local_pool))[0] is NotFound


def test_an_image_with_clones_stays_and_an_absent_one_is_fine(hosts: Hosts, vm: Vm) -> None:
    assert refusal(lambda: hosts.first.hypervisor.delete_image(IMAGE_ID, vm.pool)) == (Conflict, "image-in-use")
    hosts.first.hypervisor.delete_image("img-none", vm.pool)


# --- networks ------------------------------------------------------------------------------------------------------------


def test_a_network_needs_its_bridge_as_it_must_be(hosts: Hosts) -> None:
    side = hosts.first
    side.hypervisor.ensure_network(side.network)
    missing = replace(side.network, network_id="net-missing", bridge="br-missing")
    assert refusal(lambda: side.hypervisor.ensure_network(missing))[0] is Conflict
    jumbo = replace(side.network, network_id="net-jumbo", mtu=9000)
    assert refusal(lambda: side.hypervisor.ensure_network(jumbo))[0] is Conflict
    side.hypervisor.remove_network("net-missing")
