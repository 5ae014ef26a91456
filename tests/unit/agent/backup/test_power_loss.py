"""The power fails at any sync of a life of backups and prunes: what was listed is whole, and what was reported is listed."""

import random
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.agent.backup.kit import FLEET, KEY, Disk, back_up, reopen, restore
from tests.unit.agent.backup.power_loss import Recorder, after_loss
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.repository.repository import create_repository
from trimtab_agent.backup.repository.verify import verify_all
from trimtab_protos.errors import TrimtabError

STEPS = ("backup", "backup", "forget", "prune", "backup", "prune", "prune", "backup")


class Life:
    """Steps on a folder, and what was promised when."""

    def __init__(self, root: Path, seed: int, *, forgets: str = "") -> None:
        self.power = Recorder(root, forgets=forgets)
        self.clock = ManualClock()
        self.disk = Disk(40, tail=7, seed=seed)
        self.content: dict[str, bytes] = {}
        self.listed_since: dict[str, int] = {}
        """How many syncs there had been when a backup was reported as made."""
        self.forgotten_since: dict[str, int] = {}
        self.blobs = FolderBlobs(root, sync=self.power)
        create_repository(self.blobs, KEY, fleet_id=FLEET, project_id="", clock=self.clock)
        self.began = len(self.power.losses)

    def step(self, name: str) -> None:
        repository = reopen(self.blobs, clock=self.clock)
        match name:
            case "backup":
                for _ in range(3):
                    self.disk.write(self.disk.random.randrange(self.disk.chunk_count))
                base = max(self.content.keys() - self.forgotten_since.keys(), default=None)
                backup_id = f"bk-{len(self.content) + 1}"
                self.content[backup_id] = bytes(self.disk.content)
                back_up(repository, self.disk, backup_id, base_id=base)
                self.listed_since[backup_id] = len(self.power.losses)
            case "forget":
                victim = min(self.content.keys() - self.forgotten_since.keys())
                self.forgotten_since[victim] = len(self.power.losses)
                repository.forget("vm-1", victim)
            case "prune":
                prune(repository, grace_s=0)
                self.clock.advance(4000)


def check_after(life: Life, number: int, target: Path, dice: random.Random, *, kept: float) -> None:
    """Lose the power at the `number`-th sync; then everything that is listed restores, and what was promised is listed."""
    after_loss(life.power.losses[number], target, dice, kept=kept)
    clock = ManualClock()
    clock.advance(1_000_000)
    blobs = FolderBlobs(target, sync=lambda _descriptor: None)
    with closing(reopen(blobs, clock=clock)) as repository:
        listing = repository.list_backups()
        listed = {manifest.backup_id for manifest in listing.manifests}
        assert listing.unreadable == {}, number
        promised = {backup_id for backup_id, since in life.listed_since.items() if since <= number}
        forgotten = {backup_id for backup_id, since in life.forgotten_since.items() if since <= number}
        assert promised - forgotten <= listed, f"a reported backup is gone after a loss of power at sync {number}"
        assert verify_all(repository).damaged_backups == [], number
        for backup_id in listed:
            assert restore(repository, backup_id) == life.content[backup_id], (number, backup_id)


def live(root: Path, seed: int, *, losses: int | None = None, forgets: str = "") -> int:
    """Live once, lose the power at each sync (at `losses` of them where given), and return how many were looked at."""
    dice = random.Random(seed)
    root.mkdir()
    (root / "repository").mkdir()
    life = Life(root / "repository", seed, forgets=forgets)
    for name in STEPS:
        life.step(name)
    numbers = list(range(life.began, len(life.power.losses)))
    if losses is not None:
        numbers = sorted(dice.sample(numbers, min(losses, len(numbers))))
    for number in numbers:
        for kept in (0.0, 0.5, 1.0):
            check_after(life, number, root / f"after-{number}-{kept}", dice, kept=kept)
    return 3 * len(numbers)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_loss_of_power_at_any_sync_loses_nothing_that_was_reported(seed: int, tmp_path: Path) -> None:
    assert live(tmp_path / "life", seed, losses=40) > 60


@pytest.mark.parametrize("forgets", ["files", "folders"])
def test_the_check_sees_a_store_that_forgets_to_sync(forgets: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, TrimtabError)):
        live(tmp_path / "life", 1, forgets=forgets)
