"""Which controller, as whom, in which project: flags, then the environment, then the contexts file.

A context is taken whole. Where TRIMTAB_URL is set, the file's token is not used, so that a token is never sent to another
controller than the one it was stored for; where `--context` is given, the environment is passed over for the same reason.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trimtab_controller.cli.errors import CommandFailed, usage

_LOGIN = "trimtab login --url https://CONTROLLER:8443 --ca FILE --token-stdin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    url: str = ""
    token: str = ""
    token_file: str = ""
    ca: str = ""
    project: str = ""

    def read_token(self) -> str:
        """Return the token; the file wins, since a token in the configuration is easily shared by mistake."""
        if not self.token_file:
            return self.token
        try:
            return Path(self.token_file).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise CommandFailed(
                f"token_file: cannot read {self.token_file}: {error.strerror}",
                code="token-unreadable",
                kind="unauthenticated",
                hint=_LOGIN,
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextsFile:
    current: str = ""
    contexts: Mapping[str, Context] = field(default_factory=dict)

    def pick(self, name: str) -> Context:
        if name not in self.contexts:
            known = ", ".join(sorted(self.contexts)) or "none"
            raise CommandFailed(
                f"there is no context {name!r} in {path()} (known: {known})",
                code="context-not-found",
                kind="not_found",
                hint="trimtab context list",
            )
        return self.contexts[name]


def path() -> Path:
    given = os.environ.get("TRIMTAB_CONFIG", "")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base else Path.home() / ".config") / "trimtab" / "config.toml"


def read() -> ContextsFile:
    """Return the contexts file; an absent one is empty."""
    import tomllib

    place = path()
    try:
        document = tomllib.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ContextsFile()
    except (OSError, ValueError) as error:
        raise usage(f"cannot read {place}: {error}", code="config-unreadable") from error
    known = set(Context.__dataclass_fields__)
    contexts = {
        str(name): Context(**{key: str(value) for key, value in table.items() if key in known})
        for name, table in document.get("contexts", {}).items()
        if isinstance(table, dict)
    }
    return ContextsFile(current=str(document.get("current", "")), contexts=contexts)


def write(contents: ContextsFile) -> None:
    lines = [f"current = {_quoted(contents.current)}", ""]
    for name, context in sorted(contents.contexts.items()):
        lines.append(f"[contexts.{_quoted(name)}]")
        lines += [f"{key} = {_quoted(value)}" for key, value in asdict(context).items() if value]
        lines.append("")
    write_private(path(), "\n".join(lines))


def write_private(place: Path, text: str) -> None:
    """Replace a file, readable by its owner only, in one step."""
    import tempfile

    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(place)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def resolve(context_name: str) -> Context:
    """Return where to go and as whom; `context_name` is what `--context` says, "" for nothing."""
    environment = os.environ
    if context_name:
        return read().pick(context_name)
    url = environment.get("TRIMTAB_URL", "")
    if url:
        return Context(
            url=url,
            token=environment.get("TRIMTAB_TOKEN", ""),
            token_file="" if environment.get("TRIMTAB_TOKEN") else environment.get("TRIMTAB_TOKEN_FILE", ""),
            ca=environment.get("TRIMTAB_CA", ""),
            project=environment.get("TRIMTAB_PROJECT", ""),
        )
    contents = read()
    name = environment.get("TRIMTAB_CONTEXT", "") or contents.current
    if not name:
        raise usage("no controller is known: set TRIMTAB_URL, or log in once", code="no-context", hint=_LOGIN)
    picked = contents.pick(name)
    project = environment.get("TRIMTAB_PROJECT", "") or picked.project
    return Context(url=picked.url, token=picked.token, token_file=picked.token_file, ca=picked.ca, project=project)


def _quoted(text: str) -> str:
    """Return a TOML basic string; JSON's escapes are a part of TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
