"""How resources are shown. Machine output is the API's own document; tables are for people and may change."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trimtab_controller.cli import humanise
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.session import Session

Document = Mapping[str, Any]
Show = Callable[[Document, datetime], str]

OUTPUTS = ("table", "wide", "json", "yaml", "name")
_GAP = "  "
_COLOURS = {
    "running": "32", "up": "32", "ready": "32", "done": "32", "active": "32",
    "unknown": "33", "suspect": "33", "paused": "33", "waiting": "33", "compensating": "33", "cordoned": "33",
    "crashed": "31", "lost": "31", "failed": "31", "needs_attention": "31", "refused": "31",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    """`path` is the value in the document, which `-c` with machine output gives; `show` says it to people."""

    name: str
    path: str
    show: Show | None = None
    is_wide: bool = False

    @property
    def title(self) -> str:
        return self.name.replace("_", " ").upper()

    def text(self, item: Document, now: datetime) -> str:
        shown = self.show(item, now) if self.show is not None else as_text(at(item, self.path))
        return humanise.plain(shown)


def at(item: Any, path: str) -> Any:
    """Return what a dotted path leads to, or None. A key that itself has dots wins over the way through it."""
    if not path:
        return item
    # First what JSON is made of: to ask whether something is a Mapping takes longer than all else here, and a list asks for each cell.
    if type(item) is dict or isinstance(item, Mapping):
        if path in item:
            return item[path]
        head, _, rest = path.partition(".")
        return at(item[head], rest) if rest and head in item else None
    head, _, rest = path.partition(".")
    if isinstance(item, list) and head.isdigit():
        return at(item[int(head)], rest) if int(head) < len(item) else None
    return None


def as_text(value: Any) -> str:
    if type(value) is str:
        return value
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case Mapping():
            return ",".join(f"{key}={as_text(one)}" for key, one in value.items())
        case list() | tuple():
            return ",".join(as_text(one) for one in value)
        case _:
            return str(value)


def now() -> datetime:
    return datetime.now(UTC)


def chosen_columns(session: Session, columns: Sequence[Column]) -> list[Column]:
    """Return the columns to show: those of `-c` (any dotted path of the document is one), else the usual ones."""
    if not session.columns:
        return [column for column in columns if session.output == "wide" or not column.is_wide]
    by_name = {column.name: column for column in columns}
    return [by_name.get(name) or Column(name, name) for name in session.columns]


def show_list(session: Session, items: Iterable[Document], columns: Sequence[Column], *, empty: str = "") -> int:
    """Print a list to stdout in the form asked for, once it has all of it; return how many items it has."""
    if session.output in {"table", "wide"}:
        return _show_table(session, items, columns, empty=empty)
    found = list(items)
    match session.output:
        case "json":
            write_json([_picked(session, item, columns) for item in found])
        case "yaml":
            write_yaml([_picked(session, item, columns) for item in found])
        case _:
            for item in found:
                write_line(name_of(item))
    return len(found)


def _show_table(session: Session, items: Iterable[Document], columns: Sequence[Column], *, empty: str) -> int:
    picked, moment = chosen_columns(session, columns), now()
    found, rows = [], []
    for item in items:
        found.append(item)
        rows.append([one.text(item, moment) for one in picked])
    _check_columns(session, found, columns)
    if not found and empty:
        print(empty, file=sys.stderr)
    if found or not empty:
        table([column.title for column in picked], rows, session)
    return len(found)


def show_one(
    session: Session, item: Document, columns: Sequence[Column], describe: Callable[[Document], None] | None = None
) -> None:
    """Print one resource; a table of one is its description."""
    match session.output:
        case "json":
            write_json(_picked(session, item, columns))
        case "yaml":
            write_yaml(_picked(session, item, columns))
        case "name":
            write_line(name_of(item))
        case _ if describe is not None and not session.columns:
            describe(item)
        case _:
            _check_columns(session, [item], columns)
            moment = now()
            wanted = chosen_columns(session, columns) if session.columns else columns
            pairs([(column.name.replace("_", " "), column.text(item, moment)) for column in wanted])


def name_of(item: Document) -> str:
    return str(item.get("name") or item.get("id") or item.get("seq") or "")


def _picked(session: Session, item: Document, columns: Sequence[Column]) -> Any:
    if not session.columns:
        return item
    by_name = {column.name: column.path for column in columns}
    return {name: at(item, by_name.get(name, name)) for name in session.columns}


def _check_columns(session: Session, items: Sequence[Document], columns: Sequence[Column]) -> None:
    """Refuse a column that is neither known nor found in any item: a typing error would be an empty column."""
    known = {column.name for column in columns}
    for name in session.columns:
        if name not in known and items and all(at(item, name) is None and not _has_parent(item, name) for item in items):
            raise usage(f"--columns: there is no {name!r} here; use {', '.join(sorted(known))}, or a path such as labels.rack")


def _has_parent(item: Document, path: str) -> bool:
    """Tell whether what a path ends in could be there: a label that no item has is no error."""
    head, _, rest = path.partition(".")
    return head in item and (not rest or item[head] is None or isinstance(item[head], Mapping))


def write_json(document: Any) -> None:
    write_line(json.dumps(document, indent=2, ensure_ascii=False))


def write_json_line(document: Any) -> None:
    write_line(json.dumps(document, ensure_ascii=False, separators=(",", ":")))


def write_yaml(document: Any, *, explicit_start: bool = False) -> None:
    try:
        import yaml
    except ImportError as error:
        raise CommandFailed("-o yaml needs PyYAML: install trimtab[controller], or use -o json", code="yaml-missing") from error
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    # The dumper knows no abstract mapping; JSON's types are all there are in an answer.
    text = yaml.dump(
        document, Dumper=dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, explicit_start=explicit_start
    )
    write_line(text.rstrip("\n"))


def write_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Tell the user something that is not data."""
    print(humanise.plain(text), file=sys.stderr, flush=True)


def has_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") != "dumb"


def coloured(text: str, word: str | None = None) -> str:
    """Return text in the colour of its first word (a state), where the terminal may have colours."""
    return _in_colour(text, word if word is not None else text) if has_colour() else text


def _in_colour(text: str, word: str) -> str:
    code = _COLOURS.get(word.split(" ", 1)[0])
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], session: Session | None = None) -> None:
    """Print aligned columns. Only a terminal cuts the last one, and only where `-o wide` did not ask for all of it."""
    widths = [max([len(title), *(len(row[index]) for row in rows)]) for index, title in enumerate(titles)]
    cut = None
    if session is not None and session.output == "table" and sys.stdout.isatty():
        import shutil

        cut = max(20, shutil.get_terminal_size().columns - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1))
    is_coloured = has_colour()
    lines = [row_text(titles, widths, cut=cut)]
    lines += [row_text(row, widths, is_coloured=is_coloured, cut=cut) for row in rows]
    write_line("\n".join(lines))


def row_text(cells: Sequence[str], widths: Sequence[int], *, is_coloured: bool = False, cut: int | None = None) -> str:
    last = cells[-1] if cut is None or len(cells[-1]) <= cut else cells[-1][: cut - 1] + "…"
    shown = [*map(str.ljust, cells[:-1], widths), last]
    if is_coloured:
        shown = list(map(_in_colour, shown, cells))
    return _GAP.join(shown).rstrip()


def pairs(entries: Sequence[tuple[str, str]], *, indent: str = "") -> None:
    """Print `key  value` lines, those without a value left out."""
    given = [(key, value) for key, value in entries if value != ""]
    width = max((len(key) for key, _ in given), default=0)
    for key, value in given:
        write_line(f"{indent}{key}{' ' * (width - len(key))}  {coloured(value)}")


def heading(text: str) -> None:
    write_line(f"\n{text}")
