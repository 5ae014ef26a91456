"""The files of a vm that are neither volumes nor definition: its seed and its UEFI variables, beside its boot disk."""

import contextlib
import os
import secrets
from pathlib import Path

from trimtab_agent.hypervisor.kvm import os_errors, seed
from trimtab_agent.hypervisor.kvm.domain_xml import NVRAM_TEMPLATE, state_layout
from trimtab_agent.hypervisor.kvm.pool_layout import FILE_KINDS, NVRAM_FILE, SEED_FILE, PoolLayout, regular_file, sync_directory
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DomainSpec, Firmware, PoolSpec


def ensure(domain: DomainSpec) -> None:
    """Make seed and NVRAM exist; a seed that differs is replaced, NVRAM is the guest's and stays as it is."""
    has_uefi = domain.firmware is Firmware.UEFI
    if domain.seed is None and not has_uefi:
        return
    layout = state_layout(domain)
    try:
        with layout.open_vm(domain.vm_id, create=True) as directory:
            if directory is None:
                raise Conflict("pool-changed", f"pool {layout.pool_id} lost the vm's directory meanwhile")
            if domain.seed is not None:
                # Readable for QEMU's own user, and for nobody who cannot enter the directory by name.
                _replace(directory, SEED_FILE, seed.build(domain.seed), mode=0o644)
            if has_uefi and regular_file(directory, NVRAM_FILE) is None:
                _replace(directory, NVRAM_FILE, _nvram_template(domain), mode=0o600)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"write the state files of {domain.vm_id}") from error


def restore_nvram(vm_id: str, pool: PoolSpec, content: bytes) -> None:
    """Put the UEFI variables of a backup where the vm that is to be defined will look for them."""
    layout = PoolLayout.of(pool)
    try:
        with layout.open_vm(vm_id, create=True) as directory:
            if directory is None:
                raise Conflict("pool-changed", f"pool {layout.pool_id} lost the vm's directory meanwhile")
            _replace(directory, NVRAM_FILE, content, mode=0o600)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"write the UEFI variables of {vm_id}") from error


def remove(vm_id: str, pool: PoolSpec) -> None:
    """Remove the vm's state files from a pool that may hold them."""
    if pool.kind not in FILE_KINDS:
        return
    try:
        PoolLayout.of(pool).remove_vm(vm_id)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"remove the state files of {vm_id}") from error


def _nvram_template(domain: DomainSpec) -> bytes:
    template = Path(NVRAM_TEMPLATE[domain.has_secure_boot])
    try:
        return template.read_bytes()
    except FileNotFoundError as error:
        raise Conflict("uefi-not-here", f"this host has no UEFI firmware at {template}; install ovmf") from error


def _replace(directory: int, name: str, content: bytes, *, mode: int) -> None:
    """Write the file under another name and rename it, unless it holds `content` already."""
    if regular_file(directory, name) is not None:
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "rb") as file:
            if file.read(len(content) + 1) == content:
                return
    temporary = f".{name}.{secrets.token_hex(6)}"
    try:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, mode, dir_fd=directory), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        sync_directory(directory)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
