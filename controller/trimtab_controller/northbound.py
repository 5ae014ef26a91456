"""OVN's northbound database: the only importer of ovsdbapp, which is needed only where overlay networks are on.

A replica of the database is kept in memory; what shall be there is compared with it and written in one transaction, so that a
reader, `ovn-northd` first of all, never sees half of a change.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trimtab_controller.core.overlay import COLUMNS, HOLDERS, NUMBERS, REFERENCES, Changes, Row, Table, Value, differ
from trimtab_protos.errors import Unavailable

FLEET, KEY = "trimtab-fleet", "trimtab"
"""Names in `external_ids`: whose a row is, and which."""
ANSWER_WITHIN_S = 10


@dataclass(frozen=True, slots=True)
class Papers:
    """PEM files for an `ssl:` endpoint."""

    certificate: Path
    key: Path
    authority: Path


class Northbound(Protocol):
    def apply(self, rows: Sequence[Row]) -> Changes:
        """Make the fleet's rows these and no others; return what had to change. Unavailable: the database does not answer."""
        ...


class OvnNorthbound:
    """The northbound database at an endpoint such as ssl:192.0.2.10:6641. Connects at the first use and anew after a failure."""

    def __init__(
        self, endpoint: str, *, fleet: str, papers: Papers | None = None, answer_within_s: int = ANSWER_WITHIN_S
    ) -> None:
        self._endpoint, self._fleet, self._papers, self._answer_within_s = endpoint, fleet, papers, answer_within_s
        self._api: Any = None

    def apply(self, rows: Sequence[Row]) -> Changes:
        try:
            if self._api is None:
                self._api = _connect(self._endpoint, self._papers, self._answer_within_s)
            command = _command(self._api, rows, self._fleet)
            command.execute(check_error=True)
        except Exception as error:  # its library raises what the socket, the protocol or the schema raised
            self.close()
            reason = _reason(error)
            message = f"OVN's northbound database at {self._endpoint} does not do what it is asked: {reason}"
            raise Unavailable("ovn-northbound-unusable", message, endpoint=self._endpoint) from error
        changes: Changes = command.result
        return changes

    def close(self) -> None:
        if self._api is not None:
            self._api.ovsdb_connection.stop(self._answer_within_s)
            self._api = None


def _reason(error: Exception) -> str:
    try:
        return " ".join(str(error).split())[:200] or type(error).__name__
    except AttributeError:  # the library's own exception for a timeout cannot be written
        return type(error).__name__


def read_rows(tables: Any, fleet: str) -> tuple[tuple[Row, ...], dict[tuple[Table, str], Any]]:
    """Return the fleet's rows of a replica, and the library's objects for them."""
    found: dict[tuple[Table, str], Any] = {}
    for table in Table:
        for row in tables[table].rows.values():
            if row.external_ids.get(FLEET) == fleet and KEY in row.external_ids:
                found[table, row.external_ids[KEY]] = row
    return tuple(_row(table, key, row) for (table, key), row in found.items()), found


def _row(table: Table, key: str, row: Any) -> Row:
    return Row(
        table=table,
        key=key,
        columns={column: _plain(getattr(row, column)) for column in COLUMNS[table]},
        references={column: _keys(getattr(row, column)) for column in REFERENCES[table]},
    )


def _plain(value: Any) -> Value:
    match value:
        case dict():
            return {str(name): str(one) for name, one in value.items()}
        case list():
            return tuple(sorted(str(one) for one in value))
    return str(value)


def _native(column: str, value: Value) -> Any:
    """Return the value as the library takes it."""
    match value:
        case tuple():
            return [int(one) for one in value] if column in NUMBERS else list(value)
        case str():
            return int(value) if column in NUMBERS else value
    return value


def _keys(rows: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted(str(row.external_ids.get(KEY, "")) for row in rows))


def _connect(endpoint: str, papers: Papers | None, answer_within_s: int) -> Any:
    from ovs.stream import Stream
    from ovsdbapp.backend.ovs_idl import connection
    from ovsdbapp.schema.ovn_northbound import impl_idl

    # What it would say at each try is in what it raises.
    logging.getLogger("ovsdbapp").setLevel(logging.CRITICAL)
    if papers is not None:
        # Of the whole process; read anew at each connection, so that renewed files are found.
        Stream.ssl_set_certificate_file(str(papers.certificate))
        Stream.ssl_set_private_key_file(str(papers.key))
        Stream.ssl_set_ca_cert_file(str(papers.authority))

    class Api(impl_idl.OvnNbApiIdlImpl):  # type: ignore[misc]
        # The library keeps the first connection of a class for good, whatever became of it.
        _ovsdb_connection = None

    replica = connection.OvsdbIdl.from_server(endpoint, "OVN_Northbound", helper_tables=list(Table))
    return Api(connection.Connection(replica, timeout=answer_within_s))


def _command(api: Any, rows: Sequence[Row], fleet: str) -> Any:
    """Return the one command that reads, compares and writes, on the thread that owns the replica."""
    from ovsdbapp.backend.ovs_idl.command import BaseCommand

    class Apply(BaseCommand):  # type: ignore[misc]
        def run_idl(self, txn: Any) -> None:
            there, objects = read_rows(self.api.tables, fleet)
            changes = differ([_sorted(row) for row in rows], there)
            _write(txn, self.api.tables, changes, objects, fleet)
            self.result = changes

    return Apply(api)


def _sorted(row: Row) -> Row:
    """Return the row with its sets in the order in which they are read back."""
    columns = {name: tuple(sorted(one)) if isinstance(one, tuple) else one for name, one in row.columns.items()}
    references = {name: tuple(sorted(keys)) for name, keys in row.references.items()}
    return Row(table=row.table, key=row.key, columns=columns, references=references, parent=row.parent)


def _write(txn: Any, tables: Any, changes: Changes, objects: dict[tuple[Table, str], Any], fleet: str) -> None:
    for row in changes.create:
        made = txn.insert(tables[row.table])
        made.external_ids = {FLEET: fleet, KEY: row.key}
        objects[row.table, row.key] = made
    for row in (*changes.create, *changes.update):
        target = objects[row.table, row.key]
        for column, value in row.columns.items():
            setattr(target, column, _native(column, value))
        for column, keys in row.references.items():
            setattr(target, column, [objects[REFERENCES[row.table][column], key] for key in keys])
    for row in changes.create:
        if row.parent is not None:
            table, key, column = row.parent
            objects[table, key].addvalue(column, objects[row.table, row.key])
    for table, key in changes.delete:
        gone = objects[table, key]
        # A switch or router holds its ports: one that is still held cannot be deleted.
        for holder in tables[HOLDERS[table]].rows.values() if table in HOLDERS else ():
            if gone in holder.ports:
                holder.delvalue("ports", gone)
        gone.delete()
