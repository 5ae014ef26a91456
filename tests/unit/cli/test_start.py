"""The command starts fast: what it must not import, and how long a list takes as a process."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest

import trimtab_controller.cli as cli_package
from tests.unit.cli.conftest import Program
from tests.unit.cli.fake_controller import FakeController, page, vm
from trimtab_controller.cli.main import cli

HEAVY = frozenset(
    [
        "fastapi",
        "sqlalchemy",
        "grpc",
        "pydantic",
        "rich",
        "yaml",
        "structlog",
        "celery",
        "httpx",
        "cryptography",
        "numpy",
        "asyncio",
    ]
)
LIST_BUDGET_S = 0.25


def imported_by(program: Program, *arguments: str) -> set[str]:
    """Return the top-level packages that a run of the command imports."""
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trimtab_controller.cli.main", *arguments],
        env=program.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    lines = [line for line in found.stderr.splitlines() if line.startswith("import time:")]
    assert lines
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("line", ["--help", "vm list", "vm create --help", "vm get web1 -o json"])
def test_nothing_heavy_is_imported(program: Program, controller: FakeController, line: str) -> None:
    controller.on("GET", "/v1/projects/default/vms", page(vm()))
    assert imported_by(program, *line.split()) & HEAVY == set()


def test_the_command_imports_only_itself_of_the_controller() -> None:
    """It talks to the public API alone; whoever uses it from elsewhere has no other part of the controller."""
    allowed = ("trimtab_controller.cli", "click")
    found = []
    for path in Path(str(cli_package.__path__[0])).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found += [
                f"{path.name}: {name}"
                for name in names
                if not name.startswith(allowed) and name.partition(".")[0] not in sys.stdlib_module_names | {"yaml", "websockets"}
            ]
    # A replay runs the scheduler itself, and says what to install where it is not there.
    assert set(found) == {"placement.py: trimtab_controller.replay_trace"}


def test_vm_list_takes_a_quarter_of_a_second_at_most(program: Program, controller: FakeController) -> None:
    """CPU time, the best of several: what else the machine does meanwhile is not the command's doing."""
    controller.on("GET", "/v1/projects/default/vms", page(*[vm(f"web{i}") for i in range(100)]))
    times_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert program("vm", "list").code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times_s) <= LIST_BUDGET_S


def commands() -> dict[str, click.Command]:
    """Return every command there is, by the words that name it."""
    found: dict[str, click.Command] = {}

    def walk(command: click.Command, words: tuple[str, ...], ctx: click.Context) -> None:
        if not isinstance(command, click.Group):
            found[" ".join(words)] = command
            return
        for name in command.list_commands(ctx):
            inner = command.get_command(ctx, name)
            assert inner is not None
            walk(inner, (*words, name), click.Context(inner, info_name=name, parent=ctx))

    walk(cli, (), click.Context(cli, info_name="trimtab"))
    return found


def test_every_noun_has_get_and_list() -> None:
    found = set(commands())
    # Local matters, and questions about the fleet as a whole, which have no items to list.
    local = {
        "audit",
        "capacity",
        "completion",
        "context",
        "doctor",
        "drill",
        "failover",
        "login",
        "placement",
        "recovery",  # `recovery plan` has them
        "token",
        "version",
        "whoami",
    }
    nouns = {line.split()[0] for line in found} - local
    nouns |= {"recovery plan", "backup instant"}
    assert {f"{noun} {verb}" for noun in nouns for verb in ("get", "list")} <= found


def test_every_command_and_option_explains_itself() -> None:
    silent = []
    for line, command in commands().items():
        silent += [line] if not command.help else []
        silent += [
            f"{line} {option.opts[0]}" for option in command.params if isinstance(option, click.Option) and not option.help
        ]
    assert silent == []
