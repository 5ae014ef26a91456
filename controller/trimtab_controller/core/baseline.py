"""The machine type and CPU model that every host of a class can run: what keeps live migration possible inside it. Pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimtab_protos.messages import Inventory

# Best first: more features, at equal reach. Only models that QEMU 7.2 and later know; under TCG the last ones are left.
PREFERRED_MODELS: tuple[str, ...] = (
    "EPYC-Milan",
    "EPYC-Rome",
    "EPYC",
    "Icelake-Server",
    "Cascadelake-Server",
    "Skylake-Server",
    "Broadwell",
    "Haswell",
    "IvyBridge",
    "SandyBridge",
    "Westmere",
    "Nehalem",
    "qemu64",
)

_Q35 = re.compile(r"pc-q35-(\d+)\.(\d+)$")


@dataclass(frozen=True, slots=True)
class Baseline:
    machine: str
    cpu_model: str


def common_baseline(inventories: Iterable[Inventory]) -> Baseline | None:
    """Return the newest machine type and best named model that all of these hosts run; None where they share none."""
    known = list(inventories)
    if not known:
        return None
    machines = set.intersection(*(set(one.machines) for one in known))
    models = set.intersection(*(set(one.usable_cpu_models) for one in known))
    machine = newest_q35(sorted(machines))
    model = next((model for model in PREFERRED_MODELS if model in models), min(models, default=""))
    return Baseline(machine, model) if machine and model else None


def newest_q35(machines: Sequence[str]) -> str:
    """Return the newest concrete q35 type; aliases such as `q35` are not types."""
    numbered = [(tuple(int(part) for part in match.groups()), name) for name in machines if (match := _Q35.fullmatch(name))]
    return max(numbered)[1] if numbered else ""
