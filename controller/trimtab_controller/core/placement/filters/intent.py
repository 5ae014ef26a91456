"""What operators and users want: cordons, the hosts that may be used at all, selectors, a class, a host by name."""

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import Filter
from trimtab_controller.core.placement.fleet import Mask
from trimtab_controller.core.placement.verdict import Refusal


def _connected(trial: Trial) -> Mask:
    return trial.fleet.where_equal("connectivity", HostConnectivity.UP)


def _not_connected(trial: Trial, row: int) -> tuple[Refusal, ...]:
    host = trial.fleet.hosts[row]
    if host.connectivity is HostConnectivity.UP:
        return ()
    message = f"it is {host.connectivity.value}, not up; see `trimtab host get {host.name}`"
    return (Refusal("connectivity", "host-not-up", message, {"connectivity": host.connectivity.value}),)


def _open(trial: Trial) -> Mask:
    return trial.fleet.where_equal("is_cordoned", False)


def _cordoned(trial: Trial, row: int) -> tuple[Refusal, ...]:
    host = trial.fleet.hosts[row]
    if not host.is_cordoned:
        return ()
    return (Refusal("cordon", "host-cordoned", f"it is cordoned; uncordon it with `trimtab host uncordon {host.name}`"),)


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
    Filter("connectivity", _connected, _not_connected),
    Filter("cordon", _open, _cordoned),
    Filter("required-host", _required, _not_required),
    Filter("excluded-host", _not_excluded, _excluded),
    Filter("host-class", _of_class, _of_other_class),
    Filter("selector", _selected, _not_selected),
)
