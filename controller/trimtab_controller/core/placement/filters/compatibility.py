"""Can this host run such a guest at all: architecture, CPU model and features, machine type, firmware, accelerator, version of QEMU."""

from trimtab_controller.core import cpu_features, qemu_series
from trimtab_controller.core.placement.books import Trial
from trimtab_controller.core.placement.filters.base import of_fleet
from trimtab_controller.core.placement.fleet import Mask
from trimtab_controller.core.placement.verdict import Refusal
from trimtab_protos.messages import Firmware


def _same_arch(trial: Trial) -> Mask | None:
    wanted = trial.request.arch
    return trial.fleet.where_equal("arch", wanted) if wanted else None


def _other_arch(trial: Trial, row: int) -> tuple[Refusal, ...]:
    wanted, own = trial.request.arch, trial.fleet.hosts[row].arch
    if not wanted or own == wanted:
        return ()
    message = f"its architecture is {own or 'not known'}, the vm's is {wanted}"
    return (Refusal("arch", "arch-mismatch", message, {"wanted": wanted}),)


def _runs_cpu_model(trial: Trial) -> Mask:
    wanted = trial.request.cpu_model
    if wanted:
        return trial.fleet.where_contains("usable_cpu_models", wanted)
    return trial.fleet.where_equal("runs_class_cpu_model", True)


def _lacks_cpu_model(trial: Trial, row: int) -> tuple[Refusal, ...]:
    wanted, host = trial.request.cpu_model, trial.fleet.hosts[row]
    if wanted and wanted not in host.usable_cpu_models:
        message = f"it cannot run CPU model {wanted}"
        return (Refusal("cpu-model", "cpu-model-unusable", message, {"wanted": wanted}),)
    if not wanted and not host.runs_class_cpu_model:
        message = f"it cannot run CPU model {host.class_cpu_model} of its host class {host.host_class}"
        return (Refusal("cpu-model", "class-cpu-model-unusable", message, {"wanted": host.class_cpu_model}),)
    return ()


def _has_cpu_features(trial: Trial) -> Mask | None:
    wanted = cpu_features.required(trial.request.cpu_features)
    return trial.fleet.where("cpu_features", ("includes", wanted), lambda own: bool(wanted <= own)) if wanted else None


def _lacks_cpu_features(trial: Trial, row: int) -> tuple[Refusal, ...]:
    missing = cpu_features.missing(trial.request.cpu_features, trial.fleet.hosts[row].cpu_features)
    if not missing:
        return ()
    names = ", ".join(missing)
    return (Refusal("cpu-features", "cpu-features-missing", f"it lacks CPU features {names}", {"missing": names}),)


def _has_machine(trial: Trial) -> Mask:
    wanted = trial.request.machine
    if wanted:
        return trial.fleet.where_contains("machines", wanted)
    return trial.fleet.where_equal("runs_class_machine", True)


def _lacks_machine(trial: Trial, row: int) -> tuple[Refusal, ...]:
    wanted, host = trial.request.machine, trial.fleet.hosts[row]
    if wanted and wanted not in host.machines:
        message = f"its QEMU has no machine type {wanted}"
        return (Refusal("machine", "machine-missing", message, {"wanted": wanted}),)
    if not wanted and not host.runs_class_machine:
        message = f"its QEMU has no machine type {host.class_machine}, which its host class {host.host_class} uses"
        return (Refusal("machine", "class-machine-missing", message, {"wanted": host.class_machine}),)
    return ()


def _has_firmware(trial: Trial) -> Mask | None:
    return trial.fleet.where_equal("has_uefi", True) if trial.request.firmware is Firmware.UEFI else None


def _lacks_firmware(trial: Trial, row: int) -> tuple[Refusal, ...]:
    if trial.request.firmware is not Firmware.UEFI or trial.fleet.hosts[row].has_uefi:
        return ()
    return (Refusal("firmware", "uefi-missing", "it has no UEFI firmware; install the package ovmf there"),)


def _has_capabilities(trial: Trial) -> Mask | None:
    wanted = frozenset(trial.request.capabilities)
    return trial.fleet.where("capabilities", ("includes", wanted), lambda own: bool(wanted <= own)) if wanted else None


_CURES = {"tpm": "it has no software TPM; install the package swtpm-tools there"}


def _lacks_capabilities(trial: Trial, row: int) -> tuple[Refusal, ...]:
    missing = sorted(set(trial.request.capabilities) - trial.fleet.hosts[row].capabilities)
    return tuple(
        Refusal("capability", "capability-missing", _CURES.get(one, f"its agent cannot do {one}"), {"missing": one})
        for one in missing
    )


def _same_accelerator(trial: Trial) -> Mask | None:
    wanted = trial.request.accelerator
    return trial.fleet.where_equal("accelerator", wanted) if wanted else None


def _other_accelerator(trial: Trial, row: int) -> tuple[Refusal, ...]:
    wanted, own = trial.request.accelerator, trial.fleet.hosts[row].accelerator
    if not wanted or own == wanted:
        return ()
    message = f"it runs guests under {own or 'an unknown accelerator'}, the running guest needs {wanted}"
    return (Refusal("accelerator", "accelerator-mismatch", message, {"wanted": wanted}),)


def _no_older_qemu(trial: Trial) -> Mask | None:
    runs = trial.request.qemu_series
    if not runs:
        return None
    return trial.fleet.where("qemu_series", ("no older than", runs), lambda own: not qemu_series.is_older(own, runs))


def _older_qemu(trial: Trial, row: int) -> tuple[Refusal, ...]:
    runs, own = trial.request.qemu_series, trial.fleet.hosts[row].qemu_series
    if not qemu_series.is_older(own, runs):
        return ()
    wanted = qemu_series.as_text(runs)
    message = f"its QEMU is {qemu_series.as_text(own)}, the guest runs on {wanted}; an older one may not take its state"
    return (Refusal("qemu", "qemu-older", message, {"wanted": wanted}),)


FILTERS = (
    of_fleet("arch", _same_arch, _other_arch),
    of_fleet("cpu-model", _runs_cpu_model, _lacks_cpu_model),
    of_fleet("cpu-features", _has_cpu_features, _lacks_cpu_features),
    of_fleet("machine", _has_machine, _lacks_machine),
    of_fleet("firmware", _has_firmware, _lacks_firmware),
    of_fleet("capability", _has_capabilities, _lacks_capabilities),
    of_fleet("accelerator", _same_accelerator, _other_accelerator),
    of_fleet("qemu", _no_older_qemu, _older_qemu),
)
