"""`trimtab backup export`."""

from pathlib import Path

import click

from trimtab_controller.cli import backup_file, completion, humanise, options, render, resources, waiting
from trimtab_controller.cli.errors import usage
from trimtab_controller.cli.nouns.backup_views import BACKUP
from trimtab_controller.cli.session import Session

_FORMATS = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw"}


@click.command()
@click.argument("backup_id", metavar="BACKUP", shell_complete=completion.names_of("backups"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--disk", metavar="NAME", help="As the vm names it; else the first.")
@click.option("--format", "image_format", type=click.Choice(["qcow2", "raw"]), help="Else as FILE ends: .qcow2, .raw or .img.")
@options.runs
@click.pass_obj
def export(session: Session, backup_id: str, file: Path, disk: str | None, image_format: str | None) -> None:
    """Read a disk of a backup out as a file that any QEMU opens. A run that broke off is gone on with.

    \b
    trimtab backup export bk-… out.qcow2 [--disk vdb]
    """
    chosen = image_format or _FORMATS.get(file.suffix)
    if chosen is None:
        raise usage(f"give --format qcow2 or raw: {file.name} ends with neither .qcow2 nor .raw nor .img")
    if file.exists():
        raise usage(f"{file} exists; name a file that does not")
    place = BACKUP.place(session, backup_id)

    def reopen() -> None:
        answer = resources.change(session, "POST", BACKUP.place(session, backup_id, verb="export"))
        waiting.until_done(session, answer["operation"])

    if session.is_dry_run:
        resources.change(session, "POST", BACKUP.place(session, backup_id, verb="export"))
        render.say(f"dry run: {file} would be made of {backup_id}")
        return
    reopen()
    told = [0]

    def progress(done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if percent >= told[0] + 10:
            told[0] = percent // 10 * 10
            render.say(f"{percent} % of {humanise.size(total)}")

    partial = file.with_name(f"{file.name}.{backup_id}-{disk or 'first'}.part")
    digest = backup_file.receive(
        lambda offset: session.client.get(f"{place}/file", {"disk": disk or "", "format": chosen, "offset": offset}),
        reopen,
        partial,
        on_progress=progress,
    )
    partial.rename(file)
    render.write_line(f"{digest}  {file}")
