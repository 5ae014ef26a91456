"""Writes `versions/0001_foundation.py` anew from the tables in `store/schema`: `python -m trimtab_controller.store.migrations.render`.

Only until the first release; from then on a migration is never changed, and `alembic` writes the next ones from the difference.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.runtime.migration import MigrationContext

from trimtab_controller.store import schema
from trimtab_controller.store.schema.base import UtcDateTime

TARGET = Path(__file__).parent / "versions" / "0001_foundation.py"
HEAD = '''"""The foundation: every table of the first release, those that later issues fill included."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
'''


def render_item(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    """Spell our types with SQLAlchemy's own, so that a migration does not change when ours do, and truth for every database."""
    if kind == "server_default" and isinstance(item.arg, sa.sql.elements.True_ | sa.sql.elements.False_):
        return f"sa.{item.arg}()"
    if kind != "type":
        return False
    if isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if isinstance(item, sa.JSON):
        return "_JSON"
    if isinstance(item, sa.BigInteger) and item._variant_mapping:
        return "_SEQUENCE"
    return False


def foundation() -> str:
    """Return the migration's text, one function per table in the order of their foreign keys."""
    with sa.create_engine("sqlite://").connect() as connection:
        options = {"render_item": render_item, "target_metadata": schema.metadata}
        context = MigrationContext.configure(connection, opts=options)
        operations = produce_migrations(context, schema.metadata).upgrade_ops
        assert operations is not None
        code = render_python_code(operations, render_item=render_item, migration_context=context)
    function = ast.parse("def upgrade():\n" + code).body[0]
    assert isinstance(function, ast.FunctionDef)
    tables: dict[str, list[str]] = {}
    for statement in function.body:
        tables.setdefault(_table_of(statement), []).append(ast.unparse(statement))
    text = HEAD + "".join(f"    _{table}()\n" for table in tables)
    for table, statements in tables.items():
        text += f"\n\ndef _{table}() -> None:\n" + "".join(f"    {line}\n" for one in statements for line in one.splitlines())
    return text


def _table_of(statement: ast.stmt) -> str:
    """`op.create_table(NAME, ...)` or `op.create_index(op.f(INDEX), NAME, ...)`."""
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    call = statement.value
    assert isinstance(call.func, ast.Attribute)
    name = call.args[1] if call.func.attr == "create_index" else call.args[0]
    assert isinstance(name, ast.Constant)
    return str(name.value)


def main() -> None:
    TARGET.write_text(foundation())
    ruff = Path(sys.executable).with_name("ruff")
    for command in (["format", "--quiet"], ["check", "--quiet"]):
        subprocess.run([ruff, *command, TARGET], check=True, timeout=60)


if __name__ == "__main__":
    main()
