"""What controllers gave to a host, as its journal remembers it."""

from pathlib import Path

from trimtab_agent.given_numbers import Given, GivenNumbers
from trimtab_agent.journal import JournalFile


def test_the_highest_numbers_outlive_the_process_and_only_grow(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "journal")
    numbers = GivenNumbers(file, "host-1")
    assert numbers.highest == Given(0, 0)
    numbers.take(lease_number=41)
    numbers.take(database_mark=7)
    numbers.take(lease_number=40, database_mark=6)
    file.close()
    again = JournalFile(tmp_path / "journal")
    assert GivenNumbers(again, "host-1").highest == Given(lease_number=41, database_mark=7)
    again.close()


def test_another_host_id_remembers_nothing_of_the_first(tmp_path: Path) -> None:
    """A machine that was removed and joins anew is another host: its numbers begin anew in the database, too."""
    file = JournalFile(tmp_path / "journal")
    GivenNumbers(file, "host-1").take(lease_number=41, database_mark=7)
    assert GivenNumbers(file, "host-2").highest == Given(0, 0)
    file.close()


def test_a_journal_of_an_older_release_is_taken_as_it_is(tmp_path: Path) -> None:
    first = JournalFile(tmp_path / "journal")
    first.submit(lambda connection: connection.execute("DROP TABLE given")).result()
    first.close()
    file = JournalFile(tmp_path / "journal")
    assert GivenNumbers(file, "host-1").highest == Given(0, 0)
    file.close()
