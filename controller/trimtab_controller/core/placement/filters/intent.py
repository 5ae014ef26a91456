"""What operators and users want: cordons, taints, the hosts that may be used at all, selectors, a class, a host by name."""

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Reads, of_fleet
from trimtab_controller.core.placement.fleet import Mask
from trimtab_controller.core.placement.snapshot import Taint, TaintEffect
from trimtab_controller.core.placement.verdict import Refusal

NOT_UP = "host-not-up"


def _connected(trial: Trial) -> Mask:
    return trial.fleet.where_equal("connectivity", HostConnectivity.UP)


def _not_connected(trial: Trial, row: int) -> tuple[Refusal, ...]:
    host = trial.fleet.hosts[row]
    if host.connectivity is HostConnectivity.UP:
        return ()
    message = f"it is {host.connectivity.value}, not up; see `trimtab host get {host.name}`"
    return (Refusal("connectivity", NOT_UP, message, {"connectivity": host.connectivity.value}),)


def _open(trial: Trial) -> Mask:
    return trial.fleet.where_equal("is_cordoned", False)


def _cordoned(trial: Trial, row: int) -> tuple[Refusal, ...]:
    host = trial.fleet.hosts[row]
    if not host.is_cordoned:
        return ()
    return (Refusal("cordon", "host-cordoned", f"it is cordoned; uncordon it with `trimtab host uncordon {host.name}`"),)


def _refusing(trial: Trial, taints: frozenset[Taint]) -> list[Taint]:
    """Return the taints that keep this vm off, in order."""
    tolerations = trial.request.tolerations
    refusing = (taint for taint in taints if taint.effect is TaintEffect.REFUSE)
    return sorted(taint for taint in refusing if not any(one.covers(taint) for one in tolerations))


def _tolerated(trial: Trial) -> Mask:
    key = ("tolerated", trial.request.tolerations)
    return trial.fleet.where("taints", key, lambda taints: not _refusing(trial, taints))


def _not_tolerated(trial: Trial, row: int) -> tuple[Refusal, ...]:
    return tuple(
        Refusal(
            "taints",
            "taint-not-tolerated",
            f"it is tainted {taint}; a vm created with `--toleration {_toleration(taint)}` may run there",
            {"key": taint.key, "value": taint.value},
        )
        for taint in _refusing(trial, trial.fleet.hosts[row].taints)
    )


def _toleration(taint: Taint) -> str:
    return f"{taint.key}={taint.value}" if taint.value else taint.key


def _of_project(trial: Trial) -> Mask:
    return trial.fleet.where_empty_or("exclusive_project_id", trial.request.project_id)


def _of_other_project(trial: Trial, row: int) -> tuple[Refusal, ...]:
    owner = trial.fleet.hosts[row].exclusive_project_id
    if owner in ("", trial.request.project_id):
        return ()
    # Whose it is, is not the asking project's business.
    return (Refusal("project", "host-exclusive", "it is kept for another project's vms"),)


def _selected(trial: Trial) -> Mask | None:
    fits = None
    for label in trial.request.host_selector.items():
        mask = trial.fleet.where_contains("labels", label)
        fits = mask if fits is None else fits & mask
    return fits


def _not_selected(trial: Trial, row: int) -> tuple[Refusal, ...]:
    labels = trial.fleet.hosts[row].labels
    found = []
    for key, value in trial.request.host_selector.items():
        if key not in labels:
            message = f"it has no label {key}; the vm asks for {key}={value}"
        elif labels[key] != value:
            message = f"its label {key} is {labels[key]}; the vm asks for {key}={value}"
        else:
            continue
        found.append(Refusal("selector", "label-mismatch", message, {"label": key, "wanted": value}))
    return tuple(found)


def _of_class(trial: Trial) -> Mask | None:
    wanted = trial.request.host_class
    return trial.fleet.where_equal("host_class", wanted) if wanted else None


def _of_other_class(trial: Trial, row: int) -> tuple[Refusal, ...]:
    wanted, own = trial.request.host_class, trial.fleet.hosts[row].host_class
    if not wanted or own == wanted:
        return ()
    message = f"its host class is {own or 'none'}; the vm asks for {wanted}"
    return (Refusal("host-class", "host-class-mismatch", message, {"wanted": wanted}),)


def _required(trial: Trial) -> Mask | None:
    wanted = trial.request.required_host_id
    return trial.fleet.only([wanted]) if wanted else None


def _not_required(trial: Trial, row: int) -> tuple[Refusal, ...]:
    wanted, fleet = trial.request.required_host_id, trial.fleet
    if not wanted or fleet.hosts[row].host_id == wanted:
        return ()
    name = fleet.hosts[fleet.row_of[wanted]].name if wanted in fleet.row_of else f"{wanted}, which is not in the fleet"
    return (Refusal("required-host", "other-host-required", f"the request names host {name}", {"wanted": wanted}),)


def _not_excluded(trial: Trial) -> Mask | None:
    excluded = trial.request.excluded_host_ids
    return ~trial.fleet.only(excluded) if excluded else None


def _excluded(trial: Trial, row: int) -> tuple[Refusal, ...]:
    if trial.fleet.hosts[row].host_id not in trial.request.excluded_host_ids:
        return ()
    return (Refusal("excluded-host", "host-excluded", "the request excludes it: the vm is there already"),)


FILTERS = (
    of_fleet("connectivity", _connected, _not_connected),
    of_fleet("cordon", _open, _cordoned),
    of_fleet("taints", _tolerated, _not_tolerated),
    of_fleet("project", _of_project, _of_other_project),
    of_fleet("required-host", _required, _not_required, reads=Reads.NAMES),
    of_fleet("excluded-host", _not_excluded, _excluded, reads=Reads.NAMES),
    of_fleet("host-class", _of_class, _of_other_class),
    of_fleet("selector", _selected, _not_selected),
)
