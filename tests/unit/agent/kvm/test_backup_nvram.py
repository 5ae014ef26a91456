"""The UEFI variables of a backup lie where the vm that is to be defined looks for them, and defining it keeps them."""

from pathlib import Path

from trimtab_agent.hypervisor.kvm import state_files
from trimtab_agent.hypervisor.kvm.backup_xml import nvram_file
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.messages import PoolSpec

VM = "vm-01hf7y2m3n4p5q6r7s8t9v0wxy"


def test_restored_variables_are_where_the_definition_names_them(tmp_path: Path) -> None:
    pool = PoolSpec(pool_id="pool-01hf7y2m3n4p5q6r7s8t9v0wxy", path=str(tmp_path))
    (tmp_path / "vms").mkdir()
    for _ in range(2):
        state_files.restore_nvram(VM, pool, b"variables")
    file = PoolLayout.of(pool).nvram(VM)
    assert Path(file).read_bytes() == b"variables"
    assert nvram_file(f"<domain><os><nvram template='/x'>{file}</nvram></os></domain>") == file
    assert nvram_file("<domain><os><type>hvm</type></os></domain>") == ""
    state_files.remove(VM, pool)
    assert not Path(file).exists()
