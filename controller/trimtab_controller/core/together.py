"""Whether the backups of several vms are of one instant. Pure.

Every host fixes its vm's instant, keeps the guest still, and tells at its release whether it still was. The first release is sent after
the last guest was seen to stand still: where all were still at their release, the moment between both is common to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    vm_name: str
    is_listed: bool
    """Its backup is good."""
    problem: str
    was_held: bool
    """It stood still from its instant until it was released, and the backup that is listed is of that instant."""
    taken_ms: int
    held_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    is_consistent: bool
    problem: str
    skew_ms: int
    """Between the first and the last instant by the clocks of the hosts: for people; it proves nothing."""
    pause_ms: int
    taken_ms: int
    """Of the last member; 0 where none was taken."""


def judge(members: Sequence[Member], *, common: Sequence[str] = ()) -> Verdict:
    """Return what the members make together; `common` are problems of all."""
    problems = list(common)
    for member in members:
        if member.problem or not member.is_listed:
            problems.append(f"{member.vm_name}: {member.problem or 'its backup came to nothing'}")
        elif not member.was_held:
            problems.append(f"{member.vm_name}: it went on before all others stood still")
    taken = [member.taken_ms for member in members if member.taken_ms]
    return Verdict(
        is_consistent=bool(members) and not problems,
        problem="; ".join(problems),
        skew_ms=max(taken) - min(taken) if taken else 0,
        pause_ms=max((member.held_ms for member in members), default=0),
        taken_ms=max(taken, default=0),
    )
