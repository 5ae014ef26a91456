"""`kill -9` of two writers that also prune, at random instants: every listed backup restores byte-identical."""

from pathlib import Path

from tests.unit.agent.backup.victims import campaign


def test_every_listed_backup_survives_kills_of_its_writers(tmp_path: Path) -> None:
    assert campaign(tmp_path, seed=11, rounds=12) > 0
