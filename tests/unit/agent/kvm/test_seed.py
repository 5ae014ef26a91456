"""The NoCloud seed: what cloud-init finds in it, and that it is the same bytes each time."""

import io
import time

import pycdlib
import pytest

from tests.unit.agent.kvm import factories as make
from trimtab_agent.hypervisor.kvm import seed, state_files
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import Firmware, PoolSpec, SeedSpec

FULL = SeedSpec(meta_yaml="instance-id: i-1\n", user_yaml="#cloud-config\nhostname: é\n", network_yaml="version: 2\n")


def read(image: bytes, **path: str) -> str:
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(image))
    found = io.BytesIO()
    iso.get_file_from_iso_fp(found, **path)
    iso.close()
    return found.getvalue().decode()


def test_documents_are_there_under_their_names() -> None:
    image = seed.build(FULL)
    assert image[32768 + 40 : 32768 + 46] == b"cidata"
    for name, text in (("meta-data", FULL.meta_yaml), ("user-data", FULL.user_yaml), ("network-config", FULL.network_yaml)):
        assert read(image, rr_path=f"/{name}") == text
        assert read(image, joliet_path=f"/{name}") == text


def test_user_data_is_never_missing_and_network_config_only_when_given() -> None:
    image = seed.build(SeedSpec(meta_yaml="instance-id: i-1\n"))
    assert read(image, rr_path="/user-data") == "#cloud-config\n"
    assert b"network-config" not in image


def test_the_time_of_day_is_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    images = []
    for now in (1.0e9, 1.7e9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        images.append(seed.build(FULL))
    assert images[0] == images[1]


def test_documents_are_bounded() -> None:
    with pytest.raises(InvalidRequest) as refused:
        seed.build(SeedSpec(meta_yaml="x", user_yaml="x" * (2 << 20)))
    assert refused.value.code == "seed-too-large"


def test_state_files_are_made_once_and_removed(pool: PoolSpec, layout: PoolLayout) -> None:
    vm = make.domain(pools=(pool,), seed=FULL, firmware=Firmware.UEFI)
    state_files.ensure(vm)
    with layout.open_vm("vm-01hweb", create=False) as directory:
        assert directory is not None
    with open(layout.nvram("vm-01hweb"), "r+b") as file:
        file.write(b"boot entries of the guest")
    state_files.ensure(make.domain(pools=(pool,), seed=SeedSpec(meta_yaml="instance-id: i-2\n"), firmware=Firmware.UEFI))
    with open(layout.seed("vm-01hweb"), "rb") as file:
        assert read(file.read(), rr_path="/meta-data") == "instance-id: i-2\n"
    with open(layout.nvram("vm-01hweb"), "rb") as file:
        assert file.read(25) == b"boot entries of the guest"
    state_files.remove("vm-01hweb", pool)
    state_files.remove("vm-01hweb", pool)
    with layout.open_vm("vm-01hweb", create=False) as directory:
        assert directory is None
