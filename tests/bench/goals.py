"""Goals of a bench: what was measured, its limit, and the end with 1 that tells `make bench` of a missed one."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.accounts import table


@dataclass(frozen=True, slots=True)
class Goal:
    """`figure` may not be more than `limit`; with `is_least` not less."""

    what: str
    figure: float
    limit: float
    is_least: bool = False
    instead: "Goal | None" = None
    """Another one that is as good: met where either is."""

    @property
    def is_met(self) -> bool:
        is_own = self.figure >= self.limit if self.is_least else self.figure <= self.limit
        return is_own or (self.instead is not None and self.instead.is_met)


def goals_table(goals: Sequence[Goal]) -> str:
    """Return each goal with its figure and whether it was met."""
    rows = [["goal", "figure", "limit", ""]]
    for goal in goals:
        rows.append([*_cells(goal), "met" if goal.is_met else "MISSED"])
        if goal.instead is not None:
            rows.append([*_cells(goal.instead, prefix="… or "), ""])
    return table("Goals", rows)


def end(goals: Sequence[Goal]) -> None:
    """Print the goals to the standard error, since a bench may print JSON, and end with 1 where one was missed."""
    sys.stderr.write(goals_table(goals) + "\n")
    if not all(goal.is_met for goal in goals):
        sys.exit(1)


def _cells(goal: Goal, *, prefix: str = "") -> list[str]:
    return [prefix + goal.what, f"{goal.figure:.2f}", f"{'at least' if goal.is_least else 'at most'} {goal.limit:g}"]
