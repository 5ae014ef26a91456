"""A fleet per test, on SQLite and PostgreSQL in turn, and one on SQLite alone for the large matrices."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.operations.emptied import empty
from tests.operations.kit import FleetStory
from tests.operations.wire import Workshop
from trimtab_controller.store.database import Database


@pytest.fixture(scope="session")
def workshop() -> Iterator[Workshop]:
    opened = Workshop()
    yield opened
    opened.close()


@pytest.fixture
def socket_directory() -> Iterator[Path]:
    """A directory with a short path: that of a unix socket has at most 107 characters."""
    directory = Path(tempfile.mkdtemp(prefix="tt-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def new_story(workshop: Workshop, socket_directory: Path, database: Database) -> Iterator[Callable[..., FleetStory]]:
    """Build a fleet with wishes of the test's own, such as its number of hosts."""
    made: list[FleetStory] = []

    def build(**wishes: int) -> FleetStory:
        made.append(FleetStory(database, workshop, socket_directory, **wishes))
        return made[-1]

    yield build
    for story in made:
        story.close()


@pytest.fixture(scope="session")
def matrix_database(sqlite_template: Path, memory_directory: Path) -> Iterator[Database]:
    """A database that many tests use one after the other, so that statements are compiled once."""
    path = memory_directory / "matrix.db"
    shutil.copyfile(sqlite_template, path)
    opened = Database(f"sqlite:///{path}")
    yield opened
    opened.close()


@pytest.fixture
def shares_commits() -> bool:
    """Whether drivers of the matrices share commits as the product's do; tests give it as a parameter of theirs."""
    return False


@pytest.fixture
def matrix_story(
    workshop: Workshop, socket_directory: Path, matrix_database: Database, shares_commits: bool
) -> Iterator[FleetStory]:
    """A fleet on SQLite for a test that runs many operations on it."""
    empty(matrix_database)
    story = FleetStory(matrix_database, workshop, socket_directory, shares_commits=shares_commits)
    yield story
    story.close()


@pytest.fixture
def story(new_story: Callable[..., FleetStory]) -> FleetStory:
    """Three hosts that are up, a shared and a local pool, a network and an image."""
    return new_story()
