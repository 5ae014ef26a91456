"""What concerns this machine rather than the fleet: `trimtab context`, `login`, `completion` and `version`."""

import sys
from importlib import metadata
from pathlib import Path

import click

from trimtab_controller.cli import completion as live_names
from trimtab_controller.cli import options, render, settings
from trimtab_controller.cli.client import Client
from trimtab_controller.cli.errors import CommandFailed, usage
from trimtab_controller.cli.paths import join
from trimtab_controller.cli.render import Column
from trimtab_controller.cli.session import Session

_CONTEXT_COLUMNS = (
    Column("current", "is_current", lambda item, _now: "*" if item.get("is_current") else ""),
    Column("name", "name"),
    Column("url", "url"),
    Column("project", "project"),
    Column("ca", "ca", is_wide=True),
    Column("token_file", "token_file", is_wide=True),
)


@click.group()
def context() -> None:
    """Contexts: controllers that this user works with."""


@context.command("list")
@options.shown
@click.pass_obj
def list_contexts(session: Session) -> None:
    """List contexts; the current one has a star."""
    contents = settings.read()
    items = [
        {
            "name": name,
            "url": one.url,
            "project": one.project,
            "ca": one.ca,
            "token_file": one.token_file,
            "is_current": name == contents.current,
        }
        for name, one in sorted(contents.contexts.items())
    ]
    render.show_list(session, items, _CONTEXT_COLUMNS, empty=f"no contexts in {settings.path()}; make one with trimtab login")


@context.command("use")
@click.argument("name", shell_complete=live_names.context_names)
def use(name: str) -> None:
    """Make a context the current one."""
    contents = settings.read()
    contents.pick(name)
    settings.write(settings.ContextsFile(current=name, contexts=contents.contexts))
    render.write_line(f"context {name} is current")


@context.command("set")
@click.argument("name", shell_complete=live_names.context_names)
@click.option("--url", help="For example https://controller.example:8443.")
@click.option(
    "--ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE", help="The fleet's CA in PEM form."
)
@click.option("--token-file", type=click.Path(path_type=Path), metavar="FILE", help="Where the token is kept.")
@click.option("--project", "-p", metavar="NAME", help="The project to work in.")
def set_context(name: str, url: str | None, ca: Path | None, token_file: Path | None, project: str | None) -> None:
    """Create a context or change what is given of it."""
    contents = settings.read()
    before = contents.contexts.get(name, settings.Context())
    after = settings.Context(
        url=url or before.url,
        ca=str(ca.resolve()) if ca else before.ca,
        token="" if token_file else before.token,
        token_file=str(token_file.expanduser().absolute()) if token_file else before.token_file,
        project=project or before.project,
    )
    if not after.url:
        raise usage("--url: a new context needs one, for example https://controller.example:8443")
    Client(after.url, token="").close()
    current = contents.current or name
    settings.write(settings.ContextsFile(current=current, contexts={**contents.contexts, name: after}))
    render.write_line(f"context {name} saved in {settings.path()}" + (" and current" if current == name else ""))


@click.command()
@click.option("--url", required=True, help="For example https://controller.example:8443.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="The fleet's CA in PEM form; a copy is kept. Without it the system's CAs are trusted.")  # fmt: skip
@click.option("--token-stdin", is_flag=True, help="Read the token from standard input instead of asking.")
@click.option("--name", "context_name", default="default", show_default=True, help="The context's name.")
@click.option("--project", "-p", metavar="NAME", help="The project to work in.")
def login(url: str, ca: Path | None, token_stdin: bool, context_name: str, project: str | None) -> None:
    """Check a token with a controller and keep both as a context, which becomes the current one."""
    if token_stdin:
        token = sys.stdin.readline().strip()
    elif sys.stdin.isatty():
        token = click.prompt("Token", hide_input=True, err=True).strip()
    else:
        raise usage("nobody can be asked for the token here: give it with --token-stdin", code="token-missing")
    if not token:
        raise usage(
            "the token is empty; `trimtab token create` or `trimtab-controller token reset` makes one", code="token-missing"
        )
    if "/" in context_name or context_name.startswith("."):
        raise usage(f"--name: {context_name!r} is no name for a context; for example lab", code="context-name-invalid")
    client = Client(url, token=token, ca_path=str(ca) if ca else "")
    try:
        answer = client.get(join("whoami"))
    finally:
        client.close()
    who = answer.get("user", answer)
    _keep(context_name, url=url, ca=ca, token=token, project=project or "")
    name = who.get("name", "") if isinstance(who, dict) else who
    render.write_line(f"logged in to {url} as {name}; context {context_name} is current")


def _keep(context_name: str, *, url: str, ca: Path | None, token: str, project: str) -> None:
    folder = settings.path().parent
    token_file = folder / f"{context_name}.token"
    settings.write_private(token_file, token + "\n")
    ca_file = ""
    if ca is not None:
        kept = folder / f"{context_name}.ca.pem"
        settings.write_private(kept, ca.read_text(encoding="utf-8"))
        ca_file = str(kept)
    contents = settings.read()
    one = settings.Context(url=url, token_file=str(token_file), ca=ca_file, project=project)
    settings.write(settings.ContextsFile(current=context_name, contexts={**contents.contexts, context_name: one}))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    bash: source <(trimtab completion bash)
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    render.write_line(found(ctx.find_root().command, {}, "trimtab", "_TRIMTAB_COMPLETE").source())


@click.command()
@options.reads
@click.pass_obj
def version(session: Session) -> None:
    """Print the version of this command, and of the controller where one is known and answers."""
    found: dict[str, str | None] = {"client": metadata.version("trimtab"), "controller": None, "url": None}
    try:
        found["url"] = session.context.url
        found["controller"] = str(session.client.get(join("version")).get("version", "unknown"))
    except CommandFailed as error:
        if error.code != "no-context":
            render.say(f"controller: {error.message}")
    columns = (Column("client", "client"), Column("controller", "controller"), Column("url", "url"))
    render.show_one(session, found, columns)
