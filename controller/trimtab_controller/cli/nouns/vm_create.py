"""`trimtab vm create`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from trimtab_controller.cli import completion, humanise, options, resources
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.nouns import vm_wishes
from trimtab_controller.cli.nouns.templates import create_from_template
from trimtab_controller.cli.nouns.vm_views import COLUMNS, describe, outcome
from trimtab_controller.cli.render import Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import DISK_SIZE, MEMORY, DurationType, NicType, NicWish, PairType

# The controller's bound of one cloud-init document.
_SEED_BYTES_MAX = 64 << 10
_TEMPLATE = "trimtab.template"
F = TypeVar("F", bound=Callable[..., Any])
_file = click.Path(exists=True, dir_okay=False, readable=True, allow_dash=True, path_type=Path)


def _keep_for_template(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None:
        ctx.meta.setdefault(_TEMPLATE, {})[str(parameter.name)] = value


def _template_options(function: F) -> F:
    """Add what only vms of a template take; `_of_template` reads it, so that it is no parameter of every create."""
    kept: dict[str, Any] = {"expose_value": False, "callback": _keep_for_template}
    for option in (
        click.option("--name-pattern", metavar="PATTERN", help="Their names, {n} the number: web-{n}.", **kept),
        click.option("--count", type=click.IntRange(1, 100), help="So many vms of the template.", **kept),
        click.option(
            "--template",
            metavar="NAME[@REVISION]",
            help="A template; of the rest --pool, --to and --no-start go with it.",
            **kept,
        ),
    ):
        function = option(function)
    return function


@click.command()
@click.argument("name", required=False, default="")
@_template_options
@click.option("--image", metavar="NAME", shell_complete=completion.names_of("images"), help="Boot from a clone of this image.")
@click.option("--volume", metavar="NAME", shell_complete=completion.names_of("volumes"), help="Boot from this volume instead.")
@click.option("--iso", metavar="NAME", shell_complete=completion.names_of("images"), help="Install from this image, onto --disk.")
@click.option("--os", "guest_os", metavar="NAME", help="linux, windows, generic, or a name of osinfo's such as win11, debian12.")
@click.option("--tpm", is_flag=True, help="A TPM 2.0; the vm then starts on one host, and moves by live migration only.")
@click.option("--secure-boot", is_flag=True, help="UEFI that starts signed systems only.")
@click.option("--vcpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="Virtual CPUs.")
@click.option("--vcpus-max", type=click.IntRange(1, 1024), help="So many may be added while it runs.")
@click.option("--memory", type=MEMORY, metavar="SIZE", help="For example 96MiB, 2GiB; else what --os wants.")
@click.option("--memory-max", type=MEMORY, metavar="SIZE", help="So much may be given while it runs.")
@click.option("--disk", type=DISK_SIZE, metavar="SIZE", help="Size of the boot disk, for example 20GiB; else the image's.")
@click.option("--pool", metavar="NAME", shell_complete=completion.names_of("pools"), help="Where its disks live.")
@click.option(
    "--network", "nics", type=NicType(), multiple=True, shell_complete=completion.names_of("networks"), help="A nic; repeats."
)
@click.option("--firmware", type=click.Choice(["bios", "uefi"]), help="bios unless told otherwise.")
@click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), help="x86_64 unless told otherwise.")
@click.option("--cpu-model", metavar="MODEL", help="A named CPU model; else the host class's.")
@click.option("--host-class", metavar="NAME", shell_complete=completion.names_of("host-classes"), help="A class of hosts.")
@click.option("--select", "selects", type=PairType("rack=r2"), multiple=True, help="Only hosts with this label; repeats.")
@click.option("--to", "to_host", metavar="HOST", shell_complete=completion.names_of("hosts"), help="On this host, or not at all.")
@vm_wishes.options
@click.option("--ha", type=click.Choice(["restart", "none"]), help="Whether it restarts elsewhere when its host dies; else none.")
@click.option("--priority", type=click.IntRange(-1000, 1000), help="Higher ones restart first; else 0.")
@click.option(
    "--start-delay",
    "start_delay_s",
    type=DurationType(maximum="1d", example="30s"),
    help="Restart it so long after its host was proven off, in a start group after those before it; else 0s.",
)
@click.option("--label", "labels", type=PairType("tier=web"), multiple=True, help="A label; repeats.")
@click.option("--hostname", metavar="NAME", help="By cloud-init; else the vm's name.")
@click.option("--user-data", type=_file, metavar="FILE", help="A cloud-init user-data document.")
@click.option("--network-config", type=_file, metavar="FILE", help="A cloud-init network-config document.")
@click.option(
    "--ssh-key", "ssh_keys", type=_file, multiple=True, metavar="FILE", help="Public keys for the default user; repeats."
)
@click.option("--start/--no-start", "start", default=True, help="Start it once it is made (default).")
@options.runs
@click.pass_obj
def create(
    session: Session,
    name: str,
    image: str | None,
    volume: str | None,
    iso: str | None,
    guest_os: str | None,
    tpm: bool,
    secure_boot: bool,
    vcpus: int,
    vcpus_max: int | None,
    memory: int | None,
    memory_max: int | None,
    disk: int | None,
    pool: str | None,
    nics: Sequence[NicWish],
    firmware: str | None,
    arch: str | None,
    cpu_model: str | None,
    host_class: str | None,
    selects: Sequence[tuple[str, str]],
    to_host: str | None,
    ha: str | None,
    priority: int | None,
    start_delay_s: int | None,
    labels: Sequence[tuple[str, str]],
    hostname: str | None,
    user_data: Path | None,
    network_config: Path | None,
    ssh_keys: Sequence[Path],
    start: bool,
) -> None:
    """Create a vm, place it and start it.

    trimtab vm create web1 --image debian --vcpus 2 --memory 2GiB --network default

    trimtab vm create win1 --iso win11 --os windows --disk 60GiB --tpm --secure-boot
    """
    _check_source(name, image, volume, iso, memory=memory, guest_os=guest_os, disk=disk)
    if _of_template(session, name, (image, volume, iso, memory, disk, nics, firmware), pool=pool, to_host=to_host, start=start):
        return
    optional: dict[str, Any] = {
        "image": image,
        "volume": volume,
        "iso": iso,
        "os": guest_os,
        "tpm": tpm or None,
        "secure_boot": secure_boot or None,
        "vcpus_max": vcpus_max,
        "memory_max_mib": memory_max,
        "disk_bytes": disk,
        "pool": pool,
        "firmware": firmware,
        "arch": arch,
        "cpu_model": cpu_model,
        "host_class": host_class,
        "to_host": to_host,
        **_survival(ha, priority, start_delay_s),
        "labels": dict(labels) or None,
        "host_selector": dict(selects) or None,
        "networks": [nic.as_json() for nic in nics] or None,
        "seed": _seed(hostname=hostname, user_data=user_data, network_config=network_config, ssh_keys=ssh_keys) or None,
        **vm_wishes.given(click.get_current_context()),
    }
    _create(session, name, {"name": name, "vcpus": vcpus, "start": start} | _given({"memory_mib": memory, **optional}))


def _given(optional: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in optional.items() if value is not None}


def _of_template(
    session: Session, name: str, others: Sequence[object], *, pool: str | None, to_host: str | None, start: bool
) -> bool:
    """Carry out a create that names a template; tell whether it did."""
    given = click.get_current_context().meta.get(_TEMPLATE, {})
    if "template" not in given:
        if given:
            raise usage(f"--{next(iter(given)).replace('_', '-')} goes with --template, for example --template web")
        return False
    if any(others):
        raise usage("--template brings image, shape and networks; leave those options out")
    create_from_template(
        session,
        given["template"],
        name=name,
        count=given.get("count"),
        name_pattern=given.get("name_pattern", ""),
        pool=pool,
        to_host=to_host,
        start=start,
    )
    return True


def _survival(ha: str | None, priority: int | None, start_delay_s: int | None) -> dict[str, Any]:
    return {"ha": ha, "priority": priority, "start_delay_s": start_delay_s}


def _check_source(
    name: str,
    image: str | None,
    volume: str | None,
    iso: str | None,
    *,
    memory: int | None,
    guest_os: str | None,
    disk: int | None,
) -> None:
    if _TEMPLATE in click.get_current_context().meta:
        return
    if not name:
        raise usage("give a name, for example trimtab vm create web1 --image debian --memory 2GiB")
    if memory is None and not guest_os:
        raise usage("give --memory, or --os and its own word counts, for example --memory 2GiB", hint="trimtab vm create --help")
    if [bool(image), bool(volume), bool(iso)].count(True) != 1:
        raise usage("give either --image, --volume or --iso, for example --image debian", hint="trimtab image list")
    if iso and disk is None:
        raise usage("--iso needs --disk, the size of the disk to install onto, for example --disk 20GiB")


def _created(item: Document, *, guest_os: str) -> str:
    """Return the sentence after a create; where the system (`guest_os`) chose the memory, how much."""
    memory_mib = (item.get("shape") or {}).get("memory_mib")
    chosen = f"; {humanise.mib(memory_mib)} of memory, as {guest_os} wants" if guest_os and memory_mib else ""
    return outcome(item) + chosen


def _create(session: Session, name: str, body: dict[str, Any]) -> None:
    chooser = "" if "memory_mib" in body else str(body.get("os", ""))
    vm = Resource(noun="vm", collection="vms", columns=COLUMNS, describe=describe)
    try:
        resources.run(
            session,
            "POST",
            vm.place(session),
            body,
            reread=lambda: resources.read(session, vm, name),
            sentence=lambda item: _created(item, guest_os=chooser),
            resource=vm,
        )
    except CommandFailed as error:
        # The vm is undone, so that only its operation can still say why no host would have it.
        if error.kind == "no_capacity" and error.operation_id:
            error.hint = f"trimtab op explain {error.operation_id}"
        raise


def _seed(
    *, hostname: str | None, user_data: Path | None, network_config: Path | None, ssh_keys: Sequence[Path]
) -> dict[str, Any]:
    seed: dict[str, Any] = {}
    if hostname:
        seed["hostname"] = hostname
    if user_data is not None:
        seed["user_data"] = _document(user_data, "--user-data")
    if network_config is not None:
        seed["network_config"] = _document(network_config, "--network-config")
    lines = [line.strip() for path in ssh_keys for line in _document(path, "--ssh-key").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if any("PRIVATE KEY" in key for key in keys):
        raise usage("--ssh-key: this is a private key; give the public one, for example ~/.ssh/id_ed25519.pub")
    if keys:
        seed["ssh_keys"] = keys
    elif ssh_keys:
        raise usage("--ssh-key: there is no key in the file; give a public one, for example ~/.ssh/id_ed25519.pub")
    return seed


def _document(path: Path, option: str) -> str:
    with click.open_file(str(path), "rb") as stream:
        content: bytes = stream.read(_SEED_BYTES_MAX + 1)
    if len(content) > _SEED_BYTES_MAX:
        raise usage(f"{option}: {path} is larger than {_SEED_BYTES_MAX >> 10} KiB; let it fetch the rest, as by #include")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise usage(f"{option}: {path} is not UTF-8 text (byte {error.start})") from error
