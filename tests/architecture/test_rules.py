"""The rules of the house, as tests: types, lint, layers, sizes, stubs, protos, what may stand in the repository."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SOURCES = ("controller", "agent", "protos", "ops", "tests")
# Line and function sizes at which a split by noun reads better.
FILE_LINES_MAX = 520
# A suite of one noun reads from top to bottom; two of them wait for their split.
TEST_FILE_LINES_MAX = 720
FUNCTION_LINES_MAX = 70


def run(*command: str, cwd: Path = TOP, timeout_s: float = 380) -> str:
    finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output[-6000:]
    return output


def tracked(*suffixes: str) -> list[Path]:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    return [TOP / name for name in listed if name.endswith(suffixes) and (TOP / name).is_file()]


def own_python() -> list[Path]:
    return [path for path in tracked(".py") if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


def test_ruff_finds_nothing() -> None:
    run(str(BIN / "ruff"), "check", *SOURCES)


def test_code_is_formatted() -> None:
    run(str(BIN / "ruff"), "format", "--check", *SOURCES)


def test_mypy_strict_finds_nothing() -> None:
    run(str(BIN / "mypy"), "controller/trimtab_controller", "agent/trimtab_agent", "protos/trimtab_protos", "ops/trimtab_lab")


def test_layers_hold() -> None:
    run(str(BIN / "lint-imports"), "--no-cache")


def test_protos_follow_the_style_guide() -> None:
    run(str(BIN / "buf"), "lint", cwd=TOP / "protos")


@pytest.mark.parametrize("image", ["image.binpb", "image-first.binpb"])
def test_protos_break_no_agent_in_the_field(image: str) -> None:
    """`make stubs` makes image.binpb anew in the command that takes in a changed proto: a break is gone from there by the next run.
    image-first.binpb is that of 2026-11-28 and is never made anew: whatever was sent then keeps its meaning.
    """
    run(str(BIN / "buf"), "breaking", "--against", image, cwd=TOP / "protos")


def test_stubs_are_those_of_the_protos(tmp_path: Path) -> None:
    run("bash", str(TOP / "ops/generate_stubs.sh"), str(tmp_path))
    generated = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert generated
    stale = [str(path.relative_to(tmp_path)) for path in generated if path.read_bytes() != counterpart(path, tmp_path)]
    assert stale == [], "run ops/generate_stubs.sh"


def counterpart(path: Path, root: Path) -> bytes:
    committed = TOP / "protos" / path.relative_to(root)
    return committed.read_bytes() if committed.exists() else b""


def test_no_file_outgrows_its_noun() -> None:
    written = [path for path in own_python() if "migrations" not in path.parts]
    grown = {str(path.relative_to(TOP)): len(path.read_text().splitlines()) for path in written}
    assert {name: lines for name, lines in grown.items() if lines > bound_of(name)} == {}


def bound_of(name: str) -> int:
    return TEST_FILE_LINES_MAX if name.startswith("tests/") else FILE_LINES_MAX


def test_no_function_outgrows_a_screen() -> None:
    grown = []
    for path in own_python():
        if "migrations" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    grown.append(f"{path.relative_to(TOP)}:{node.lineno} {node.name} has {lines} lines")
    assert grown == []


BANNED = {
    "countdown or eta on a task": re.compile(r"\b(countdown|eta)="),
    "a canvas of Celery": re.compile(r"\bcelery\b.*\b(chord|group|chain)\b"),
    "revoke": re.compile(r"\.control\.revoke\("),
    "a mock of our own parts": re.compile(r"mock\.patch|monkeypatch\.setattr\("),
    "a test that is skipped": re.compile(r"pytest\.mark\.(skip|xfail)|pytest\.skip\("),
}


@pytest.mark.parametrize("what", BANNED)
def test_banned_constructs_are_absent(what: str) -> None:
    here = Path(__file__).resolve()
    found = [
        f"{path.relative_to(TOP)}:{number}"
        for path in own_python()
        if path != here and not (what.startswith("a mock") and "kvm" in path.parts)  # libvirt's own binding may be stood in for
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BANNED[what].search(line)
    ]
    assert found == []


def test_no_registry_host_and_no_path_of_a_machine_is_committed() -> None:
    hosts = re.compile("|".join(["py" + r"pi\.org", "python" + r"hosted\.org", "npm" + r"js\.org", "deb" + r"\.debian\.org"]))
    paths = re.compile(r"(^|[\s\"'=])/(work|root)/")
    found = []
    for path in tracked(".py", ".toml", ".txt", ".sh", ".json", ".yaml", ".yml", ".md", ".cfg", "Makefile", "run"):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if hosts.search(line) or paths.search(line):
                found.append(f"{path.relative_to(TOP)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_every_rpc_of_ours_has_a_deadline() -> None:
    """`stub.Verb(request)` without `timeout=` can hang for ever; the one place that calls agents passes it always."""
    source = (TOP / "controller/trimtab_controller/agents/grpc_client.py").read_text()
    calls = re.findall(r"getattr\(stub, verb\)\(([^)]*)\)", source)
    assert calls == ["request, timeout=timeout_s, wait_for_ready=waits_for_agent"]
