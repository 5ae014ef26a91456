"""Asks QEMU itself, by its monitor, what libvirt has no call for. libvirt notes in the domain's log that somebody did."""

import json
from typing import Any

import libvirt_qemu

from trimtab_protos.errors import Internal


def ask(domain: Any, command: str, **arguments: object) -> Any:
    """Return QEMU's answer. Internal `monitor-refused` with its own words where it refuses."""
    text = json.dumps({"execute": command, "arguments": arguments} if arguments else {"execute": command})
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, text, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT))
    if "error" in answer:
        raise Internal("monitor-refused", f"QEMU refuses {command}: {str(answer['error'].get('desc', ''))[:300]}")
    return answer["return"]
