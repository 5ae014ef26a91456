"""A database that many tests use one after the other: statements stay compiled, rows go."""

from trimtab_controller.store import schema
from trimtab_controller.store.database import Database, Session

_EMPTY = [table.delete() for table in reversed(schema.metadata.sorted_tables)]


def empty(database: Database) -> None:
    """Delete every row."""

    def work(session: Session) -> None:
        for statement in _EMPTY:
            session.execute(statement)

    database.write(work)
