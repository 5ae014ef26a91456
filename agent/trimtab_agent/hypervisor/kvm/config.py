"""What the libvirt implementation is told about its host; built once by the composition root."""

from dataclasses import dataclass
from pathlib import Path

from trimtab_agent.ballooning import DEFAULT_HIGH_PERMILLE, DEFAULT_LOW_PERMILLE


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmConfig:
    """Where libvirt is, where migrations arrive, and where this implementation may write."""

    migration_address: str
    """Numeric address that peers move guests to; never a name, since name service fails when hosts do."""
    libvirt_uri: str = "qemu:///system"
    has_tls: bool = True
    """Migrate over TLS with the certificates at libvirt's default places; off only in tests."""
    runtime_dir: Path = Path("/run/trimtab")
    """Facts that hold until the host boots: the acceleration probe's answer, offsets of console logs."""
    state_dir: Path = Path("/var/lib/trimtab")
    """What outlives a boot: the links by which bridges reached others."""
    log_dir: Path = Path("/var/log/libvirt/qemu")
    """Serial logs; libvirt's own directory, since security drivers let QEMU and virtlogd write there."""
    agent_version: str = "0"
    balloon_low_permille: int = DEFAULT_LOW_PERMILLE
    balloon_high_permille: int = DEFAULT_HIGH_PERMILLE
    """Of the host's memory that is available: below the one guests give, above the other they get back."""
