"""`trimtab-ipmitool`: ipmitool for Debian's fence agents, with the password from its environment instead of its arguments.

fence_ipmilan and the agents that are links to it write `-P PASSWORD` into ipmitool's command line, where every user of the machine may
read it until ipmitool has overwritten it. They take the path of the program to run, which is this one.
"""

import os
import sys
from collections.abc import Sequence

PROGRAM = "/usr/bin/ipmitool"
VARIABLE = "IPMI_PASSWORD"
"""What `ipmitool -E` reads; only the same user and root see it."""


def without_password(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that ask for the environment's password, whatever password was given. Pure."""
    kept, rest = ["-E"], iter(arguments)
    for argument in rest:
        if argument == "-P":
            next(rest, None)
        else:
            kept.append(argument)
    return kept


def main() -> None:
    os.execv(PROGRAM, [PROGRAM, *without_password(sys.argv[1:])])  # noqa: S606 as it is meant
