"""Turns libvirt's errors into the ten kinds: the only place that knows its codes and texts.

libvirt has few codes and many texts: the same `internal error` means a lost connection, a locked image or a QEMU that died.
The texts matched here are quoted from libvirt 9.0 and QEMU 7.2.
"""

import errno

import libvirt

from trimtab_protos.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    Internal,
    NoCapacity,
    NotFound,
    TrimtabError,
    Unavailable,
)

_MAX_DETAIL = 400

_BY_CODE: dict[int, tuple[type[TrimtabError], str, str]] = {
    libvirt.VIR_ERR_NO_DOMAIN: (NotFound, "domain-not-found", "the host has no such domain"),
    libvirt.VIR_ERR_NO_NETWORK: (NotFound, "network-not-found", "the host has no such network"),
    libvirt.VIR_ERR_NO_STORAGE_POOL: (NotFound, "pool-not-found", "the host has no such pool"),
    libvirt.VIR_ERR_DOM_EXIST: (AlreadyExists, "domain-exists", "another domain has this name or UUID"),
    libvirt.VIR_ERR_NETWORK_EXIST: (AlreadyExists, "network-exists", "another network has this name or UUID"),
    libvirt.VIR_ERR_OPERATION_INVALID: (Conflict, "wrong-domain-state", "the domain's state does not allow it now"),
    libvirt.VIR_ERR_OPERATION_ABORTED: (Conflict, "job-cancelled", "the job was cancelled"),
    libvirt.VIR_ERR_OPERATION_TIMEOUT: (
        DeadlineExceeded,
        "hypervisor-timeout",
        "the domain is busy with something else",
    ),
    libvirt.VIR_ERR_RESOURCE_BUSY: (Conflict, "resource-busy", "something else uses it now"),
    libvirt.VIR_ERR_MIGRATE_UNSAFE: (
        Conflict,
        "migration-unsafe",
        "the disks are not on storage that both hosts share",
    ),
    libvirt.VIR_ERR_CPU_INCOMPATIBLE: (Conflict, "cpu-incompatible", "the host's CPU cannot run the vm's CPU model"),
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: (
        Conflict,
        "not-supported-here",
        "this host does not support what the vm needs",
    ),
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED: (Conflict, "not-supported-here", "this host does not support it"),
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: (Conflict, "not-supported-here", "this host does not support it"),
    libvirt.VIR_ERR_NO_SUPPORT: (Conflict, "not-supported-here", "this host does not support it"),
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: (Unavailable, "guest-agent-silent", "the guest's agent does not answer"),
    libvirt.VIR_ERR_NO_MEMORY: (NoCapacity, "host-out-of-memory", "the host has no memory left for it"),
    libvirt.VIR_ERR_XML_ERROR: (Internal, "definition-rejected", "libvirt refused the definition"),
    libvirt.VIR_ERR_XML_DETAIL: (Internal, "definition-rejected", "libvirt refused the definition"),
    libvirt.VIR_ERR_INVALID_ARG: (Internal, "definition-rejected", "libvirt refused the request"),
}

_BY_TEXT: tuple[tuple[str, type[TrimtabError], str, str], ...] = (
    # QEMU: 'Failed to get "write" lock', 'Failed to get shared "write" lock': another QEMU, here or elsewhere, has it open.
    ('" lock', Conflict, "image-locked", "a disk is in use by another QEMU, on this host or on another"),
    # QEMU: 'qcow2: Image is corrupt; cannot be opened read/write'.
    ("image is corrupt", Conflict, "image-corrupt", "a disk's image is marked corrupt; writing to it could destroy the rest"),
    ("no space left on device", NoCapacity, "pool-full", "the pool has no room left"),
    ("cannot allocate memory", NoCapacity, "host-out-of-memory", "the host has no memory left for it"),
    ("already exists with uuid", AlreadyExists, "domain-exists", "another domain has this name or UUID"),
    ("is already defined with uuid", AlreadyExists, "domain-exists", "another domain has this name or UUID"),
    ("failed to connect to remote libvirt", Unavailable, "peer-down", "the other host's libvirt cannot be reached"),
    ("unable to connect to server", Unavailable, "peer-down", "the other host's libvirt cannot be reached"),
)
"""Lower-case text → error; looked at before the code. Order matters."""


def translate(error: libvirt.libvirtError, *, doing: str, changes: bool, is_connection_lost: bool) -> TrimtabError:
    """Return the error of ours for `error`, met while `doing` (a verb phrase for people).

    A connection that broke during a change leaves its outcome unknown (`DeadlineExceeded`); during a reading nothing was
    done (`Unavailable`).
    """
    said = error.get_error_message() or str(error)
    detail = said[:_MAX_DETAIL]
    code = error.get_error_code()
    context = {"libvirt_code": code, "detail": detail}
    if is_connection_lost:
        if changes:
            return DeadlineExceeded("hypervisor-lost", f"could not {doing}: libvirt went away meanwhile", **context)
        return Unavailable("hypervisor-down", f"could not {doing}: libvirt does not answer", **context)
    # Of all that was said: QEMU's own words come last, after the whole definition of a disk.
    lowered = said.lower()
    for text, error_class, name, message in _BY_TEXT:
        if text in lowered:
            return error_class(name, f"could not {doing}: {message}", **context)
    if code == libvirt.VIR_ERR_SYSTEM_ERROR and error.get_int1() == errno.ENOSPC:
        return NoCapacity("pool-full", f"could not {doing}: the pool has no room left", **context)
    if code in _BY_CODE:
        error_class, name, message = _BY_CODE[code]
        return error_class(name, f"could not {doing}: {message}", **context)
    return Internal("hypervisor-error", f"could not {doing}: libvirt says: {detail}", **context)


def is_gone(error: libvirt.libvirtError) -> bool:
    """Tell whether the object that was asked about does not exist (any more)."""
    return bool(
        error.get_error_code()
        in {
            libvirt.VIR_ERR_NO_DOMAIN,
            libvirt.VIR_ERR_NO_NETWORK,
            libvirt.VIR_ERR_NO_STORAGE_POOL,
            libvirt.VIR_ERR_NO_NODE_DEVICE,
        }
    )
