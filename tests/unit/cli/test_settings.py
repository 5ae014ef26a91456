"""Contexts, login and completion: which controller, as whom."""

import os
import stat
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Outcome, Program, Trimtab
from tests.unit.cli.fake_controller import TOKEN, Answer, FakeController, host, page, problem, vm
from trimtab_controller.cli import settings

VMS = "/v1/projects/default/vms"


@pytest.fixture
def alone(environment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No address in the environment; the value is the place of the contexts file."""
    for name in ("TRIMTAB_URL", "TRIMTAB_TOKEN", "TRIMTAB_CA"):
        monkeypatch.delenv(name)
    return environment


def log_in(program: Program, controller: FakeController, certificate: Path, *more: str) -> Outcome:
    command = ["login", "--url", controller.url, "--ca", str(certificate), "--token-stdin", *more]
    return program(*command, typed=f"{TOKEN}\n")


def test_login_keeps_a_private_token_and_makes_the_context_current(
    alone: Path, controller: FakeController, certificate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    controller.on("GET", "/v1/whoami", Answer({"name": "ann", "user": {"name": "ann"}}))
    found = log_in(Program(dict(os.environ)), controller, certificate, "--name", "lab", "--project", "shop")
    assert (found.code, found.err) == (0, "")
    assert f"logged in to {controller.url} as ann" in found.out
    assert TOKEN not in alone.read_text()
    token_file = alone.parent / "lab.token"
    assert token_file.read_text().strip() == TOKEN
    assert [stat.S_IMODE(path.stat().st_mode) for path in (alone, token_file)] == [0o600, 0o600]
    controller.on("GET", "/v1/projects/shop/vms", page(vm()))
    assert Trimtab(capsys)("vm", "list", "-o", "name").out == "web1\n"
    assert controller.seen[-1].headers["authorization"] == f"Bearer {TOKEN}"


def test_login_keeps_nothing_where_the_token_is_refused(alone: Path, controller: FakeController, certificate: Path) -> None:
    controller.on("GET", "/v1/whoami", problem(401, "token-unknown", "unauthenticated", "the token is unknown"))
    found = log_in(Program(dict(os.environ)), controller, certificate)
    assert found.code == 9
    assert "the token is unknown" in found.err
    assert not alone.exists()


def test_login_needs_a_token(alone: Path, controller: FakeController) -> None:
    program = Program(dict(os.environ))
    assert program("login", "--url", controller.url, "--token-stdin", typed="\n").code == 2
    found = program("login", "--url", controller.url)
    assert found.code == 2
    assert "--token-stdin" in found.err


def test_contexts_are_set_listed_and_used(alone: Path, trimtab: Trimtab, certificate: Path, tmp_path: Path) -> None:
    token_file = tmp_path / "t"
    assert trimtab("context", "set", "lab", "--url", "https://a:1", "--ca", str(certificate)).code == 0
    assert trimtab("context", "set", "prod", "--url", "https://b:2", "--token-file", str(token_file), "-p", "shop").code == 0
    assert trimtab("context", "list", "-o", "name").out.split() == ["lab", "prod"]
    assert trimtab("context", "use", "prod").code == 0
    rows = [line.split() for line in trimtab("context", "list").out.splitlines()]
    assert rows[1:] == [["lab", "https://a:1"], ["*", "prod", "https://b:2", "shop"]]
    assert settings.read().contexts["prod"].project == "shop"
    assert trimtab("context", "use", "absent").code == 4
    assert trimtab("context", "set", "new").code == 2
    assert trimtab("context", "set", "new", "--url", "http://a").code == 2


def test_names_with_any_character_survive_the_file(alone: Path) -> None:
    name = 'a "quoted" [name] = é\\\n\x7f'
    settings.write(settings.ContextsFile(current=name, contexts={name: settings.Context(url="https://a:1", token="#'\"")}))
    assert settings.read() == settings.ContextsFile(
        current=name, contexts={name: settings.Context(url="https://a:1", token="#'\"")}
    )


def test_a_context_given_by_name_wins_over_the_environment(
    trimtab: Trimtab, controller: FakeController, certificate: Path
) -> None:
    other = settings.Context(url=controller.url, token="tt-other.secret", ca=str(certificate), project="theirs")
    settings.write(settings.ContextsFile(current="", contexts={"other": other}))
    controller.on("GET", "/v1/projects/theirs/vms", page())
    assert trimtab("vm", "list", "--context", "other").code == 0
    assert controller.seen[0].headers["authorization"] == "Bearer tt-other.secret"


def test_a_stored_token_is_never_sent_to_an_address_of_the_environment(
    trimtab: Trimtab, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIMTAB_TOKEN")
    settings.write(settings.ContextsFile(current="prod", contexts={"prod": settings.Context(url="https://b:2", token="tt-x.y")}))
    controller.on("GET", VMS, problem(401, "token-missing", "unauthenticated", "no token"))
    assert trimtab("vm", "list").code == 9
    assert "authorization" not in controller.seen[0].headers


def test_a_token_may_come_from_a_file(
    trimtab: Trimtab, controller: FakeController, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("tt-file.secret\n")
    monkeypatch.delenv("TRIMTAB_TOKEN")
    monkeypatch.setenv("TRIMTAB_TOKEN_FILE", str(tmp_path / "token"))
    controller.on("GET", VMS, page())
    trimtab("vm", "list")
    assert controller.seen[0].headers["authorization"] == "Bearer tt-file.secret"
    monkeypatch.setenv("TRIMTAB_TOKEN_FILE", str(tmp_path / "absent"))
    found = trimtab("vm", "list")
    assert found.code == 9
    assert "absent" in found.err


def test_without_any_address_the_way_in_is_shown(alone: Path, trimtab: Trimtab) -> None:
    found = trimtab("vm", "list")
    assert found.code == 2
    assert "next: trimtab login" in found.err


def test_a_broken_contexts_file_is_named(alone: Path, trimtab: Trimtab) -> None:
    alone.parent.mkdir(parents=True)
    alone.write_text("current = ")
    found = trimtab("vm", "list")
    assert found.code == 2
    assert str(alone) in found.err


def test_the_project_of_the_environment_is_used(
    trimtab: Trimtab, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_PROJECT", "shop")
    controller.on("GET", "/v1/projects/shop/vms", page(vm()))
    assert trimtab("vm", "list").code == 0


def test_version_names_both_ends_and_needs_neither(
    trimtab: Trimtab, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.on("GET", "/v1/version", Answer({"version": "9.9", "api": "v1"}))
    assert "9.9" in trimtab("version").out
    controller.close()
    found = trimtab("version")
    assert found.code == 0
    assert "cannot be reached" in found.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(trimtab: Trimtab, shell: str) -> None:
    assert "_TRIMTAB_COMPLETE" in trimtab("completion", shell).out


def complete(program: Program, line: str) -> list[str]:
    words = line.split(" ")
    asked = {"_TRIMTAB_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    found = Program({**program.environment, **asked})()
    assert found.err == ""
    return [row.partition(",")[2] for row in found.out.splitlines() if row]


def test_names_are_completed_from_the_fleet(program: Program, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm("web1"), vm("web2"), vm("db1")))
    controller.on("GET", "/v1/projects/shop/vms", page(vm("shop1")))
    controller.on("GET", "/v1/hosts", page(host("node1")))
    assert complete(program, "trimtab vm get we") == ["web1", "web2"]
    assert complete(program, "trimtab vm get -p shop s") == ["shop1"]
    assert complete(program, "trimtab vm migrate web1 --to no") == ["node1"]
    assert complete(program, "trimtab vm mi") == ["migrate"]


def test_completion_is_silent_where_nothing_answers(program: Program, controller: FakeController) -> None:
    controller.on("GET", VMS, problem(500, "internal", "internal", "a defect"))
    assert complete(program, "trimtab vm get we") == []
    controller.close()
    assert complete(program, "trimtab vm get we") == []
