"""One scenario in as many variants as its sentences need; each is played once, with the invariants checked after every event."""

from collections.abc import Callable, Mapping
from typing import Any

from tests.scenarios.schema import Run, build
from tests.scenarios.timeline import play
from tests.scenarios.world import Happening
from trimtab_controller.core.failover import FailoverSettings

Change = Callable[[dict[str, Any]], None]


class Played:
    def __init__(self, scenario: Mapping[str, Any], settings: FailoverSettings | None = None) -> None:
        self.scenario = scenario
        self._settings = settings
        self._runs: dict[str, Run] = {}

    def run(self, variant: str = "as-written", change: Change | None = None, name: str = "", run_on_s: float = 400.0) -> Run:
        """Return the scenario as played in this variant; `change` edits a copy of the file first and needs a `name`."""
        key = f"{variant}/{name}"
        if key not in self._runs:
            scenario = _copy(self.scenario)
            if change is not None:
                change(scenario)
            run = build(scenario, settings=self._settings, variant=variant)
            run.notes["run_on_s"] = run_on_s
            self._runs[key] = play(run)
        return self._runs[key]


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def first(run: Run, what: str, subject: str = "", host: str = "", after: float = 0.0) -> Happening:
    found = [one for one in run.world.happened(what, subject, host) if one.t >= after]
    assert found, f"{what} of {subject or host} never happened"
    return found[0]


def count(run: Run, what: str, subject: str = "", host: str = "", after: float = 0.0) -> int:
    return sum(1 for one in run.world.happened(what, subject, host) if one.t >= after)


def alarms(run: Run, subject: str = "") -> list[str]:
    return [alarm.code for _at, alarm in run.world.engine.alarms if not subject or alarm.subject == subject]
