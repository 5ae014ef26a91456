"""Which disks of a job libvirt's refusal is about; the jobs themselves: `tests/lab/test_kvm_backup_changes.py`."""

import pytest

from trimtab_agent.hypervisor.kvm.checkpoints import broken_disks


@pytest.mark.parametrize(
    ("said", "broken"),
    [
        ("checkpoint inconsistent: missing or broken bitmap 'tt-bk-1' for disk 'vdb'", ["vdb"]),
        ("bitmap 'tt-bk-1' not found in backing chain of 'vda'", ["vda"]),
        ("checkpoint inconsistent: nobody knows why", ["vda", "vdb"]),
        ("cannot acquire state change lock", []),
    ],
)
def test_a_refusal_is_about_the_disk_that_it_names_and_else_about_all(said: str, broken: list[str]) -> None:
    assert list(broken_disks(said, ["vda", "vdb"])) == broken


def test_a_disk_that_is_read_in_full_already_is_not_named_again() -> None:
    assert list(broken_disks("checkpoint inconsistent: missing or broken bitmap 'tt-bk-1' for disk 'vdb'", [])) == []
