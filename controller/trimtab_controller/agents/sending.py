"""What the groups of verbs are mixed into: whatever sends a message to an agent."""

from abc import ABC, abstractmethod
from typing import Any

from trimtab_protos.errors import Unavailable
from trimtab_protos.messages import CommandKey


class Sender(ABC):
    @abstractmethod
    def _command(self, host_id: str, verb: str, request: Any, key: CommandKey, *, timeout_s: float = 10.0) -> Any:
        """Send what is recorded under its key."""

    @abstractmethod
    def _call(self, host_id: str, verb: str, request: Any, *, timeout_s: float = 10.0, waits_for_agent: bool = False) -> Any:
        """Send a question. `waits_for_agent`: one that is just starting anew has until the deadline to be there."""

    @abstractmethod
    def _give_secrets(self, host_id: str, subject_id: str) -> None:
        """Give the host the keys of the subject's volumes and the secrets of their pools, where there are any."""


def no_key(_sealed: str, _place: str) -> str:
    """Open nothing: for a client that was given no key."""
    raise Unavailable("secrets-not-kept", "this process was given no key, so it can open no repository's")
