"""What the host does now, from the kernel's files alone: called at every heartbeat, so it asks neither libvirt nor storage."""

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path

from trimtab_protos.messages import HostLoad

_CPU_FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_VIRTUAL_PREFIXES = ("lo", "vnet", "tap", "macvtap", "docker", "virbr", "tt-", "tn-", "tv-")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLoad:
    total_mib: int
    available_mib: int
    pressure_percent: int


class HostLoadReader:
    """Reads load; shares of CPU time are since the last reading. Thread-safe."""

    def __init__(self, proc: Path = Path("/proc"), sys_net: Path = Path("/sys/class/net")) -> None:
        self._proc = proc
        self._sys_net = sys_net
        self._lock = threading.Lock()
        self._last = self._cpu_times()

    def read(self, *, running_domains: int) -> HostLoad:
        """Return the load now."""
        with self._lock:
            before, self._last = self._last, self._cpu_times()
            spent = {name: max(0, self._last[name] - before[name]) for name in _CPU_FIELDS}
        total = sum(spent.values())
        idle = spent["idle"] + spent["iowait"]
        return HostLoad(
            cpu_used_permille=(total - idle) * 1000 // total if total else 0,
            cpu_steal_permille=spent["steal"] * 1000 // total if total else 0,
            memory_available_mib=self._memory_mib("MemAvailable:"),
            cpu_pressure=self._pressure("cpu"),
            memory_pressure=self._pressure("memory"),
            io_pressure=self._pressure("io"),
            running_domains=running_domains,
            has_uplink_carrier=self._has_uplink_carrier(),
        )

    def read_memory(self) -> MemoryLoad:
        """Return what decides about balloons."""
        return MemoryLoad(
            total_mib=self._memory_mib("MemTotal:"),
            available_mib=self._memory_mib("MemAvailable:"),
            pressure_percent=round(self._pressure("memory") / 100),
        )

    def _cpu_times(self) -> dict[str, int]:
        first_line = (self._proc / "stat").read_text().partition("\n")[0]
        return dict(zip(_CPU_FIELDS, map(int, first_line.split()[1:]), strict=False))

    def _memory_mib(self, name: str) -> int:
        for line in (self._proc / "meminfo").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) >> 10
        return 0

    def _pressure(self, resource: str) -> int:
        """Return the share of the last 10 s, in hundredths of a percent, in which something waited; 0 where the kernel does not tell."""
        with contextlib.suppress(OSError, ValueError):
            some = (self._proc / "pressure" / resource).read_text().partition("\n")[0]
            return round(100 * float(some.split("avg10=")[1].split()[0]))
        return 0

    def _has_uplink_carrier(self) -> bool:
        """Tell whether a link out of the host has carrier; a host without any link that could have one counts as connected."""
        carriers = []
        for link in self._sys_net.iterdir():
            if link.name.startswith(_VIRTUAL_PREFIXES) or (link / "bridge").is_dir():
                continue
            with contextlib.suppress(OSError):  # EINVAL: the link is administratively down
                carriers.append((link / "carrier").read_text().strip() == "1")
        return any(carriers) or not carriers
