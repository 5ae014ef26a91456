"""What a decision says: for each host that it fits with a score, or every reason why not.

A decision is kept for success too. It is complete, naming every host, up to `LISTED_HOSTS` hosts. In a larger fleet it keeps the
best `KEPT_HOSTS` that fit (for a refusal: those that came closest) and how many hosts each filter refused; any other host is
asked again with `engine.explain_host`.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from trimtab_controller.core.placement.request import PlacementRequest

LISTED_HOSTS = 300
KEPT_HOSTS = 20
# More than this many hosts do not fit into one sentence.
_SUMMARY_HOSTS = 4
# Of the stored form; a reader that knows only older ones can say so.
_FORMAT = 1

Context = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason against one host. The message completes "<host>: ..." and says what is missing, how much, and the cure."""

    filter: str
    code: str
    message: str
    context: Context = field(default_factory=dict)
    """The figures of the message, typed: what a search for the smallest change that would fit reads."""

    def as_json(self) -> dict[str, Any]:
        return {"filter": self.filter, "code": self.code, "message": self.message, "context": dict(self.context)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Refusal":
        return cls(document["filter"], document["code"], document["message"], document.get("context", {}))


@dataclass(frozen=True, slots=True)
class HostVerdict:
    host_id: str
    host_name: str
    refusals: tuple[Refusal, ...] = ()
    score: float | None = None
    """0..1, six digits; None for a host that does not fit."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By scorer, before weighing."""

    @property
    def fits(self) -> bool:
        return not self.refusals

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as the API shows it."""
        shown: dict[str, Any] = {"host_id": self.host_id, "host": self.host_name, "fits": self.fits}
        if self.score is not None:
            shown |= {"score": self.score, "scores": dict(self.scores)}
        return shown | {"reasons": [refusal.as_json() for refusal in self.refusals]}

    def sentence(self) -> str:
        """Return the verdict in one line without the score's parts."""
        if self.fits:
            return f"{self.host_name}: fits, score {self.score:.3f}"
        return f"{self.host_name}: {'; '.join(refusal.message for refusal in self.refusals)}"


class Columns(NamedTuple):
    """Some hosts that fit, as columns: making a verdict of each would cost more than choosing one did."""

    host_ids: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    totals: tuple[float, ...] = ()
    scores: Mapping[str, tuple[float, ...]] = MappingProxyType({})
    """By scorer, before weighing."""


class Shortlist:
    """The hosts that fit, best first. What is kept of them may be told later, when somebody reads it: of most decisions of a plan
    nobody does, and what is kept says all of it."""

    __slots__ = ("_columns", "_size", "_tell", "best_id")

    def __init__(self, columns: Columns = Columns()) -> None:
        self._columns: Columns | None = columns
        self._tell: Callable[[], Columns] | None = None
        self._size = len(columns.host_ids)
        self.best_id = columns.host_ids[0] if columns.host_ids else None

    @classmethod
    def kept(cls, size: int, best_id: str, tell: Callable[[], Columns]) -> "Shortlist":
        """Return so many hosts, of which `tell` must always say the same, whatever was booked since."""
        found = cls.__new__(cls)
        found._columns, found._tell, found._size, found.best_id = None, tell, size, best_id
        return found

    @property
    def columns(self) -> Columns:
        if self._columns is None and self._tell is not None:
            self._columns, self._tell = self._tell(), None
        assert self._columns is not None
        return self._columns

    @property
    def host_ids(self) -> tuple[str, ...]:
        return self.columns.host_ids

    @property
    def host_names(self) -> tuple[str, ...]:
        return self.columns.host_names

    @property
    def totals(self) -> tuple[float, ...]:
        return self.columns.totals

    @property
    def scores(self) -> Mapping[str, tuple[float, ...]]:
        return self.columns.scores

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shortlist) and self.columns == other.columns

    def __hash__(self) -> int:
        return hash(self.host_ids)

    def verdict(self, position: int) -> HostVerdict:
        scores = {name: column[position] for name, column in self.scores.items()}
        return HostVerdict(self.host_ids[position], self.host_names[position], (), self.totals[position], scores)

    def verdicts(self) -> tuple[HostVerdict, ...]:
        return tuple(self.verdict(position) for position in range(len(self)))


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to one request. "No host fits" is a value; the edge makes an error of it, with `summary` as its message."""

    request: PlacementRequest
    policy: str
    fitting: Shortlist
    refused: tuple[HostVerdict, ...]
    """Fewest reasons first."""
    host_count: int
    fit_count: int
    refused_by: Mapping[str, int]
    """How many hosts each filter refused, every filter counted; only filters that refused some."""
    cells: tuple[int, ...] = ()
    """NUMA cells of the chosen host, for a vm that is pinned or on huge pages."""
    unblocks: tuple[Mapping[str, Any], ...] = ()
    """Of a refusal: the smallest changes that would fit, as `unblock.Unblock.as_json` gives them."""

    @property
    def chosen_host_id(self) -> str | None:
        return self.fitting.best_id

    @property
    def chosen(self) -> HostVerdict | None:
        return self.fitting.verdict(0) if self.fitting else None

    @property
    def verdicts(self) -> tuple[HostVerdict, ...]:
        """Fitting hosts first, best first, then refused ones. Made anew by each call."""
        return self.fitting.verdicts() + self.refused

    @property
    def is_complete(self) -> bool:
        """Whether every host is named in `verdicts`."""
        return len(self.fitting) + len(self.refused) == self.host_count

    def verdict_of(self, host: str) -> HostVerdict | None:
        """Return what was decided about a host, by id or name; None where this decision does not list it."""
        return next((one for one in self.verdicts if host in (one.host_id, one.host_name)), None)

    def why_not(self, verdict: HostVerdict) -> str:
        """Return in a sentence why this host was not chosen (or that it was); the verdict is of this decision or asked again."""
        chosen = self.chosen
        if not verdict.fits:
            return verdict.sentence()
        if chosen is None:
            return f"{verdict.sentence()}; it did not when the decision was made"
        if chosen.host_id == verdict.host_id:
            return f"{verdict.host_name} was chosen, score {verdict.score:.3f}"
        parts = [
            f"{name} {own:.3f} against {chosen.scores[name]:.3f}"
            for name, own in verdict.scores.items()
            if name in chosen.scores and chosen.scores[name] != own
        ]
        difference = ", ".join(parts) or "equal scores: the first by name is taken"
        return f"{verdict.sentence()}; {chosen.host_name} was preferred with {chosen.score:.3f} ({difference})"

    def summary(self) -> str:
        """Return the decision in a sentence or two."""
        name, chosen = self.request.vm_name, self.chosen
        if chosen is not None:
            counted = f"{self.fit_count} of {_hosts(self.host_count)} fit"
            return f"{name} goes to {chosen.host_name} by {self.policy}, score {chosen.score:.3f}; {counted}"
        if self.host_count == 0:
            return f"no host fits {name}: the fleet has no hosts; add one with `trimtab host token create NAME`"
        shown = [verdict.sentence() for verdict in self.refused[:_SUMMARY_HOSTS]]
        if self.host_count <= _SUMMARY_HOSTS:
            return f"no host fits {name}. {'. '.join(shown)}{self._cure()}"
        counts = sorted(self.refused_by.items(), key=lambda item: (-item[1], item[0]))
        told = ", ".join(f"{count} by {filter_name}" for filter_name, count in counts)
        return f"no host of {self.host_count} fits {name}; refused: {told}. Closest: {shown[0]}{self._cure()}"

    def _cure(self) -> str:
        return "".join(f". But {one['message']}" for one in self.unblocks[:1])

    def as_json(self) -> dict[str, Any]:
        """Return the stored form: compact, since it is kept for every decision. Reasons that are equal on many hosts stand once."""
        stored = _distinct(verdict.refusals for verdict in self.refused)
        seldom = {"cells": list(self.cells), "unblocks": [dict(one) for one in self.unblocks]}
        return {name: value for name, value in seldom.items() if value} | {
            "format": _FORMAT,
            "request": self.request.as_json(),
            "policy": self.policy,
            "chosen_host_id": self.chosen_host_id,
            "host_count": self.host_count,
            "fit_count": self.fit_count,
            "refused_by": dict(self.refused_by),
            "fitting": {
                "host_ids": list(self.fitting.host_ids),
                "hosts": list(self.fitting.host_names),
                "totals": list(self.fitting.totals),
                "scores": {name: list(column) for name, column in self.fitting.scores.items()},
            },
            "reasons": [refusal.as_json() for refusal, _ in stored.values()],
            "refused": [
                [verdict.host_id, verdict.host_name, [stored[_key(refusal)][1] for refusal in verdict.refusals]]
                for verdict in self.refused
            ],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Decision":
        """Return the decision of a stored document. ValueError for the form of a release that this one does not know."""
        if document["format"] != _FORMAT:
            raise ValueError(f"decision in form {document['format']}, known is {_FORMAT}")
        fitting, reasons = document["fitting"], [Refusal.from_json(one) for one in document["reasons"]]
        return cls(
            request=PlacementRequest.from_json(document["request"]),
            policy=document["policy"],
            fitting=Shortlist(
                Columns(
                    tuple(fitting["host_ids"]),
                    tuple(fitting["hosts"]),
                    tuple(fitting["totals"]),
                    {name: tuple(column) for name, column in fitting["scores"].items()},
                )
            ),
            refused=tuple(
                HostVerdict(host_id, host_name, tuple(reasons[position] for position in positions))
                for host_id, host_name, positions in document["refused"]
            ),
            host_count=document["host_count"],
            fit_count=document["fit_count"],
            refused_by=document["refused_by"],
            cells=tuple(document.get("cells", ())),
            unblocks=tuple(document.get("unblocks", ())),
        )


def _key(refusal: Refusal) -> Hashable:
    return refusal.filter, refusal.code, refusal.message, tuple(sorted(refusal.context.items()))


def _distinct(groups: Iterable[Iterable[Refusal]]) -> dict[Hashable, tuple[Refusal, int]]:
    """Return each distinct refusal with its position, by key."""
    found: dict[Hashable, tuple[Refusal, int]] = {}
    for refusals in groups:
        for refusal in refusals:
            found.setdefault(_key(refusal), (refusal, len(found)))
    return found


def _hosts(count: int) -> str:
    return "1 host" if count == 1 else f"{count} hosts"
