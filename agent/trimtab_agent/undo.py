"""Remembers what the join changed on a host, before it changes it, so that leaving restores every file bit for bit.

The first memory of a path or unit wins: a join that is repeated or resumed does not take its own work for the original.
A configuration file that somebody edited after the join keeps those edits: only our marked block is taken out again.
"""

import base64
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab_agent.certificates import write_file
from trimtab_agent.systemd import Systemctl
from trimtab_protos.errors import Internal

BLOCK_BEGIN = "# --- trimtab: written by `trimtab-agent join`, removed by `trimtab-agent leave`; do not edit ---"
BLOCK_BEGIN_AFTER_OPEN_LINE = BLOCK_BEGIN + " (the line above had no end)"
BLOCK_END = "# --- trimtab: end ---"


class UndoLog:
    """The undo file of one host. Paths are kept as they are on the host, below `root`."""

    def __init__(self, path: Path, *, root: Path = Path("/")) -> None:
        self._path = path
        self._root = root

    def exists(self) -> bool:
        return self._path.exists()

    def remember_path(self, path: Path) -> None:
        """Record what is at `path` now, and which parent directories are missing. Call before each change of it."""
        entries = self._read()
        known = {entry["path"] for entry in entries if entry["kind"] != "unit"}
        added: list[dict[str, Any]] = []
        for parent in reversed(path.parents):
            if not parent.exists() and self._name(parent) not in known:
                added.append({"kind": "directory", "path": self._name(parent)})
        if self._name(path) not in known:
            added.append(self._capture(path))
        if added:
            self._write([*entries, *added])

    def remember_written(self, path: Path) -> None:
        """Record what was written to `path`, so that a later edit by others is noticed."""
        entries = self._read()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for entry in entries:
            if entry["kind"] != "unit" and entry["path"] == self._name(path):
                entry["written_sha256"] = digest
        self._write(entries)

    def remember_unit(self, unit: str, *, enablement: str) -> None:
        entries = self._read()
        if not any(entry["kind"] == "unit" and entry["unit"] == unit for entry in entries):
            self._write([*entries, {"kind": "unit", "unit": unit, "enablement": enablement}])

    def restore(self, systemctl: Systemctl, *, kept: Sequence[Path] = ()) -> list[str]:
        """Undo everything in reverse order but what is `kept`; return what was undone, for people. May be repeated after a cut."""
        undone: list[str] = []
        entries = self._read()
        while entries:
            entry = entries[-1]
            what = self._restore_one(entry, systemctl, kept)
            if what:
                undone.append(what)
            entries = entries[:-1]
            self._write(entries)
        self._path.unlink(missing_ok=True)
        return undone

    def _restore_one(self, entry: dict[str, Any], systemctl: Systemctl, kept: Sequence[Path]) -> str:
        if entry["kind"] == "unit":
            systemctl.set_enablement(entry["unit"], entry["enablement"])
            return f"unit {entry['unit']} {entry['enablement']} again"
        path = self._root / entry["path"].lstrip("/")
        if any(path == keep or path.is_relative_to(keep) for keep in kept):
            return ""
        match entry["kind"]:
            case "directory":
                return self._remove_directory(path)
            case "absent":
                return self._remove_made(path, entry)
            case "symlink":
                path.unlink(missing_ok=True)
                path.symlink_to(entry["target"])
                return f"{entry['path']} restored"
            case "file":
                return self._restore_file(path, entry)
            case kind:
                raise Internal("undo-entry-unknown", f"the undo file has an entry of kind {kind}, of a newer release")

    def _restore_file(self, path: Path, entry: dict[str, Any]) -> str:
        if self._was_edited(path, entry):
            stripped = without_block(path.read_text())
            write_file(path, stripped.encode(), mode=stat.S_IMODE(path.stat().st_mode))
            return f"{entry['path']}: our lines removed (it was edited since the join)"
        if path.is_symlink():
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, base64.b64decode(entry["content"]), mode=entry["mode"])
        if os.geteuid() == 0:
            os.chown(path, entry["uid"], entry["gid"])
        os.utime(path, ns=(entry["mtime_ns"], entry["mtime_ns"]))
        return f"{entry['path']} restored"

    def _remove_made(self, path: Path, entry: dict[str, Any]) -> str:
        if self._was_edited(path, entry):
            write_file(path, without_block(path.read_text()).encode(), mode=stat.S_IMODE(path.stat().st_mode))
            return f"{entry['path']}: our lines removed (it was edited since the join)"
        if not path.is_symlink() and not path.exists():
            return ""
        path.unlink()
        return f"{entry['path']} removed"

    def _remove_directory(self, path: Path) -> str:
        try:
            path.rmdir()
        except OSError:
            return ""  # gone, or somebody else keeps something there
        return f"{self._name(path)} removed"

    def _was_edited(self, path: Path, entry: dict[str, Any]) -> bool:
        written = entry.get("written_sha256")
        if written is None or path.is_symlink() or not path.is_file():
            return False
        return bool(hashlib.sha256(path.read_bytes()).hexdigest() != written)

    def _capture(self, path: Path) -> dict[str, Any]:
        try:
            found = path.lstat()
        except FileNotFoundError:
            return {"kind": "absent", "path": self._name(path)}
        if stat.S_ISLNK(found.st_mode):
            return {"kind": "symlink", "path": self._name(path), "target": os.readlink(path)}
        return {
            "kind": "file",
            "path": self._name(path),
            "content": base64.b64encode(path.read_bytes()).decode(),
            "mode": stat.S_IMODE(found.st_mode),
            "uid": found.st_uid,
            "gid": found.st_gid,
            "mtime_ns": found.st_mtime_ns,
        }

    def _name(self, path: Path) -> str:
        return "/" + str(path.relative_to(self._root)).removeprefix(".")

    def _read(self) -> list[dict[str, Any]]:
        try:
            entries: list[dict[str, Any]] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return []
        return entries

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(self._path, json.dumps(list(entries), indent=1).encode(), mode=0o600)


def with_block(text: str, lines: Sequence[str], *, is_at_top: bool) -> str:
    """Return the text with our block in it, replacing an earlier one."""
    rest = without_block(text)
    if is_at_top or not rest or rest.endswith("\n"):
        block = "\n".join([BLOCK_BEGIN, *lines, BLOCK_END]) + "\n"
        return block + rest if is_at_top else rest + block
    return rest + "\n" + "\n".join([BLOCK_BEGIN_AFTER_OPEN_LINE, *lines, BLOCK_END]) + "\n"


def without_block(text: str) -> str:
    """Return the text without our block, otherwise unchanged to the byte."""
    kept: list[str] = []
    is_inside = False
    for line in text.splitlines(keepends=True):
        if line.rstrip("\n") in {BLOCK_BEGIN, BLOCK_BEGIN_AFTER_OPEN_LINE}:
            is_inside = True
            if line.rstrip("\n") == BLOCK_BEGIN_AFTER_OPEN_LINE and kept:
                kept[-1] = kept[-1].removesuffix("\n")
        elif line.rstrip("\n") == BLOCK_END and is_inside:
            is_inside = False
        elif not is_inside:
            kept.append(line)
    return "".join(kept)
