"""Brings a database to this release's schema, and tells whether it is there."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from trimtab_controller.store.database import migration_engine

_SCRIPTS = Path(__file__).parent / "migrations"
_LOCK_NUMBER = 7_261_845_014
"""PostgreSQL's advisory lock of migrations: two nodes that start at once must not both run them."""


def upgrade(url: str, revision: str = "head") -> None:
    """Run the migrations that are missing, in one transaction; safe to call at every start, from several nodes."""
    engine = migration_engine(url)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_NUMBER)))
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    finally:
        engine.dispose()


def current(url: str) -> str:
    """Return the database's revision, '' where it has none."""
    engine = migration_engine(url)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision() or ""
    finally:
        engine.dispose()


def head() -> str:
    """Return the revision that this release needs."""
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config
