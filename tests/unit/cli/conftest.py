"""A fake controller over TLS, and the command run against it."""

import datetime
import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.unit.cli.fake_controller import TOKEN, FakeController
from trimtab_controller.cli.main import main

RUN_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    out: str
    err: str


class Trimtab:
    """Runs the command in this process, as its entry point does."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Outcome:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        captured = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)


@dataclass(frozen=True, slots=True)
class Program:
    """Runs the command as a process of its own."""

    environment: Mapping[str, str]

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Return the running process, interruptible wherever the tests run; its caller ends it."""
        return subprocess.Popen(
            ["env", "--default-signal=INT", sys.executable, "-m", "trimtab_controller.cli.main", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str, typed: str = "") -> Outcome:
        """Run to the end with `typed` on standard input."""
        finished = subprocess.run(
            [sys.executable, "-m", "trimtab_controller.cli.main", *arguments],
            env=self.environment,
            input=typed,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        return Outcome(finished.returncode, finished.stdout, finished.stderr)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key in one file; it is its own CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fake controller")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "controller.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def controller(certificate: Path) -> Iterator[FakeController]:
    started = FakeController(certificate)
    yield started
    started.close()


@pytest.fixture
def environment(tmp_path: Path, controller: FakeController, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the command at the fake controller; the value is the place of the contexts file, which is not there yet."""
    for name in [name for name in os.environ if name.startswith("TRIMTAB_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "config" / "config.toml"
    monkeypatch.setenv("TRIMTAB_CONFIG", str(config))
    monkeypatch.setenv("TRIMTAB_URL", controller.url)
    monkeypatch.setenv("TRIMTAB_TOKEN", TOKEN)
    monkeypatch.setenv("TRIMTAB_CA", str(certificate))
    return config


@pytest.fixture
def trimtab(environment: Path, capsys: pytest.CaptureFixture[str]) -> Trimtab:
    return Trimtab(capsys)


@pytest.fixture
def program(environment: Path) -> Program:
    return Program(dict(os.environ))
