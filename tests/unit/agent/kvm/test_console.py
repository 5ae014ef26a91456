"""Serial logs keep to their cap, and offsets keep their meaning through renames, cuts and restarts."""

from pathlib import Path

import pytest

from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_protos.errors import InvalidRequest, NotFound

VM = "vm-01hweb"


class Guest:
    """Writes as QEMU does: one descriptor, kept open, appending; `rename` is what virtlogd does at its limit."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.file = self.path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        self.file.write(text.encode())

    def rename(self) -> None:
        for number in (1, 0):
            old = Path(f"{self.path}.{number}")
            if old.exists():
                old.rename(f"{self.path}.{number + 1}")
        self.path.rename(f"{self.path}.0")
        self.file.close()
        self.file = self.path.open("ab", buffering=0)


@pytest.fixture
def logs(tmp_path: Path) -> ConsoleLogs:
    made = ConsoleLogs(tmp_path)
    made.prepare(VM, max_bytes=8192)
    return made


@pytest.fixture
def guest(logs: ConsoleLogs) -> Guest:
    return Guest(logs.path_of(VM))


def size_on_disk(logs: ConsoleLogs) -> int:
    return sum(path.stat().st_size for path in Path(logs.path_of(VM)).parent.glob("*.serial.log*"))


def test_offsets_continue_a_reading(logs: ConsoleLogs, guest: Guest) -> None:
    guest.write("abcdef")
    assert logs.read(VM, 0, 4) == (b"abcd", 4)
    assert logs.read(VM, 4, 100) == (b"ef", 6)
    assert logs.read(VM, 6, 100) == (b"", 6)
    guest.write("gh")
    assert logs.read(VM, 6, 100) == (b"gh", 8)
    assert logs.read(VM, -3, 100) == (b"fgh", 8)
    assert logs.read(VM, -100, 100) == (b"abcdefgh", 8)
    assert logs.read(VM, 50, 100) == (b"", 8)


def test_a_log_without_a_byte_is_empty_and_one_without_a_domain_is_not_found(logs: ConsoleLogs) -> None:
    assert logs.read(VM, 0, 100) == (b"", 0)
    with pytest.raises(NotFound):
        logs.read("vm-other", 0, 100)
    with pytest.raises(InvalidRequest):
        logs.read(VM, 0, 0)


def test_offsets_survive_a_rename(logs: ConsoleLogs, guest: Guest) -> None:
    guest.write("first")
    assert logs.read(VM, 0, 100) == (b"first", 5)
    guest.rename()
    guest.write("second")
    assert logs.read(VM, 3, 100) == (b"stsecond", 11)
    guest.rename()
    guest.rename()
    guest.write("third")
    assert logs.read(VM, 5, 100) == (b"secondthird", 16)
    assert ConsoleLogs(Path(logs.path_of(VM)).parent).read(VM, 11, 100) == (b"third", 16)


def test_a_flood_is_cut_and_what_is_left_is_the_newest(logs: ConsoleLogs, guest: Guest) -> None:
    lines = [f"line {number:06}\n" for number in range(5000)]
    for number, line in enumerate(lines):
        guest.write(line)
        if number % 700 == 0:
            logs.bound(VM)
    logs.bound(VM)
    assert size_on_disk(logs) <= 8192
    text = "".join(lines)
    content, end = logs.read(VM, 0, 8192)
    assert end == len(text)
    assert text.endswith(content.decode())
    assert len(content) >= 4096
    guest.write("after")
    assert logs.read(VM, end, 100) == (b"after", end + 5)


def test_old_renamed_logs_go_first(logs: ConsoleLogs, guest: Guest) -> None:
    for letter in "abcd":
        guest.write(letter * 3000)
        logs.bound(VM)
        guest.rename()
    guest.write("e")
    logs.bound(VM)
    content, end = logs.read(VM, 0, 20000)
    assert end == 12001
    assert content == b"c" * 3000 + b"d" * 3000 + b"e"


def test_a_log_that_somebody_emptied_goes_on_counting(logs: ConsoleLogs, guest: Guest) -> None:
    guest.write("0123456789")
    logs.read(VM, 0, 1)
    guest.file.truncate(0)
    guest.write("abc")
    assert logs.read(VM, 10, 100) == (b"abc", 13)


def test_offsets_grow_even_when_every_known_file_is_gone(logs: ConsoleLogs, guest: Guest) -> None:
    guest.write("0123456789")
    _, before = logs.read(VM, 0, 100)
    guest.rename()
    guest.write("x")
    guest.rename()
    for number in (0, 1):
        Path(f"{guest.path}.{number}").unlink()
    guest.write("y")
    content, after = logs.read(VM, before, 100)
    assert content == b"y"
    assert after > before


def test_remove_forgets_all(logs: ConsoleLogs, guest: Guest) -> None:
    guest.write("x")
    guest.rename()
    assert logs.known() == (VM,)
    logs.remove(VM)
    assert logs.known() == ()
    assert list(Path(guest.path).parent.iterdir()) == []


def test_a_link_in_the_logs_place_is_not_followed(logs: ConsoleLogs, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    Path(logs.path_of(VM)).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic"):
        logs.read(VM, 0, 100)
