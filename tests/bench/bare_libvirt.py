"""Runs inside a lab host: the same work as an agent's, by bare libvirt calls, timed; prints one JSON object.

bare_libvirt.py create XML BASE DISK       clone BASE to DISK, define, start, wait until it runs
bare_libvirt.py start XML                define and start a domain whose disk is there, wait until it runs
bare_libvirt.py clone BASE DISK            make the disk that a migration copies into
bare_libvirt.py migrate NAME URI MIGRATION_URI [DISK_TARGET]
bare_libvirt.py moved NAME                 of the last migration to this host by libvirt's own count, ms: all of it, and the guest's downtime
bare_libvirt.py remove NAME DISK
bare_libvirt.py xml NAME
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import libvirt

MIGRATION_FLAGS = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
    | libvirt.VIR_MIGRATE_TLS
)


def clone(base: str, disk: str) -> None:
    Path(disk).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, disk], check=True)


def create(connection: libvirt.virConnect, xml_path: str, base: str, disk: str) -> dict[str, object]:
    document = Path(xml_path).read_text()
    began = time.monotonic()
    clone(base, disk)
    _run(connection, document)
    return {"seconds": time.monotonic() - began}


def start(connection: libvirt.virConnect, xml_path: str) -> dict[str, object]:
    document = Path(xml_path).read_text()
    began = time.monotonic()
    _run(connection, document)
    return {"seconds": time.monotonic() - began}


def _run(connection: libvirt.virConnect, document: str) -> None:
    domain = connection.defineXML(document)
    domain.create()
    while domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
        time.sleep(0.01)


def migrate(connection: libvirt.virConnect, name: str, uri: str, migration_uri: str, *disk_target: str) -> dict[str, object]:
    flags = MIGRATION_FLAGS
    parameters: dict[str, object] = {libvirt.VIR_MIGRATE_PARAM_URI: migration_uri}
    if disk_target:
        flags |= libvirt.VIR_MIGRATE_NON_SHARED_INC
        parameters[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = list(disk_target)
    domain = connection.lookupByName(name)
    began = time.monotonic()
    domain.migrateToURI3(uri, parameters, flags)
    return {"seconds": time.monotonic() - began}


def moved(connection: libvirt.virConnect, name: str) -> dict[str, object]:
    found = connection.lookupByName(name).jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
    return {"downtime_ms": found.get("downtime"), "elapsed_ms": found.get("time_elapsed")}


def remove(connection: libvirt.virConnect, name: str, disk: str) -> dict[str, object]:
    with contextlib.suppress(libvirt.libvirtError):
        domain = connection.lookupByName(name)
        with contextlib.suppress(libvirt.libvirtError):
            domain.destroy()
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    Path(disk).unlink(missing_ok=True)
    return {}


def main() -> None:
    verb, *arguments = sys.argv[1:]
    if verb == "clone":
        began = time.monotonic()
        clone(*arguments)
        answer: dict[str, object] = {"seconds": time.monotonic() - began}
    else:
        connection = libvirt.open("qemu:///system")
        if verb == "xml":
            answer = {"xml": connection.lookupByName(arguments[0]).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)}
        else:
            verbs: dict[str, Callable[..., dict[str, object]]] = {
                "create": create,
                "start": start,
                "migrate": migrate,
                "moved": moved,
                "remove": remove,
            }
            answer = verbs[verb](connection, *arguments)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
