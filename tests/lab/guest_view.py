"""What a guest itself sees, asked through its agent: nothing that libvirt or the control plane believes."""

import base64
import json

from tests.lab.kvm_guests import until
from trimtab_lab.hosts import Lab


def guest_says(lab: Lab, host: str, vm_id: str, script: str) -> str:
    """Return what a shell inside the guest prints; '' while its agent does not answer."""
    started = _ask(lab, host, vm_id, {"execute": "guest-exec", "arguments": {
        "path": "/bin/sh", "arg": ["-c", script], "capture-output": True,
    }})  # fmt: skip
    if started is None:
        return ""
    process_id = started["pid"]

    def ended() -> dict[str, object] | None:
        seen = _ask(lab, host, vm_id, {"execute": "guest-exec-status", "arguments": {"pid": process_id}})
        return seen if seen is None or seen["exited"] else None

    answer = until(ended, what=f"the guest to run {script!r}")
    return base64.b64decode(str(answer.get("out-data", "") if answer else "")).decode().strip()


def _ask(lab: Lab, host: str, vm_id: str, command: dict[str, object]) -> dict[str, object] | None:
    asked = lab.run(
        host, ["virsh", "qemu-agent-command", f"trimtab-{vm_id}", json.dumps(command), "--timeout", "10"], check=False
    )
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
