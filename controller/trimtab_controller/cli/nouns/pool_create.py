"""`trimtab pool create`, which has the options of every kind."""

from collections.abc import Callable
from typing import IO, Any, TypeVar

import click

from trimtab_controller.cli import options, resources
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session

F = TypeVar("F", bound=Callable[..., Any])
_KINDS = ("dir", "nfs", "iscsi", "lvm-thin", "rbd")


_OPTIONS = (
    click.option(
        "--path",
        metavar="DIRECTORY",
        help="The same on each host, for example /var/lib/trimtab/pools/fast; of nfs what the server exports.",
    ),
    click.option(
        "--type",
        "--kind",
        "kind",
        type=click.Choice(_KINDS),
        default="dir",
        show_default=True,
        help="A directory, an NFS export that each host mounts, LUNs, a thin pool of LVM's, a Ceph pool.",
    ),
    click.option("--server", metavar="HOST", help="Of nfs: its server, a name or an address."),
    click.option(
        "--soft", "is_soft", is_flag=True, help="Of nfs: let writes fail when the server is gone; else guests wait for it."
    ),
    click.option("--nfs-timeout", "timeout_s", type=click.IntRange(1, 600), metavar="SECONDS", help="Of nfs: of one try; 60."),
    click.option("--retries", type=click.IntRange(1, 100), help="Of nfs: tries until a soft mount gives up; 2."),
    click.option("--nfs-version", type=click.Choice(["3", "4.0", "4.1", "4.2"]), help="Of nfs: 4.2."),
    click.option("--portal", metavar="HOST[:PORT]", help="Of iscsi: where the target is; port 3260."),
    click.option("--target", metavar="IQN", help="Of iscsi: its name."),
    click.option("--chap-user", metavar="NAME", help="Of iscsi: with --secret-file, where the target asks for a password."),
    click.option("--vg", "volume_group", metavar="NAME", help="Of lvm-thin: its volume group, the same on each host."),
    click.option("--thin-pool", metavar="NAME", help="Of lvm-thin: its thin pool; thin."),
    click.option("--monitor", "monitors", multiple=True, metavar="HOST[:PORT]", help="Of rbd: a monitor; repeats."),
    click.option("--ceph-pool", metavar="NAME", help="Of rbd: the cluster's pool."),
    click.option("--ceph-user", metavar="NAME", help="Of rbd: without `client.`."),
    click.option(
        "--secret-file", type=click.File("r"), metavar="FILE", help="Password of --chap-user, or key of --ceph-user; - reads it."
    ),
    click.option("--reserve", type=click.FloatRange(0, 90), metavar="PERCENT", help="What placement leaves free; 5."),
    click.option(
        "--shared", "is_shared", is_flag=True, help="One storage that all hosts see; it counts once each has proved it."
    ),
    click.option("--default", "is_default", is_flag=True, help="Where disks go that name no pool."),
)


def _with_options(function: F) -> F:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def add_to(group: click.Group, resource: Resource) -> None:
    """Add the command to `trimtab pool`."""

    @group.command("create")
    @click.argument("name")
    @_with_options
    @options.runs
    @click.pass_obj
    def create_pool(
        session: Session, /, name: str, kind: str, reserve: float | None, secret_file: IO[str] | None, **wishes: Any
    ) -> None:
        """Make a directory on the hosts, or storage in the network, a pool.

        trimtab pool create share --type nfs --server nas --path /vms

        trimtab pool create san --type iscsi --portal 10.0.0.5 --target iqn.2026-01.example:san
        """
        if kind in {"dir", "nfs"} and not wishes["path"]:
            raise usage("give --path, for example --path /var/lib/trimtab/pools/fast")
        if kind == "lvm-thin":
            wishes["thin_pool"] = wishes["thin_pool"] or "thin"
        given = {key: value for key, value in wishes.items() if value not in (None, False, ())}
        body: dict[str, Any] = {"name": name, "kind": kind.replace("-", "_"), **given}
        if "monitors" in body:
            body["monitors"] = list(body["monitors"])
        if secret_file is not None:
            body["secret"] = secret_file.read().strip()
        if reserve is not None:
            body["reserve_permille"] = round(reserve * 10)
        resources.run(
            session,
            "POST",
            resource.place(session),
            body,
            reread=lambda: resources.read(session, resource, name),
            sentence=lambda _: f"pool {name} is ready",
            resource=resource,
        )
