"""The connection: trust, repeats that do nothing twice, uploads that are streamed, and what failure is called."""

import base64
import hashlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Program, Trimtab
from tests.unit.cli.fake_controller import TOKEN, Answer, FakeController, Seen, operation, page, problem, vm
from trimtab_controller.cli.client import Client
from trimtab_controller.cli.errors import CommandFailed, ExitCode
from trimtab_controller.cli.nouns.vm_console import harmless
from trimtab_controller.cli.uploading import Source

VMS = "/v1/projects/default/vms"
IMAGES = "/v1/projects/default/images"
UPLOADS = "/v1/projects/default/uploads"


@pytest.fixture
def client(controller: FakeController, certificate: Path) -> Iterator[Client]:
    opened = Client(controller.url, token=TOKEN, ca_path=str(certificate), timeout_s=1.0)
    yield opened
    opened.close()


@pytest.fixture
def silent_address() -> Iterator[str]:
    """A port that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"


def test_an_untrusted_certificate_is_refused_before_the_token_is_sent(
    trimtab: Trimtab, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRIMTAB_CA")
    found = trimtab("vm", "list")
    assert found.code == 9
    assert "cannot be trusted" in found.err
    assert "next: trimtab login" in found.err
    assert controller.seen == []


def test_a_certificate_of_another_name_is_refused(
    trimtab: Trimtab, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_URL", controller.url.replace("127.0.0.1", "localhost"))
    assert trimtab("vm", "list").code == 9
    assert controller.seen == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:8443", "https://", "https://a:b"])
def test_only_https_addresses_are_taken(trimtab: Trimtab, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("TRIMTAB_URL", url)
    found = trimtab("vm", "list")
    assert found.code == 2
    assert "https://controller.example:8443" in found.err


def test_a_controller_that_is_down_has_exit_code_10(trimtab: Trimtab, controller: FakeController) -> None:
    controller.close()
    found = trimtab("vm", "list", "-o", "json")
    assert found.code == 10
    assert json.loads(found.err)["code"] == "controller-unreachable"


def test_a_server_that_is_no_controller_is_named(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", VMS, Answer("<html>hello</html>"))
    found = trimtab("vm", "list")
    assert found.code == 1
    assert "is this the address of a Trimtab controller?" in found.err


def test_silence_is_a_deadline_and_says_how_to_learn_the_outcome(silent_address: str, certificate: Path) -> None:
    silent = Client(silent_address, token=TOKEN, ca_path=str(certificate), timeout_s=0.2)
    with pytest.raises(CommandFailed) as failed:
        silent.send("POST", VMS, {}, request_id="0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11")
    assert failed.value.exit_code is ExitCode.TIMEOUT
    assert "--request-id 0b8f5c0e-6d2f-4b42-9a3e-7f1f3c1f9a11" in failed.value.message


def test_a_connection_closed_while_idle_is_opened_again_with_the_same_key(client: Client, controller: FakeController) -> None:
    controller.on("GET", "/v1/version", Answer({"version": "1"}))
    controller.on("POST", VMS, Answer(is_dropped=True), Answer({"operation": operation()}))
    client.get("/v1/version")
    assert client.send("POST", VMS, {"name": "web1"})["operation"]["id"] == "op-01"
    first, second = controller.asked("POST", VMS)
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert first.body == second.body


def test_a_new_connection_that_breaks_is_not_tried_again(client: Client, controller: FakeController) -> None:
    controller.on("POST", VMS, Answer(is_dropped=True))
    with pytest.raises(CommandFailed) as failed:
        client.send("POST", VMS, {})
    assert failed.value.exit_code is ExitCode.UNAVAILABLE
    assert len(controller.seen) == 1


def test_a_busy_controller_is_asked_again_when_it_says_so(client: Client, controller: FakeController) -> None:
    busy = Answer(problem(503, "no-engine", "unavailable", "busy").document, status=503, headers={"Retry-After": "0"})
    controller.on("POST", VMS, busy, busy, Answer({"operation": operation()}))
    assert client.send("POST", VMS, {})["operation"]["id"] == "op-01"
    assert len({one.headers["idempotency-key"] for one in controller.seen}) == 1
    controller.on("POST", VMS, busy)
    with pytest.raises(CommandFailed) as failed:
        client.send("POST", VMS, {})
    assert failed.value.exit_code is ExitCode.UNAVAILABLE


def test_a_refusal_that_was_long_in_coming_is_believed(controller: FakeController, certificate: Path) -> None:
    busy = Answer(problem(503, "host-unreachable", "unavailable", "cut").document, status=503, headers={"Retry-After": "0"})
    controller.on("GET", VMS, busy)
    impatient = Client(controller.url, token=TOKEN, ca_path=str(certificate), busy_said_within_s=0.0)
    with pytest.raises(CommandFailed) as failed:
        impatient.get(VMS)
    impatient.close()
    assert failed.value.exit_code is ExitCode.UNAVAILABLE
    assert len(controller.seen) == 1


def test_a_long_pause_is_the_users_to_decide(client: Client, controller: FakeController) -> None:
    busy = Answer(problem(429, "too-fast", "rate_limited", "slow down").document, status=429, headers={"Retry-After": "60"})
    controller.on("GET", VMS, busy)
    with pytest.raises(CommandFailed):
        client.get(VMS)
    assert len(controller.seen) == 1


def prepare_import(controller: FakeController) -> list[Seen]:
    """Answer everything of an import; the value collects the uploads."""
    uploads: list[Seen] = []

    def store(seen: Seen) -> Answer:
        uploads.append(seen)
        digest = hashlib.sha256(seen.body).hexdigest()
        return Answer({"upload_id": "up-1", "size_bytes": len(seen.body), "sha256": digest}, status=201)

    ready = {"id": "img-1", "name": "micro", "state": "ready", "virtual_size_bytes": 64 << 20}
    controller.on("GET", f"{IMAGES}/micro", problem(404, "image-not-found", "not_found", "no image micro"), Answer(ready))
    controller.on("POST", UPLOADS, store)
    controller.on("POST", IMAGES, Answer({"operation": operation("done", kind="image.import")}, status=202))
    return uploads


def test_import_uploads_a_file_and_makes_an_image_of_it(trimtab: Trimtab, controller: FakeController, tmp_path: Path) -> None:
    uploads = prepare_import(controller)
    content = b"QFI\xfb" + bytes(range(256)) * 20_000
    source = tmp_path / "guest.qcow2"
    source.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    found = trimtab("image", "import", "micro", str(source), "--sha256", digest.upper(), "--pool", "fast")
    assert (found.code, found.out) == (0, "image micro is ready, 64 MiB\n")
    assert "sending micro" in found.err
    assert uploads[0].body == content
    assert uploads[0].headers["x-content-sha256"] == digest
    assert controller.asked("POST", IMAGES)[0].document == {
        "name": "micro",
        "kind": "disk",
        "format": "qcow2",
        "pool": "fast",
        "source": {"upload_id": "up-1"},
    }


def test_an_upload_is_never_in_memory_as_a_whole() -> None:
    size_bytes = 64 << 20
    with tempfile.TemporaryFile() as stream:
        stream.truncate(size_bytes)
        source = Source(stream, size_bytes, on_progress=lambda _sent: None)
        tracemalloc.start()
        try:
            sent = sum(len(chunk) for chunk in source.chunks())
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert sent == size_bytes
    assert peak_bytes < 8 << 20


def test_an_upload_that_is_refused_is_not_sent(client: Client, controller: FakeController) -> None:
    refusal = problem(413, "body-too-large", "invalid_request", "at most 1 MiB")
    controller.on("POST", UPLOADS, Answer(refusal.document, status=413, is_early=True))
    read: list[int] = []
    with tempfile.TemporaryFile() as stream:
        stream.truncate(64 << 20)
        with pytest.raises(CommandFailed) as failed:
            client.upload(UPLOADS, stream, size_bytes=64 << 20, on_progress=read.append)
    assert (failed.value.code, failed.value.exit_code) == ("body-too-large", ExitCode.USAGE)
    assert read == []


def test_an_upload_that_arrives_changed_is_refused(client: Client, controller: FakeController, tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"abc")
    controller.on("POST", UPLOADS, Answer({"upload_id": "up-1", "size_bytes": 3, "sha256": "0" * 64}))
    with source.open("rb") as stream, pytest.raises(CommandFailed) as failed:
        client.upload(UPLOADS, stream, size_bytes=3, on_progress=lambda _sent: None)
    assert failed.value.code == "upload-corrupted"


@pytest.mark.parametrize(("declared", "code"), [(4, "file-truncated"), (2, "file-changed")])
def test_a_file_that_changes_while_it_is_sent_is_refused(
    client: Client, controller: FakeController, tmp_path: Path, declared: int, code: str
) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"abc")
    controller.on("POST", UPLOADS, Answer({"upload_id": "up-1"}))
    with source.open("rb") as stream, pytest.raises(CommandFailed) as failed:
        client.upload(UPLOADS, stream, size_bytes=declared, on_progress=lambda _sent: None)
    assert failed.value.code == code


def test_a_taken_name_is_said_before_anything_is_sent(trimtab: Trimtab, controller: FakeController, tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"abc")
    controller.on("GET", f"{IMAGES}/micro", Answer({"id": "img-1", "name": "micro"}))
    found = trimtab("image", "import", "micro", str(source))
    assert found.code == 5
    assert "never overwritten" in found.err
    assert controller.asked("POST", UPLOADS) == []


@pytest.mark.parametrize(
    ("file_name", "content", "expected"),
    [
        ("a.img", b"QFI\xfb....", ("disk", "qcow2")),
        ("a.img", b"plain", ("disk", "raw")),
        ("a.iso", b"\0" * 0x8001 + b"CD001", ("iso", "iso")),
    ],
)
def test_the_format_is_told_by_the_file(
    trimtab: Trimtab, controller: FakeController, tmp_path: Path, file_name: str, content: bytes, expected: tuple[str, str]
) -> None:
    prepare_import(controller)
    (tmp_path / file_name).write_bytes(content)
    assert trimtab("image", "import", "micro", str(tmp_path / file_name)).code == 0
    sent = controller.asked("POST", IMAGES)[0].document
    assert (sent["kind"], sent["format"]) == expected


def test_a_file_of_unknown_format_is_not_guessed(trimtab: Trimtab, controller: FakeController, tmp_path: Path) -> None:
    (tmp_path / "a.vmdk").write_bytes(b"KDMV")
    found = trimtab("image", "import", "micro", str(tmp_path / "a.vmdk"))
    assert found.code == 2
    assert "--format raw, qcow2 or iso" in found.err
    assert controller.seen == []


def test_the_serial_log_is_read_to_its_end(program: Program, controller: FakeController) -> None:
    log = b"boot\r\n\x1b[31mred\x1b[0m\nlogin: " + bytes([0xFF])

    def piece(seen: Seen) -> Answer:
        offset = int(seen.query["offset"])
        part = log[offset : offset + 9]
        return Answer({"content_base64": base64.b64encode(part).decode(), "next_offset": offset + len(part)})

    controller.on("GET", f"{VMS}/web1/console", piece)
    command = [sys.executable, "-m", "trimtab_controller.cli.main", "vm", "console", "web1", "--log"]
    finished = subprocess.run(command, env=program.environment, capture_output=True, timeout=30, check=False)
    assert (finished.returncode, finished.stderr) == (0, b"")
    assert finished.stdout == log


@pytest.mark.parametrize(
    ("text", "shown", "held"),
    [
        (b"\x1b[31mred\x1b[0m\r\n", b"red\n", b""),
        (b"a\x1b]0;title\x07b\x1b]52;c;evil\x1b\\c", b"abc", b""),
        (b"a\x1b[3", b"a", b"\x1b[3"),
        (b"a\x1bPq#0\x1b\\b\x1b(Bc", b"abc", b""),
        (b"a\x1b" + b"[" + b"1" * 300, b"a[" + b"1" * 300, b""),
        ("zürich\tok\n".encode(), "zürich\tok\n".encode(), b""),
        (b"\xc2\x9b31m", b"31m", b""),
    ],
)
def test_what_a_terminal_obeys_is_taken_out(text: bytes, shown: bytes, held: bytes) -> None:
    assert harmless(text) == (shown, held)


def test_many_pages_cost_one_handshake(client: Client, controller: FakeController) -> None:
    controller.on("GET", VMS, *[page(vm(str(i)), token=str(i)) for i in range(5)], page())
    assert len(list(client.pages(VMS))) == 5
    assert len({one.connection for one in controller.seen}) == 1


def test_the_next_page_is_on_its_way_before_this_one_is_used(client: Client, controller: FakeController) -> None:
    is_asked = threading.Event()

    def second(_seen: Seen) -> Answer:
        is_asked.set()
        return page(vm("b"))

    controller.on("GET", VMS, page(vm("a"), token="b"), second)
    items = client.pages(VMS)
    assert next(items)["name"] == "a"
    assert is_asked.wait(10)
    assert [one["name"] for one in items] == ["b"]


@pytest.mark.parametrize("pages", [[2, 2, 2], [1, 3, 2], [6]])
@pytest.mark.parametrize("is_token_first", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 5, 6, 9, None])
def test_a_limit_gives_that_many_however_the_server_cuts_its_pages(
    client: Client, controller: FakeController, pages: list[int], is_token_first: bool, limit: int | None
) -> None:
    """Also behind something that writes the answer's fields in another order."""
    names = iter("abcdef")
    cut = [[vm(next(names)) for _ in range(size)] for size in pages]
    answers = []
    for number, items in enumerate(cut, 1):
        token = str(number) if number < len(cut) else ""
        answers.append(
            Answer({"next_page_token": token, "items": items} if is_token_first else {"items": items, "next_page_token": token})
        )
    controller.on("GET", VMS, *answers)
    assert "".join(one["name"] for one in client.pages(VMS, limit=limit)) == "abcdef"[:limit]


@pytest.mark.parametrize("lost", [Answer({}, is_dropped=True), Answer(status=429, headers={"Retry-After": "0"})])
def test_a_page_that_was_asked_for_ahead_and_is_not_answered_is_asked_for_again(
    client: Client, controller: FakeController, lost: Answer
) -> None:
    controller.on("GET", VMS, page(vm("a"), token="b"), lost, page(vm("b")))
    assert [one["name"] for one in client.pages(VMS)] == ["a", "b"]


def test_a_list_that_is_left_early_leaves_a_client_that_works(client: Client, controller: FakeController) -> None:
    controller.on("GET", VMS, page(vm("a"), token="b"), page(vm("b")))
    controller.on("GET", f"{VMS}/c", Answer(vm("c")))
    items = client.pages(VMS)
    assert isinstance(items, Generator)
    assert next(items)["name"] == "a"
    items.close()
    assert client.get(f"{VMS}/c")["name"] == "c"


def test_a_stream_to_a_dead_port_is_unavailable(certificate: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"https://127.0.0.1:{listener.getsockname()[1]}"
    dead = Client(address, token=TOKEN, ca_path=str(certificate))
    with pytest.raises(CommandFailed) as failed:
        next(dead.stream("/v1/events"))
    assert failed.value.exit_code is ExitCode.UNAVAILABLE


def test_an_unreadable_ca_is_named(trimtab: Trimtab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    monkeypatch.setenv("TRIMTAB_CA", str(tmp_path / "ca.pem"))
    found = trimtab("vm", "list")
    assert found.code == 2
    assert "PEM" in found.err
