"""Which of the ten kinds each of libvirt's errors becomes; texts as libvirt 9.0 and QEMU 7.2 write them."""

import errno
import subprocess
from pathlib import Path

import libvirt
import pytest

from trimtab_agent.hypervisor.kvm import os_errors
from trimtab_agent.hypervisor.kvm.errors import is_gone, translate
from trimtab_protos.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NoCapacity,
    NotFound,
    TrimtabError,
    Unavailable,
)

LOCKED = (
    'internal error: process exited while connecting to monitor: Failed to get "write" lock\nIs another process using the image'
)
SHARED_LOCKED = 'internal error: Failed to get shared "write" lock'
# Of qcow2's header: the last byte of `incompatible_features`, whose second bit says corrupt.
CORRUPT_BYTE, CORRUPT_BIT = 79, 2
CASES = [
    (libvirt.VIR_ERR_NO_DOMAIN, "Domain not found", NotFound, "domain-not-found"),
    (libvirt.VIR_ERR_INTERNAL_ERROR, LOCKED, Conflict, "image-locked"),
    (libvirt.VIR_ERR_INTERNAL_ERROR, SHARED_LOCKED, Conflict, "image-locked"),
    (
        libvirt.VIR_ERR_INTERNAL_ERROR,
        "cannot set up guest memory 'pc.ram': Cannot allocate memory",
        NoCapacity,
        "host-out-of-memory",
    ),
    (libvirt.VIR_ERR_OPERATION_INVALID, "domain is not running", Conflict, "wrong-domain-state"),
    (libvirt.VIR_ERR_OPERATION_ABORTED, "operation aborted: migration out: canceled by client", Conflict, "job-cancelled"),
    (libvirt.VIR_ERR_OPERATION_TIMEOUT, "cannot acquire state change lock", DeadlineExceeded, "hypervisor-timeout"),
    (libvirt.VIR_ERR_OPERATION_FAILED, "domain 'x' already exists with uuid 1", AlreadyExists, "domain-exists"),
    (libvirt.VIR_ERR_MIGRATE_UNSAFE, "Migration without shared storage is unsafe", Conflict, "migration-unsafe"),
    (libvirt.VIR_ERR_CONFIG_UNSUPPORTED, "CPU mode 'custom' is not supported", Conflict, "not-supported-here"),
    (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, "Guest agent is not responding", Unavailable, "guest-agent-silent"),
    (libvirt.VIR_ERR_SYSTEM_ERROR, "unable to connect to server at '10.0.0.2:16514': No route", Unavailable, "peer-down"),
    (libvirt.VIR_ERR_INTERNAL_ERROR, "something new", Internal, "hypervisor-error"),
    (libvirt.VIR_ERR_SYSTEM_ERROR, "write failed: No space left on device", NoCapacity, "pool-full"),
]


def libvirt_error(code: int, message: str) -> libvirt.libvirtError:
    error = libvirt.libvirtError(message)
    error.err = (code, 0, message, 2, message, None, None, 0, 0)
    return error


@pytest.mark.parametrize(("code", "message", "kind", "name"), CASES)
def test_each_error_becomes_its_kind(code: int, message: str, kind: type[TrimtabError], name: str) -> None:
    translated = translate(libvirt_error(code, message), doing="start vm-1", changes=True, is_connection_lost=False)
    assert type(translated) is kind
    assert translated.code == name
    assert translated.message.startswith("could not start vm-1: ")
    assert translated.context["detail"] == message


def test_an_image_that_is_marked_corrupt_is_told_by_qemus_own_words_however_much_stands_before_them(tmp_path: Path) -> None:
    image = tmp_path / "corrupt.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True, timeout=20)
    with image.open("r+b") as header:
        header.seek(CORRUPT_BYTE)
        header.write(bytes([CORRUPT_BIT]))
    disk = ["-blockdev", f"driver=file,filename={image},node-name=file", "-blockdev", "driver=qcow2,file=file,node-name=disk"]
    machine = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", *disk]
    refused = subprocess.run(machine, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    # libvirt puts the whole definition of the disk before it, whose paths may be long.
    definition = '-blockdev {"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"' + "x" * 500 + '"}: '
    for before in ("", definition):
        said = f"internal error: process exited while connecting to monitor: {before}{refused.stderr}"
        error = libvirt_error(libvirt.VIR_ERR_INTERNAL_ERROR, said)
        translated = translate(error, doing="start vm-1", changes=True, is_connection_lost=False)
        assert (type(translated), translated.code) == (Conflict, "image-corrupt")
        assert len(str(translated.context["detail"])) <= 400


def test_a_lost_connection_leaves_a_change_unknown_and_a_reading_undone() -> None:
    error = libvirt_error(libvirt.VIR_ERR_INTERNAL_ERROR, "client socket is closed")
    assert type(translate(error, doing="x", changes=True, is_connection_lost=True)) is DeadlineExceeded
    assert type(translate(error, doing="x", changes=False, is_connection_lost=True)) is Unavailable


def test_what_is_gone_is_told_from_what_failed() -> None:
    assert is_gone(libvirt_error(libvirt.VIR_ERR_NO_NETWORK, ""))
    assert not is_gone(libvirt_error(libvirt.VIR_ERR_INTERNAL_ERROR, ""))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoCapacity),
        (errno.EDQUOT, NoCapacity),
        (errno.ENOENT, NotFound),
        (errno.ELOOP, InvalidRequest),
        (errno.EIO, Unavailable),
        (errno.ESTALE, Unavailable),
        (errno.EPERM, Internal),
    ],
)
def test_failed_calls_on_files(number: int, kind: type[TrimtabError]) -> None:
    assert type(os_errors.from_os(OSError(number, "why", "/x"), doing="write")) is kind
