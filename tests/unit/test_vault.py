"""Keys made by the controller are the agents' keys; what is sealed opens in its own row, with its own secret, and nowhere else."""

import stat
import threading
from pathlib import Path

import pytest

from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_controller import vault
from trimtab_controller.vault import Vault
from trimtab_protos.errors import InvalidRequest, Unavailable


def test_both_sides_spell_and_name_a_key_alike() -> None:
    text = vault.new_key()
    key = RepositoryKey.parse(text)
    assert (key.text, key.id) == (text, vault.key_id(text))
    assert vault.parse_key(f"  {text.upper().replace('TTK1', 'ttk1')}\n") == text


@pytest.mark.parametrize("wrong", ["", "ttk1-", "ttk1-abc", "key", "ttk1-" + "1" * 56])
def test_a_mistyped_key_is_refused_with_what_is_wrong(wrong: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        vault.parse_key(wrong)
    assert refused.value.code == "repository-key-malformed"
    text = vault.new_key()
    with pytest.raises(InvalidRequest, match="mistyped"):
        vault.parse_key(text[:-2] + ("b" if text[-2] != "b" else "c") + text[-1])


def test_what_was_sealed_opens_in_its_own_row_only_and_with_its_secret_only(tmp_path: Path) -> None:
    ours, other = Vault(tmp_path / "a"), Vault(tmp_path / "b")
    sealed = ours.seal("text", owner="repo-1")
    assert ours.open(sealed, owner="repo-1") == "text"
    assert "text" not in sealed
    for box, owner in ((ours, "repo-2"), (other, "repo-1")):
        with pytest.raises(Unavailable) as refused:
            box.open(sealed, owner=owner)
        assert refused.value.code == "fleet-secret-wrong"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert ours.fleet_id != other.fleet_id
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(Unavailable, match="5 of 32 bytes"):
        ours.open(sealed, owner="repo-1")


def test_processes_that_come_at_once_take_one_secret(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(Vault(tmp_path / "secret").fleet_id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
