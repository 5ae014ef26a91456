"""From where pools are mounted. As `messages.py`, which is full."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NfsSource:
    server: str
    export: str
    is_soft: bool = False
    timeout_s: int = 60
    retries: int = 2
    version: str = "4.2"
