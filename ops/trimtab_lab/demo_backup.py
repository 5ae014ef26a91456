"""The part of the demo that backs a guest up, changes it, backs up the increment, loses it, and has it count on elsewhere."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab_lab.errors import LabError

if TYPE_CHECKING:
    from trimtab_lab.demo import Demo

REPOSITORY_URL = "file:///srv/trimtab-shared/backup"
"""In the folder that all hosts of the lab see, as an NFS mount would be."""


def show_backup(demo: "Demo", name: str, *, key_file: Path) -> None:
    """Needs a running guest; leaves `NAME-again` on another host than the guest was on."""
    restored = f"{name}-again"
    demo.say(f"{name} is backed up while it runs; its changes are backed up; it is deleted, and comes back on another host")
    key_file.unlink(missing_ok=True)
    demo.trimtab("backup", "repo", "create", "main", "--url", REPOSITORY_URL, "--key-file", str(key_file))
    demo.wait_for_ticks(name, at_least=1)
    demo.trimtab("backup", "run", name)
    counted = demo.wait_for_ticks(name, at_least=3)
    demo.trimtab("backup", "run", name)
    demo.trimtab("backup", "list", "--vm", name)
    newest = json.loads(demo.trimtab("backup", "list", "--vm", name, "-o", "json", quiet=True))[0]["id"]
    demo.trimtab("backup", "verify", newest)
    home = json.loads(demo.trimtab("vm", "get", name, "-o", "json", quiet=True))["host"]
    hosts = json.loads(demo.trimtab("host", "list", "-o", "json", quiet=True))
    elsewhere = next(host["name"] for host in hosts if host["name"] != home and host["connectivity"] == "up")
    demo.trimtab("vm", "delete", name, "--yes")
    demo.trimtab("backup", "restore", newest, "--as", restored, "--to", elsewhere)
    demo.wait_for_ticks(restored, at_least=counted)
    demo.trimtab("backup", "status")
    # A guest that had lost its counter would come to that number too, by counting from the beginning.
    first = demo.first_tick(restored)
    if first <= counted:
        raise LabError(f"{name} counted {counted} when its increment was taken, and {restored} began with {first}")
    demo.say(
        f"{name} counted {counted} when its increment was taken; as {restored} on {elsewhere} it went on with {first}: nothing was lost"
    )
