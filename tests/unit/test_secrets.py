"""Keys made by the controller are the agents' keys; what is sealed opens in its own row, with its own secret, and nowhere else."""

import stat
import threading
from pathlib import Path

import pytest

from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_controller import repository_keys
from trimtab_controller.secret_box import FILE_NAME, SecretBox
from trimtab_protos.errors import Conflict, InvalidRequest, Unavailable


def test_both_sides_spell_and_name_a_key_alike() -> None:
    text = repository_keys.new_key()
    key = RepositoryKey.parse(text)
    assert (key.text, key.id) == (text, repository_keys.key_id(text))
    assert repository_keys.parse_key(f"  {text.upper().replace('TTK1', 'ttk1')}\n") == text


@pytest.mark.parametrize("wrong", ["", "ttk1-", "ttk1-abc", "key", "ttk1-" + "1" * 56])
def test_a_mistyped_key_is_refused_with_what_is_wrong(wrong: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        repository_keys.parse_key(wrong)
    assert refused.value.code == "repository-key-malformed"
    text = repository_keys.new_key()
    with pytest.raises(InvalidRequest, match="mistyped"):
        repository_keys.parse_key(text[:-2] + ("b" if text[-2] != "b" else "c") + text[-1])


def test_what_was_sealed_opens_in_its_own_row_only_and_with_its_key_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ours, other = SecretBox(tmp_path / "a"), SecretBox(tmp_path / "b")
    sealed = ours.seal("text", place="repo-1")
    assert ours.open(sealed, place="repo-1") == "text"
    assert "text" not in sealed
    assert ours.fleet_id != other.fleet_id
    for box, place in ((ours, "repo-2"), (other, "repo-1")):
        with pytest.raises(Conflict) as refused:
            box.open(sealed, place=place)
        assert refused.value.code == "secret-unreadable"
    key = tmp_path / "a" / FILE_NAME
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.write_bytes(b"short")
    with pytest.raises(Unavailable, match="5 of 32 bytes"):
        ours.open(sealed, place="repo-1")


def test_processes_that_come_at_once_take_one_key(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(SecretBox(tmp_path).fleet_id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
