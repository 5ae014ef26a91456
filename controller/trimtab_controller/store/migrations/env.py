"""Runs migrations on the connection that `store/migrate.py` hands over; there is no alembic.ini."""

from alembic import context

from trimtab_controller.store import schema


def run() -> None:
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=schema.metadata,
        # SQLite cannot alter most things in place: tables are copied, with their constraints' names kept.
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


run()
