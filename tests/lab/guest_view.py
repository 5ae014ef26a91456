"""What a guest itself sees, asked through its agent: nothing that libvirt or the control plane believes."""

import base64
import json
from collections.abc import Mapping

from tests.lab.kvm_guests import until
from trimtab_lab.hosts import Lab

# A guest counts before its agent is up, and boots for minutes on a busy machine.
AGENT_S = 240.0


def guest_says(lab: Lab, host: str, vm_id: str, script: str) -> str:
    """Return what a shell inside the guest prints, once its agent answers."""
    return domain_says(lab, host, f"trimtab-{vm_id}", script)


def domain_says(lab: Lab, host: str, domain: str, script: str) -> str:
    """As `guest_says`, of a guest whose domain has a name of its own."""
    command = {"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg": ["-c", script], "capture-output": True}}
    started = until(lambda: _ask(lab, host, domain, command), what="the guest's agent to answer", deadline_s=AGENT_S)
    process_id = started["pid"]

    def ended() -> dict[str, object] | None:
        seen = _ask(lab, host, domain, {"execute": "guest-exec-status", "arguments": {"pid": process_id}})
        return seen if seen is not None and seen["exited"] else None

    answer = until(ended, what=f"the guest to run {script!r}", deadline_s=AGENT_S)
    return base64.b64decode(str(answer.get("out-data", ""))).decode().strip()


def begins(lab: Lab, host: str, vm_id: str, script: str) -> bool:
    """Have a shell inside the guest begin, and wait for nothing; tell whether the guest said that it has."""
    asked = {"path": "/bin/sh", "arg": ["-c", script]}
    return _ask(lab, host, f"trimtab-{vm_id}", {"execute": "guest-exec", "arguments": asked}) is not None


def _ask(lab: Lab, host: str, domain: str, command: Mapping[str, object]) -> dict[str, object] | None:
    asked = lab.run(host, ["virsh", "qemu-agent-command", domain, json.dumps(command), "--timeout", "10"], check=False)
    return dict(json.loads(asked.stdout)["return"]) if asked.returncode == 0 else None


def online_cpus(lab: Lab, host: str, vm_id: str) -> int:
    return int(guest_says(lab, host, vm_id, "grep -c ^processor /proc/cpuinfo") or 0)


def memory_mib(lab: Lab, host: str, vm_id: str) -> int:
    return int(guest_says(lab, host, vm_id, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo") or 0) // 1024


def available_mib(lab: Lab, host: str, vm_id: str) -> int:
    script = "sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"
    return int(guest_says(lab, host, vm_id, script) or 0) // 1024


def disk_mib(lab: Lab, host: str, vm_id: str, serial: str) -> int:
    """Return the size of the disk with this serial number as the guest sees it; 0 for one that it does not see."""
    script = f'for d in /sys/block/*; do [ "$(cat $d/serial 2>/dev/null)" = {serial} ] && cat $d/size; done'
    return int(guest_says(lab, host, vm_id, script) or 0) // 2048


def has_card(lab: Lab, host: str, vm_id: str, mac: str) -> bool:
    return mac in guest_says(lab, host, vm_id, "cat /sys/class/net/*/address").split()
