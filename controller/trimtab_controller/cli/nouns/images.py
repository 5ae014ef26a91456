"""`trimtab image`: bootable sources. A file is sent as it is read; it is never in memory as a whole."""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from trimtab_controller.cli import completion, humanise, options, resources
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.render import Column, Document
from trimtab_controller.cli.resources import Resource
from trimtab_controller.cli.session import Session
from trimtab_controller.cli.values import PairType
from trimtab_controller.cli.waiting import ProgressLine, transfer_parts

_FORMATS = ("qcow2", "raw", "iso")
_QCOW2_MAGIC = b"QFI\xfb"
_ISO_MAGIC, _ISO_MAGIC_AT = b"CD001", 0x8001
# The rate shown is that of the last seconds, not of the whole upload.
_RATE_WINDOW_S = 3.0
_DRAW_EACH_S = 0.1


def _created(item: Document, now: datetime) -> str:
    return humanise.since(item.get("created_at"), now)


def _size(item: Document, _now: datetime) -> str:
    return humanise.size(item.get("virtual_size_bytes"))


def _file_size(item: Document, _now: datetime) -> str:
    return humanise.size(item.get("file_size_bytes"))


def _replicas(item: Document) -> str:
    return ",".join(
        f"{one.get('pool', '')}{'@' + one['host'] if one.get('host') else ''}:{one.get('state') or 'unknown'}"
        for one in item.get("replicas") or []
    )


IMAGE = Resource(
    noun="image",
    collection="images",
    columns=(
        Column("name", "name"),
        Column("state", "state"),
        Column("kind", "kind"),
        Column("format", "format"),
        Column("size", "virtual_size_bytes", _size),
        Column("file", "file_size_bytes", _file_size),
        Column("created", "created_at", _created),
        Column("id", "id", is_wide=True),
        Column(
            "project",
            "project",
            lambda item, _now: "shared" if item.get("is_shared") else str(item.get("project") or ""),
            is_wide=True,
        ),
        Column("sha256", "source_sha256", is_wide=True),
        Column("replicas", "replicas", lambda item, _now: _replicas(item), is_wide=True),
        Column("labels", "labels", is_wide=True),
    ),
)

_name = click.argument("name", shell_complete=completion.names_of("images"))


@click.group()
def image() -> None:
    """Images that vms boot from."""


@image.command("list")
@options.lists
@click.pass_obj
def list_images(session: Session) -> None:
    """List images. Filter by name, state, kind."""
    resources.list_all(session, IMAGE)


@image.command("get")
@_name
@options.reads
@click.pass_obj
def get_image(session: Session, name: str) -> None:
    """Show an image and where it is."""
    resources.get_one(session, IMAGE, name)


@image.command("delete")
@_name
@options.destroys
@options.runs
@click.pass_obj
def delete(session: Session, name: str) -> None:
    """Delete an image that nothing depends on."""
    session.confirm(f"Delete image {name} of project {session.project}?")
    resources.run(session, "DELETE", IMAGE.place(session, name), sentence=lambda _: f"image {name} deleted")


@image.command("import")
@click.argument("name")
@click.argument("source", metavar="FILE|URL")
@click.option(
    "--format", "image_format", type=click.Choice(_FORMATS), help="Else told by the file's first bytes, or the URL's name."
)
@click.option("--kind", type=click.Choice(["disk", "iso"]), help="What it shall be; a file that is another is refused.")
@click.option("--sha256", metavar="HEX", help="Refuse other content than this; needed for a URL.")
@click.option("--pool", metavar="NAME", shell_complete=completion.names_of("pools"), help="The pool that takes it.")
@click.option("--shared", "is_shared", is_flag=True, help="For all projects.")
@click.option("--on-host", metavar="HOST", shell_complete=completion.names_of("hosts"),
              help="FILE is the name of one in the import folder of this host's agent.")  # fmt: skip
@click.option("--label", "labels", type=PairType("os=debian"), multiple=True, help="A label; repeats.")
@options.runs
@click.pass_obj
def import_image(
    session: Session,
    name: str,
    source: str,
    image_format: str | None,
    kind: str | None,
    sha256: str | None,
    pool: str | None,
    is_shared: bool,
    on_host: str | None,
    labels: Sequence[tuple[str, str]],
) -> None:
    """Make an image of a file (which is uploaded) or of an https URL (which a host fetches).

    trimtab image import debian ./debian-12.qcow2

    trimtab image import win11 ./win11.iso --kind iso
    """
    image_format = _format_of_kind(kind, image_format)
    digest = _checked_sha256(sha256)
    body: dict[str, Any] = {"name": name}
    if labels:
        body["labels"] = dict(labels)
    if pool:
        body["pool"] = pool
    if is_shared:
        body["is_shared"] = True
    if on_host:
        body.update(_content(image_format or _format_of_name(source)), source={"host": on_host, "file_name": source})
        _accept(session, name, body)
        return
    if "://" in source:
        url = _checked_url(source)
        if not digest:
            raise usage("--sha256: needed for a URL, since what comes from it is trusted by nothing else", code="sha256-missing")
        body.update(_content(image_format or _format_of_name(url)), source={"url": url, "sha256": digest})
        _accept(session, name, body)
        return
    path = Path(source)
    chosen = image_format or _format_of_file(path)
    _refuse_taken_name(session, name)
    if session.is_dry_run:
        resources.show_dry_run(session, {}, f"image.import {name}; the file itself is checked when it is sent")
        return
    upload = _upload(session, name, path, digest)
    body.update(_content(chosen), source={"upload_id": upload["upload_id"]})
    _accept(session, name, body)


def _accept(session: Session, name: str, body: Mapping[str, Any]) -> None:
    resources.run(
        session,
        "POST",
        IMAGE.place(session),
        body,
        reread=lambda: resources.read(session, IMAGE, name),
        sentence=lambda item: (
            f"image {name} is {item.get('state', 'ready')}"
            + (f", {humanise.size(item['virtual_size_bytes'])}" if item.get("virtual_size_bytes") else "")
        ),
        resource=IMAGE,
    )


def _content(image_format: str) -> dict[str, str]:
    return {"kind": "iso" if image_format == "iso" else "disk", "format": image_format}


def _refuse_taken_name(session: Session, name: str) -> None:
    """Say it before gigabytes are sent; the controller checks it again."""
    try:
        resources.read(session, IMAGE, name)
    except CommandFailed as error:
        if error.kind == "not_found" and error.code != "project-not-found":
            return
        raise
    raise CommandFailed(
        f"there is an image {name} in project {session.project} already; images are never overwritten",
        code="image-exists",
        kind="already_exists",
        hint=f"trimtab image get {name}",
    )


def send_file(session: Session, name: str, path: Path) -> str:
    """Send a file for the image that is to be called `name`; return the id of the upload."""
    _refuse_taken_name(session, name)
    return str(_upload(session, name, path, "")["upload_id"])


def _upload(session: Session, name: str, path: Path, sha256: str) -> Mapping[str, Any]:
    try:
        with path.open("rb") as stream:
            size_bytes = path.stat().st_size
            meter = _Meter(session, name, size_bytes)
            place = IMAGE.place(session).rpartition("/")[0] + "/uploads"
            try:
                answer: Mapping[str, Any] = session.client.upload(
                    place, stream, size_bytes=size_bytes, query={"name": name}, sha256=sha256, on_progress=meter.at
                )
            finally:
                meter.close()
    except OSError as error:
        raise usage(f"FILE: cannot read {path}: {error.strerror}", code="file-unreadable") from error
    return answer


class _Meter:
    """Shows how an upload gets on."""

    def __init__(self, session: Session, name: str, total_bytes: int) -> None:
        self._line = ProgressLine(session)
        self._name = name
        self._total_bytes = total_bytes
        self._marks = [(time.monotonic(), 0)]
        self._drawn_at = 0.0

    def at(self, sent_bytes: int) -> None:
        now = time.monotonic()
        if now - self._drawn_at < _DRAW_EACH_S and sent_bytes < self._total_bytes:
            return
        self._drawn_at = now
        self._marks = [*(mark for mark in self._marks[:-1] if now - mark[0] < _RATE_WINDOW_S), self._marks[-1], (now, sent_bytes)]
        (then, before), elapsed = self._marks[0], max(1e-3, now - self._marks[0][0])
        rate = (sent_bytes - before) / elapsed if now > then else 0.0
        progress = {
            "done_bytes": sent_bytes,
            "total_bytes": self._total_bytes,
            "rate_bytes_s": rate,
            "remaining_s": (self._total_bytes - sent_bytes) / rate if rate > 0 else 0,
        }
        self._line.update("  ".join([f"sending {self._name}", *transfer_parts(progress)]), "sending")

    def close(self) -> None:
        self._line.clear()


def _format_of_kind(kind: str | None, image_format: str | None) -> str | None:
    """Return the format that follows from kind and format: an ISO is an ISO, whatever its name."""
    if kind == "iso" and image_format in {None, "iso"}:
        return "iso"
    if kind is not None and image_format is not None and (kind == "iso") != (image_format == "iso"):
        raise usage(f"--format {image_format} is not of kind {kind}; leave one of them out", code="format-wrong")
    return image_format


def _format_of_file(path: Path) -> str:
    """Tell a file's format by its magic, so that a user need not; the controller takes it as declared and checks it strictly.

    A raw disk can be made to look like qcow2 by whoever wrote it: where that matters, give --format.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
            stream.seek(_ISO_MAGIC_AT)
            is_iso = stream.read(len(_ISO_MAGIC)) == _ISO_MAGIC
    except OSError as error:
        raise usage(f"FILE: cannot read {path}: {error.strerror}", code="file-unreadable") from error
    if head == _QCOW2_MAGIC:
        return "qcow2"
    if is_iso and path.suffix.lower() == ".iso":
        return "iso"
    if path.suffix.lower() in {".raw", ".img", ".dd", ""}:
        return "raw"
    raise usage(
        f"FILE: {path.name} is not qcow2 and its name does not say what it is: give --format raw, qcow2 or iso",
        code="format-unknown",
    )


def _format_of_name(source: str) -> str:
    suffix = Path(source.partition("?")[0]).suffix.lower().lstrip(".")
    if suffix in {"qcow2", "raw", "iso"}:
        return suffix
    raise usage(f"--format: {source} does not say its format; give --format qcow2, raw or iso", code="format-unknown")


def _checked_url(url: str) -> str:
    if not url.startswith("https://"):
        raise usage(f"URL: {url!r} is not https; for example https://images.example/debian-12.qcow2", code="url-invalid")
    return url


def _checked_sha256(sha256: str | None) -> str:
    digest = (sha256 or "").strip().lower()
    if digest and (len(digest) != 64 or any(character not in "0123456789abcdef" for character in digest)):
        raise usage("--sha256: 64 hexadecimal digits are needed, as sha256sum prints them", code="sha256-invalid")
    return digest
