"""A copy of a database that is put back later, as an operator restores yesterday's backup: every row, on both databases."""

from typing import Any

import sqlalchemy as sa

from trimtab_controller.store import schema
from trimtab_controller.store.database import Database, Session

TABLES = schema.metadata.sorted_tables


class SavedDatabase:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows: dict[str, list[dict[str, Any]]] = database.read(
            lambda session: {table.name: [dict(row._mapping) for row in session.execute(sa.select(table))] for table in TABLES}
        )

    def put_back(self) -> None:
        """Let the database be as it was when it was saved."""

        def work(session: Session) -> None:
            for table in reversed(TABLES):
                session.execute(table.delete())
            for table in TABLES:
                for row in self._rows[table.name]:
                    session.execute(table.insert().values(**row))

        self._database.write(work)
