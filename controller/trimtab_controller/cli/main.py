"""The command `trimtab`. Imports almost nothing: the module of a noun is loaded when that noun is used, so that `trimtab vm list`
starts in a tenth of a second (tests/unit/cli/test_start.py holds the line).
"""

import gc
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from trimtab_controller.cli import options
from trimtab_controller.cli.errors import CommandFailed, ExitCode, usage
from trimtab_controller.cli.session import Session

# Noun -> module under `cli/nouns` and the attribute that holds its command.
_NOUNS: Mapping[str, str] = {
    "audit": "access:audit",
    "backup": "backups:backup",
    "capacity": "survival:capacity",
    "completion": "local:completion",
    "context": "local:context",
    "doctor": "doctor:doctor",
    "drill": "drills:drill",
    "event": "operations:event",
    "failover": "failover:failover",
    "fence": "fence:fence",
    "floating": "floating:floating",
    "host": "hosts:host",
    "host-class": "host_classes:host_class",
    "image": "images:image",
    "login": "local:login",
    "network": "networks:network",
    "op": "operations:op",
    "placement": "placement:placement",
    "plan": "plans:plan",
    "pool": "storage:pool",
    "project": "projects:project",
    "recovery": "recovery:recovery",
    "router": "routers:router",
    "secgroup": "secgroups:secgroup",
    "template": "templates:template",
    "token": "access:token",
    "user": "access:user",
    "version": "local:version",
    "vm": "vms:vm",
    "vm-group": "vm_groups:vm_group",
    "volume": "storage:volume",
    "whoami": "access:whoami",
}
_INTERRUPTED = 130
# What a list of thousands is read into lives until it is shown: to walk through it again and again is for nothing.
GC_THRESHOLDS = (50_000, 20, 50)


class LazyGroup(click.Group):
    """Loads a noun's module on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(_NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        place = _NOUNS.get("op" if cmd_name == "operation" else cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command = getattr(importlib.import_module(f"trimtab_controller.cli.nouns.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Exit codes: 0 ok, 1 error, 2 usage or invalid request, 3 check failed, 4 not found, 5 conflict or name taken, "
    "6 timeout, 7 no host fits, 8 quota, 9 permission or login, 10 controller unreachable.",
)
@options.reads
def cli() -> None:
    """Trimtab: know before you act, prove it will survive, change your mind later.

    Where to go and as whom: TRIMTAB_URL, TRIMTAB_TOKEN or TRIMTAB_TOKEN_FILE, TRIMTAB_CA, TRIMTAB_PROJECT, or a context
    (`trimtab login`, `trimtab context list`).
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    gc.set_threshold(*GC_THRESHOLDS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    session = Session()
    try:
        result: Any = cli.main(given, prog_name="trimtab", obj=session, standalone_mode=False)
        code = result if isinstance(result, int) else ExitCode.OK
        sys.stdout.flush()
    except CommandFailed as error:
        code = _tell(error, given)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.UsageError as error:
        code = _tell(_usage_failure(error), given)
    except click.ClickException as error:
        code = _tell(CommandFailed(error.format_message(), code="failed"), given)
    except click.Abort as error:
        code = _INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else ExitCode.ERROR
        if code == ExitCode.ERROR:
            print("aborted: nothing was changed", file=sys.stderr)
    except OSError as error:
        code = _tell(
            CommandFailed(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", code="io-error"), given
        )
    finally:
        session.close()
    sys.exit(int(code))


def _usage_failure(error: click.UsageError) -> CommandFailed:
    failure = usage(error.format_message())
    if error.ctx is not None:
        failure.hint = f"{error.ctx.command_path} --help"
    return failure


def _tell(error: CommandFailed, arguments: Sequence[str]) -> int:
    """Print a failure on stderr, as JSON where that was asked for, and return its exit code."""
    if _wants_json(arguments):
        print(json.dumps(error.as_json(), ensure_ascii=False), file=sys.stderr)
    else:
        text = error.as_text()
        if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            text = text.replace("error:", "\x1b[31merror:\x1b[0m", 1)
        print(text, file=sys.stderr)
    return int(error.exit_code)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Tell whether `-o json` was given, also on a line that could not be parsed."""
    for index, argument in enumerate(arguments):
        if argument in {"-ojson", "-o=json", "--output=json"}:
            return True
        if argument in {"-o", "--output"} and arguments[index + 1 : index + 2] == ["json"]:
            return True
    return False


if __name__ == "__main__":
    main()
