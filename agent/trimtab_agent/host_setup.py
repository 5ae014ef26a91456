"""What a join changes on the host, as a list that can be shown before it is done: certificates, libvirt's settings, units.

libvirt reads the *first* assignment of a setting in its files, so our block stands at the top; files with shell syntax take the last,
so there it stands at the end. Nothing that an operator wrote is changed in place.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trimtab_agent.certificates import write_file
from trimtab_agent.libvirt_tls import LibvirtCertificates, point
from trimtab_agent.systemd import Systemctl
from trimtab_agent.undo import UndoLog, with_block, without_block
from trimtab_protos.errors import Internal

KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
"""libvirt to libvirt: a peer that was cut off is noticed after 20 s at most, so that a migration to it fails soon."""
SOCKET_ATTEMPTS = 5
AGENT_UNIT = "trimtab-agent.service"
WARDEN_UNIT = "trimtab-warden.service"
BEACON_UNIT = "trimtab-beacon.service"
SYSTEM_UNIT_DIRECTORIES = ("etc/systemd/system", "lib/systemd/system", "usr/lib/systemd/system")

UNIT = """\
[Unit]
Description=Trimtab agent
Documentation=man:trimtab-agent(8)
After=network-online.target libvirtd.service
Wants=network-online.target
ConditionPathExists={configuration}

[Service]
Type=exec
ExecStart={program} run --config {configuration}
Restart=always
RestartSec=1
# An agent that stands still is killed and started anew: its host goes on by its beacon meanwhile, or was lost to its lease before.
NotifyAccess=main
WatchdogSec=30
WatchdogSignal=SIGKILL
# Guests are libvirt's children, not ours; only the agent itself ends with its unit.
KillMode=process
TimeoutStopSec=30
RuntimeDirectory=trimtab
RuntimeDirectoryPreserve=yes
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
"""

WARDEN_UNIT_TEXT = """\
[Unit]
Description=Trimtab warden: ends guests that may start elsewhere when this host's lease has ended
Documentation=man:trimtab-warden(8)
ConditionPathExists={configuration}
# It guards while the agent is stopped, broken or upgraded, so nothing of the agent's takes it along.
Before=trimtab-agent.service

[Service]
Type=notify
NotifyAccess=all
ExecStart={program} --state-dir {state}
# The successor arms before this one leaves: an upgrade never leaves the guests unguarded.
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=100ms
StartLimitIntervalSec=0
# A warden that hangs is killed and started again well within the time that the controller allows for killing guests.
WatchdogSec=1
WatchdogSignal=SIGKILL
KillMode=mixed
OOMScoreAdjust=-1000
LimitMEMLOCK=infinity
LimitRTPRIO=99
RuntimeDirectory=trimtab
RuntimeDirectoryPreserve=yes

[Install]
WantedBy=multi-user.target
"""


BEACON_UNIT_TEXT = """\
[Unit]
Description=Trimtab beacon: renews this host's lease on shared storage as well
Documentation=man:trimtab-beacon(8)
ConditionPathExists={configuration}
After=trimtab-warden.service

[Service]
Type=exec
ExecStart={program}
Restart=always
RestartSec=1
# It hangs with its storage and nothing waits for it, a stop neither.
TimeoutStopSec=2
RuntimeDirectory=trimtab
RuntimeDirectoryPreserve=yes

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the host."""

    what: str
    """One line for people."""
    is_done: Callable[[], bool]
    apply: Callable[[], None]
    restarts_libvirtd: bool = False


class HostSetup:
    """The changes of one host, below `root`; certificates are installed apart, since only a join has them."""

    def __init__(self, *, root: Path, undo: UndoLog, systemctl: Systemctl, configuration: Path) -> None:
        self._root = root
        self._undo = undo
        self._systemctl = systemctl
        self._configuration = configuration
        self._certificates = LibvirtCertificates(root)

    def changes(self) -> list[Change]:
        """Return every change, done or not, in the order in which they are made."""
        found = [self._link(path, target) for path, target in self._certificates.links().items()]
        found.append(self._block("etc/libvirt/libvirtd.conf", self.libvirtd_settings(), "libvirt listens with TLS on port 16514"))
        found.append(self._block("etc/libvirt/qemu.conf", self.qemu_settings(), "migrations use TLS"))
        found += self._listening()
        found += self._guests_at_boot()
        warden = WARDEN_UNIT_TEXT.format(
            configuration=self._configuration, program=own_program("trimtab-warden"), state=self._configuration.parent
        )
        found.append(self._own_unit(WARDEN_UNIT, warden))
        beacon = BEACON_UNIT_TEXT.format(configuration=self._configuration, program=own_program("trimtab-beacon"))
        found.append(self._own_unit(BEACON_UNIT, beacon))
        found.append(
            self._own_unit(AGENT_UNIT, UNIT.format(configuration=self._configuration, program=own_program("trimtab-agent")))
        )
        return found

    def libvirtd_settings(self) -> Mapping[str, str]:
        return {
            "listen_tls": "1",
            "listen_tcp": "0",
            # Whoever has a certificate of the fleet's CA may connect; nobody else.
            "auth_tls": '"none"',
            "tls_no_verify_certificate": "0",
            **self._keepalive("etc/libvirt/libvirtd.conf"),
        }

    def qemu_settings(self) -> Mapping[str, str]:
        return {
            "migrate_tls_x509_cert_dir": '"/etc/pki/qemu"',
            "migrate_tls_x509_verify": "1",
            **self._keepalive("etc/libvirt/qemu.conf"),
        }

    def _keepalive(self, path: str) -> Mapping[str, str]:
        """Return our keepalive unless the operator's notices a silent peer sooner."""
        text = self._text(path)
        interval = _setting(text, "keepalive_interval", default=5)
        count = _setting(text, "keepalive_count", default=5)
        if interval > 0 and interval * (count + 1) <= KEEPALIVE_INTERVAL_S * (KEEPALIVE_COUNT + 1):
            return {}
        return {"keepalive_interval": str(KEEPALIVE_INTERVAL_S), "keepalive_count": str(KEEPALIVE_COUNT)}

    # Kinds of change.

    def _link(self, path: Path, target: str) -> Change:
        def apply() -> None:
            self._undo.remember_path(path)
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            point(path, target)

        is_there = path.exists() and not path.is_symlink()
        verb = "replace (kept for leaving)" if is_there else "create"
        return Change(
            what=f"{verb} {self._shown(path)} with the fleet's certificate",
            is_done=lambda: path.is_symlink() and str(path.readlink()) == target,
            apply=apply,
            restarts_libvirtd=True,
        )

    def _block(
        self, name: str, settings: Mapping[str, str], why: str, *, is_at_top: bool = True, form: str = "{} = {}"
    ) -> Change:
        path = self._root / name
        lines = [form.format(key, value) for key, value in settings.items()]

        def wanted() -> str:
            return with_block(self._text(name), lines, is_at_top=is_at_top)

        def apply() -> None:
            self._undo.remember_path(path)
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
            write_file(path, wanted().encode(), mode=mode)
            self._undo.remember_written(path)

        return Change(
            what=f"set {', '.join(lines)} in /{name} ({why})",
            is_done=lambda: self._text(name) == wanted(),
            apply=apply,
            restarts_libvirtd=name.startswith(("etc/libvirt/", "etc/default/libvirtd")),
        )

    def _unit(self, unit: str, word: str, why: str, *, restarts_libvirtd: bool = False) -> Change:
        def apply() -> None:
            before = self._systemctl.enablement(unit)
            self._undo.remember_unit(unit, enablement=before)
            self._systemctl.set_enablement(unit, word, before=before)

        return Change(
            what=f"{word.removesuffix('d')} {unit} ({why})",
            is_done=lambda: self._systemctl.enablement(unit) in {word, "not-found"},
            apply=apply,
            restarts_libvirtd=restarts_libvirtd,
        )

    # What Debian needs.

    def _listening(self) -> list[Change]:
        """Let libvirtd listen: by its TLS socket where systemd opens its sockets, else by its own `--listen`."""
        if self._systemctl.enablement("libvirtd.socket") == "masked":
            settings = {"LIBVIRTD_ARGS": '"--listen"'}
            why = "systemd does not open libvirtd's sockets here, so libvirtd listens itself"
            return [self._block("etc/default/libvirtd", settings, why, is_at_top=False, form="{}={}")]
        why = "systemd opens libvirt's TLS port"
        return [self._unit("libvirtd-tls.socket", "enabled", why, restarts_libvirtd=True)]

    def _guests_at_boot(self) -> list[Change]:
        """Nothing may start guests at boot: a start needs a lease. The unit is not stopped: its stop suspends guests."""
        if self._systemctl.enablement("libvirt-guests.service") == "not-found":
            return []
        return [
            self._unit("libvirt-guests.service", "disabled", "it would suspend guests at shutdown and start them at boot"),
            self._block(
                "etc/default/libvirt-guests",
                {"ON_BOOT": "ignore", "ON_SHUTDOWN": "shutdown"},
                "until the next boot it still runs",
                is_at_top=False,
                form="{}={}",
            ),
        ]

    def _own_unit(self, unit: str, text: str) -> Change:
        path, content = self._root / SYSTEM_UNIT_DIRECTORIES[0] / unit, text.encode()
        is_packaged = any((self._root / directory / unit).exists() for directory in SYSTEM_UNIT_DIRECTORIES[1:])

        def apply() -> None:
            if not is_packaged:
                self._undo.remember_path(path)
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                write_file(path, content, mode=0o644)
                self._systemctl.run("daemon-reload", "")
            self._undo.remember_unit(unit, enablement="disabled")
            self._systemctl.set_enablement(unit, "enabled")

        return Change(
            what=f"enable and start {unit}" + ("" if is_packaged else f", made as {self._shown(path)}"),
            is_done=lambda: (
                (is_packaged or (path.exists() and path.read_bytes() == content))
                and self._systemctl.enablement(unit) == "enabled"
            ),
            apply=apply,
        )

    def _text(self, name: str) -> str:
        path = self._root / name
        return path.read_text() if path.exists() else ""

    def _shown(self, path: Path) -> str:
        return "/" + str(path.relative_to(self._root))


def restart_libvirtd(systemctl: Systemctl) -> None:
    """Let libvirtd read its settings; guests run on. systemd opens a socket only while the service that gets it is stopped."""
    if systemctl.enablement("libvirtd-tls.socket") != "enabled":
        if systemctl.is_active("libvirtd-tls.socket"):
            systemctl.run("stop", "libvirtd-tls.socket")
        systemctl.run("restart", "libvirtd.service")
        return
    if systemctl.is_active("libvirtd-tls.socket"):
        systemctl.run("restart", "libvirtd.service")
        return
    for attempt in range(SOCKET_ATTEMPTS):
        systemctl.run("stop", "libvirtd.service")
        try:
            systemctl.run("start", "libvirtd-tls.socket")
            break
        except Internal:
            # A client woke libvirtd through another socket in between.
            if attempt == SOCKET_ATTEMPTS - 1:
                raise
    systemctl.run("start", "libvirtd.service")


def own_program(name: str) -> Path:
    """Return the path of a program of ours beside this interpreter."""
    return Path(sys.executable).with_name(name)


def _setting(text: str, name: str, *, default: int) -> int:
    """Return an integer setting as libvirt would read it, our own block aside."""
    found = re.search(rf"^\s*{name}\s*=\s*(-?\d+)", without_block(text), re.MULTILINE)
    return int(found[1]) if found else default
