"""A model of a backup archive, as far as two scenarios of failover speak of it (I9). The real one has its own suite."""

import hashlib
from dataclasses import dataclass, field


@dataclass
class Copy:
    body: bytearray
    digest: str
    parent: "Copy | None" = None
    status: str = "unverified"


@dataclass
class Archive:
    copies: list[Copy] = field(default_factory=list)
    lock_trace: list[str] = field(default_factory=list)

    def __init__(self, *, copies: int) -> None:
        self.copies, self.lock_trace = [], []
        for number in range(copies):
            body = bytearray(f"block {number} ".encode() * 64)
            self.copies.append(Copy(body, hashlib.sha256(body).hexdigest()))

    def flip_a_byte(self, *, newest: bool) -> None:
        self.copies[-1 if newest else 0].body[7] ^= 0xFF

    def verify(self) -> None:
        """A copy is good only after it was read back; a bad member marks its children."""
        for copy in self.copies:
            is_whole = hashlib.sha256(copy.body).hexdigest() == copy.digest
            is_rooted = copy.parent is None or copy.parent.status == "good"
            copy.status = "good" if is_whole and is_rooted else "bad"

    def prune(self, *, keep: int) -> None:
        """Delete the oldest beyond `keep`, but never the last good one."""
        while len(self.copies) > keep:
            good = [copy for copy in self.copies if copy.status == "good"]
            victim = next((copy for copy in self.copies if good != [copy]), None)
            if victim is None:
                return
            self.copies.remove(victim)

    def restore_in_place(self, *, is_running: bool) -> str:
        if is_running:
            return "refused: the vm runs; stop it first"
        self.lock_trace.append("locked")
        self.lock_trace += ["wrote", "wrote"]
        self.lock_trace.append("unlocked")
        return "restored"
