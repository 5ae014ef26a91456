"""What few vms ask for, as options of `trimtab vm create`: groups, taints, counted things, devices, cpus and pages alone, encryption."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from trimtab_controller.cli import completion
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.values import MEMORY, PairType

F = TypeVar("F", bound=Callable[..., Any])
_GIVEN = "trimtab.vm-wishes"
_PAGES_KIB = {"2MiB": 2048, "1GiB": 1 << 20}


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    ctx.meta.setdefault(_GIVEN, {})[param.name] = value
    return value


def _option(*names: str, **attributes: Any) -> Callable[[F], F]:
    """Return an option that the command is not handed: it would have more arguments than anybody reads."""
    return click.option(*names, expose_value=False, callback=_keep, **attributes)


_OPTIONS = (
    _option("--toleration", "tolerations", multiple=True, metavar="KEY[=VALUE]", help="Also on hosts with this taint; repeats."),
    _option("--resource", "counted", type=PairType("licence=1"), multiple=True, help="So much of what operators count; repeats."),
    _option("--device", "devices", multiple=True, metavar="KIND[=COUNT]", help="A PCI device such as 10de-20b0; repeats."),
    _option("--dedicated", is_flag=True, help="A cpu of its own for each vcpu, of those that hosts keep for it."),
    _option("--hugepages", type=click.Choice([*_PAGES_KIB]), help="Huge pages of this size behind all of its memory."),
    _option("--numa-cells", type=click.IntRange(1, 64), help="Take both from so many NUMA cells, in equal shares; else one."),
    _option("--balloon-min", type=MEMORY, metavar="SIZE", help="Its balloon may leave it so little while its host is short."),
    _option("--cpu-class", type=click.Choice(["low", "normal", "high"]), help="Its share of a busy host's cpus; else as any."),
    _option(
        "--drivers-iso",
        metavar="NAME",
        shell_complete=completion.names_of("images"),
        help="An image in a second drive: drivers that the installer asks for.",
    ),
    _option("--encrypt", is_flag=True, help="Its disk lies encrypted; of an image it is a copy then, not a linked clone."),
    _option("--start-group", metavar="NAME", help="After a loss vms of one start group start in order."),
    _option(
        "--start-order",
        type=click.IntRange(0, 1000),
        help="It starts once all kept ones of lower order in its group run; else 0.",
    ),
    _option("--group", metavar="NAME", shell_complete=completion.names_of("vm-groups"), help="A member of this vm group."),
    _option(
        "--secgroup",
        "secgroups",
        multiple=True,
        metavar="NAME",
        shell_complete=completion.names_of("secgroups"),
        help="What may reach it; repeats. In none, anything may.",
    ),
)


def options(function: F) -> F:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def given(ctx: click.Context) -> dict[str, Any]:
    """Return the fields of the request; None for what was not said."""
    wishes = ctx.meta[_GIVEN]
    return {
        "tolerations": [_toleration(text) for text in wishes["tolerations"]] or None,
        "resources": {resource: _count(resource, text) for resource, text in wishes["counted"]} or None,
        "devices": dict(_device(text) for text in wishes["devices"]) or None,
        "dedicated": wishes["dedicated"] or None,
        "hugepages_kib": _PAGES_KIB.get(wishes["hugepages"]),
        "numa_cells": wishes["numa_cells"],
        "balloon_min_mib": wishes["balloon_min"],
        "cpu_class": wishes["cpu_class"],
        "drivers_iso": wishes["drivers_iso"],
        "encrypted": wishes["encrypt"] or None,
        "group": wishes["group"],
        "start_group": wishes["start_group"],
        "start_order": wishes["start_order"],
        "secgroups": list(wishes["secgroups"]) or None,
    }


def _toleration(text: str) -> dict[str, str]:
    key, _, value = text.partition("=")
    return {"key": key, "value": value}


def _device(text: str) -> tuple[str, int]:
    kind, separator, count = text.partition("=")
    if separator and (not count.isdigit() or not int(count)):
        raise usage(f"--device {text}: give a whole number from 1 on, for example {kind}=1")
    return kind, int(count) if separator else 1


def _count(resource: str, text: str) -> int:
    if not text.isdigit() or not int(text):
        raise usage(f"--resource {resource}={text}: give a whole number from 1 on, for example {resource}=1")
    return int(text)
