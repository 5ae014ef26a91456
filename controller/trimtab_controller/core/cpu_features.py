"""What a list of CPU features, as a vm has it, asks of a host: the one place that reads the signs before their names. Pure.

`vmx` must be there, `-vmx` is kept from the guest, so that its host may have it or not, and `?vmx` is given to it where the host has it.
What an agent says of somebody's domain has two more, which no vm keeps: `!vmx` (libvirt's `forbid`) and `+vmx` (`force`).
"""

from collections.abc import Collection, Iterable

ALL_LISTED = "all-cpu-features"
"""Capability: the host lists all features that a guest can have there, not only those beyond its base model."""
OPTIONAL = "optional-cpu-features"
"""Capability: the agent can define a guest with `?vmx`."""
_ASK_NOTHING = ("-", "?")


def required(features: Iterable[str]) -> frozenset[str]:
    """Return what a host must have to run a guest with these."""
    return frozenset(name for name in features if not name.startswith(_ASK_NOTHING))


def missing(features: Iterable[str], own: Collection[str]) -> tuple[str, ...]:
    """Return what of it a host with the features `own` lacks, sorted."""
    return tuple(sorted(required(features).difference(own)))


def has_optional(features: Iterable[str]) -> bool:
    return any(name.startswith("?") for name in features)


def of_running(features: Iterable[str], own: Collection[str]) -> tuple[str, ...]:
    """Return the features of a guest that runs on a host with `own`: what it was given there it must find where it moves live."""
    found = ((name.removeprefix("?"), name.startswith("?")) for name in features)
    return tuple(name for name, is_optional in found if not is_optional or name in own)


def of_adopted(described: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the features of the vm that a domain becomes, and what is otherwise with them, in sentences."""
    features, changes = [], []
    for one in described:
        name = one[1:]
        if one.startswith("!"):
            changes.append(f"CPU feature {name} is disabled instead of forbidden: the vm starts also where the host has it")
            features.append(f"-{name}")
        elif one.startswith("+"):
            changes.append(f"CPU feature {name} is required instead of forced: the vm starts only where the host has it")
            features.append(name)
        else:
            features.append(one)
    return tuple(features), tuple(changes)
