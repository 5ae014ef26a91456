"""The bootstrap script refuses before it changes anything, and says what it would do."""

import os
import subprocess
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
BOOTSTRAP = TOP / "ops" / "bootstrap.sh"


def bootstrap(*arguments: str, os_release: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"TRIMTAB_OS_RELEASE": str(os_release)} if os_release else {})}
    command = [str(BOOTSTRAP), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=30, env=environment)


def test_unsupported_system_is_refused_by_name(tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text('ID=ubuntu\nVERSION_ID="24.04"\n')
    refused = bootstrap(os_release=release)
    assert refused.returncode == 1
    assert "this system is 'ubuntu 24.04'; supported is Debian 12" in refused.stderr
    assert "Nothing was changed." in refused.stderr


def test_unknown_argument_is_refused() -> None:
    refused = bootstrap("--force")
    assert refused.returncode == 1
    assert "unknown argument '--force'" in refused.stderr


def test_plan_names_packages_environment_and_downloads() -> None:
    planned = bootstrap("--plan")
    assert planned.returncode == 0
    assert "Debian packages" in planned.stdout
    assert str(TOP / ".venv") in planned.stdout
    assert "linux-image-cloud-amd64" in planned.stdout


def test_every_package_is_listed_once_with_its_reason() -> None:
    texts = [(TOP / "ops" / name).read_text() for name in ("packages.txt", "bench-packages.txt")]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
    names = [line.split()[0] for line in lines]
    assert sorted(set(names)) == sorted(names)
    assert [line for line in lines if not line.partition("#")[2].strip()] == []
