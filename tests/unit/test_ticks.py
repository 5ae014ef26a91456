"""The reader of a guest's counter sees each way in which it might not have counted on."""

import pytest

from tests.lab.ticks import breaks, spoken


def log(*ticks: tuple[int, float], end: str = "\n") -> str:
    return "[    1.0] booted\n" + "\n".join(f"tick {number} uptime {uptime} host a" for number, uptime in ticks) + end


WHOLE = [(number, number + 0.5) for number in range(3, 13)]


def test_a_guest_that_counts_on_has_no_breaks_between_any_two_of_its_numbers() -> None:
    text = log(*WHOLE)
    assert breaks(text, first=3, last=12) == []
    assert all(breaks(text, first=first, last=last) == [] for first in range(3, 13) for last in range(first, 13))


@pytest.mark.parametrize(
    ("ticks", "said"),
    [
        ([one for one in WHOLE if one[0] != 7], ["after 6 came 8"]),
        ([*WHOLE[:4], *WHOLE[3:]], ["after 6 came 6", "at 6 the uptime was 6.5 after 6.5: it was started anew"]),
        ([*WHOLE[:4], *((number, number - 6.0) for number in range(7, 13))], ["at 7 the uptime was 1.0 after 6.5: it was started anew"]),
        ([*WHOLE[:5], *((number, 20.0 + number) for number in range(5, 13))], ["after 7 came 5"]),
    ],
    ids=["left out", "said twice", "restarted", "went back"],
)  # fmt: skip
def test_a_number_that_is_not_the_next_one_is_found(ticks: list[tuple[int, float]], said: list[str]) -> None:
    assert breaks(log(*ticks), first=3, last=12) == said


def test_ends_that_were_never_said_are_found() -> None:
    assert breaks(log(*WHOLE), first=2, last=13) == ["2 was not said", "13 was not said"]
    assert breaks("", first=1, last=1) == ["1 was not said", "1 was not said"]


def test_a_line_that_has_not_ended_is_not_read() -> None:
    assert spoken(log((3, 3.5), (4, 12.5), end="")[: -len("2.5 host a")]) == [(3, 3.5)]
