"""What lies behind pools that are no directories of a host's own. As `messages.py`, which is full."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NfsSource:
    server: str
    export: str
    is_soft: bool = False
    timeout_s: int = 60
    retries: int = 2
    version: str = "4.2"


@dataclass(frozen=True, slots=True, kw_only=True)
class IscsiSource:
    portal: str
    target: str
    chap_user: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LvmSource:
    volume_group: str
    thin_pool: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RbdSource:
    monitors: tuple[str, ...]
    pool: str
    user: str
