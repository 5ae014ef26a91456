"""Process 1 of a lab host. Standard library only.

`python -m trimtab_lab.hostinit SPEC` is the launcher: it enters the host's control groups and network namespace, unshares
the rest, forks, records the child's pid and ends. The child builds its root (hostroot), then supervises the host's daemons
(supervisor), answers the host's systemctl, and reaps orphans until it is killed, which ends the host as a power cut would.
"""

import contextlib
import json
import os
import re
import resource
import selectors
import shutil
import signal
import socket
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trimtab_lab import open_vswitch, ovn, systemctl
from trimtab_lab.hostroot import RootPlan, enter_network_namespace, enter_root, unshare
from trimtab_lab.supervisor import ServiceDefinition, Supervisor

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = (
    0x20000,
    0x2000000,
    0x4000000,
    0x8000000,
    0x20000000,
)
INIT_DIRECTORY = Path("/run/trimtab-lab")
LOG_DIRECTORY = Path("/var/log/trimtab")
AGENT_CONFIGURATION = Path("/var/lib/trimtab/agent.toml")
LIBVIRTD_CONFIGURATION = Path("/etc/libvirt/libvirtd.conf")
SETTLE_LIMIT_S = 45.0
"""A systemctl call is answered by then even if the service never became ready."""

ENVIRONMENT = {
    "PATH": f"{INIT_DIRECTORY}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
    "container": "trimtab-lab",
}


@dataclass(frozen=True, slots=True)
class BootSpec:
    """What the lab hands to the launcher as JSON."""

    name: str
    network_namespace: str
    cgroup_directories: dict[str, str]
    root: str
    binds: dict[str, str]
    smbios_uuid: str
    agent_command: list[str]
    process_id_file: str


def launch(spec: BootSpec) -> int:
    for directory in spec.cgroup_directories.values():
        (Path(directory) / "cgroup.procs").write_text(str(os.getpid()))
    enter_network_namespace(spec.network_namespace)
    os.setsid()
    unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWCGROUP)
    process_id = os.fork()
    if process_id:
        Path(spec.process_id_file).write_text(f"{process_id}\n")
        return 0
    boot_id = str(uuid.uuid4())
    socket.sethostname(spec.name)
    enter_root(
        RootPlan(
            root=Path(spec.root),
            binds=spec.binds,
            cgroup_controllers=tuple(spec.cgroup_directories),
            boot_id=boot_id,
            smbios_uuid=spec.smbios_uuid,
        )
    )
    if "unified" in spec.cgroup_directories:
        _leave_group_root()
    Init(spec, boot_id=boot_id).run()
    return 0


def _leave_group_root() -> None:
    """In the unified hierarchy libvirt can enable controllers for guests only in a group without processes."""
    leaf = Path("/sys/fs/cgroup/init")
    leaf.mkdir(exist_ok=True)
    (leaf / "cgroup.procs").write_text("0")


def raise_limits() -> dict[str, str]:
    """Lets a warden lock its memory and run in real time; returns what is in force, since a container may refuse."""
    outcome = {}
    for name, limit in (("rtprio", resource.RLIMIT_RTPRIO), ("memlock", resource.RLIMIT_MEMLOCK)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        soft, _ = resource.getrlimit(limit)
        outcome[name] = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    runtime = Path("/sys/fs/cgroup/cpu/cpu.rt_runtime_us")
    outcome["rt_runtime_us"] = runtime.read_text().strip() if runtime.exists() else "not limited by group"
    return outcome


def definitions(agent_command: list[str]) -> list[ServiceDefinition]:
    """The daemons of a host, in starting order. The agent's argument `--config` is its contract with the lab."""

    def agent(verb: str) -> list[str]:
        return [*agent_command, verb, "--config", str(AGENT_CONFIGURATION)]

    def beside_agent(name: str, module: str) -> list[str]:
        """Of another release than ours: what its directory of programs has; else this interpreter runs it."""
        directory = Path(agent_command[0]).parent
        is_ours = directory == Path(sys.executable).parent or not (directory / name).exists()
        return [sys.executable, "-m", module] if is_ours else [str(directory / name)]

    def warden() -> list[str]:
        """As the unit says it; what the kernel refuses it, it tells."""
        return [*beside_agent("trimtab-warden", "trimtab_agent.warden"), "--state-dir", str(AGENT_CONFIGURATION.parent)]

    return [
        ServiceDefinition("virtlogd", lambda: ["/usr/sbin/virtlogd"], notifies=True),
        ServiceDefinition("virtlockd", lambda: ["/usr/sbin/virtlockd"], notifies=True),
        ServiceDefinition("libvirtd", libvirtd_command, notifies=True),
        ServiceDefinition("ovsdb-server", open_vswitch.database_command, condition=open_vswitch.DATABASE),
        ServiceDefinition("ovs-vswitchd", open_vswitch.switch_command, condition=open_vswitch.DATABASE),
        ServiceDefinition("ovn-controller", ovn.controller_command, condition=ovn.ENABLED),
        ServiceDefinition(
            "trimtab-agent", lambda: agent("run"), condition=AGENT_CONFIGURATION, stops_group=True, watchdog_s=30.0
        ),
        ServiceDefinition(
            "trimtab-warden", warden, condition=AGENT_CONFIGURATION, notifies=True, watchdog_s=1.0, restart_after_s=0.1
        ),
        ServiceDefinition(
            "trimtab-beacon", lambda: beside_agent("trimtab-beacon", "trimtab_agent.beacon"), condition=AGENT_CONFIGURATION
        ),
    ]


def libvirtd_command() -> list[str]:
    """With `--listen` libvirtd refuses to start without certificates, so only once the join has switched TLS on."""
    settings = re.findall(r"^\s*listen_tls\s*=\s*(\d)", LIBVIRTD_CONFIGURATION.read_text(), re.MULTILINE)
    listens = bool(settings) and settings[-1] == "1"
    return ["/usr/sbin/libvirtd", *(["--listen"] if listens else [])]


@dataclass(slots=True)
class _Caller:
    """One systemctl that waits for its answer."""

    connection: socket.socket
    received: bytes = b""
    reply: systemctl.Reply | None = None
    waiting_for: list[str] = field(default_factory=list)
    deadline_s: float = 0.0


class Init:
    def __init__(self, spec: BootSpec, *, boot_id: str) -> None:
        self._name = spec.name
        self._agent_command = spec.agent_command
        self._boot_id = boot_id
        self._limits = raise_limits()
        self._supervisor = Supervisor(definitions(spec.agent_command), environment=ENVIRONMENT, log_directory=LOG_DIRECTORY)
        self._words = systemctl.UnitWords(INIT_DIRECTORY / "units.json")
        self._selector = selectors.DefaultSelector()
        self._callers: list[_Caller] = []
        self._recorded = ""

    def run(self) -> None:
        wakeup_read, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        self._selector.register(wakeup_read, selectors.EVENT_READ, None)
        with contextlib.suppress(FileNotFoundError):
            systemctl.CONTROL_SOCKET.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(str(systemctl.CONTROL_SOCKET))
        listener.listen(16)
        self._selector.register(listener, selectors.EVENT_READ, listener)
        for name, opened in self._supervisor.open_notify_sockets().items():
            self._selector.register(opened, selectors.EVENT_READ, name)
        self._start_enabled()
        while True:
            self._record()
            for key, _ in self._selector.select(self._next_due_s()):
                match key.data:
                    case None:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wakeup_read, 4096)
                    case str() as name:
                        self._supervisor.read_notification(self._supervisor.services[name])
                    case socket.socket():
                        self._accept(listener)
                    case _Caller() as caller:
                        self._receive(caller)
            self._reap()
            self._supervisor.tick()
            self._answer_settled()

    def _start_enabled(self) -> None:
        for name, service in self._supervisor.services.items():
            default = "disabled" if name in ("trimtab-warden", "trimtab-beacon") else "enabled"
            if self._words.enablement(name, default=default) == "enabled":
                self._supervisor.start(name)
            elif service.definition.condition is None:
                sys.stdout.write(f"{name} is disabled on this host\n")

    def _next_due_s(self) -> float | None:
        due = [each for each in (self._supervisor.next_due_s(),) if each is not None]
        due += [max(0.0, caller.deadline_s - time.monotonic()) for caller in self._callers if caller.reply]
        return min(due) if due else None

    def _reap(self) -> None:
        while True:
            try:
                process_id, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process_id == 0:
                return
            self._supervisor.child_exited(process_id, status)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            caller = _Caller(connection)
            self._callers.append(caller)
            self._selector.register(connection, selectors.EVENT_READ, caller)

    def _receive(self, caller: _Caller) -> None:
        try:
            part = caller.connection.recv(65536)
        except BlockingIOError:
            return
        except ConnectionError:
            part = b""
        if not part:
            self._drop(caller)
            return
        caller.received += part
        if caller.reply is None and b"\n" in caller.received:
            try:
                arguments = [str(each) for each in json.loads(caller.received)]
            except ValueError:
                self._drop(caller)
                return
            caller.reply, caller.waiting_for = systemctl.answer(arguments, self._supervisor, self._words)
            caller.deadline_s = time.monotonic() + SETTLE_LIMIT_S

    def _answer_settled(self) -> None:
        for caller in [each for each in self._callers if each.reply is not None]:
            pending = [name for name in caller.waiting_for if not self._supervisor.services[name].is_settled]
            if pending and time.monotonic() < caller.deadline_s:
                continue
            assert caller.reply is not None
            reply = systemctl.settled_reply(caller.reply, caller.waiting_for, self._supervisor)
            if pending:
                reply = systemctl.Reply(1, error=f"{pending[0]} did not settle within {SETTLE_LIMIT_S:g} s")
            with contextlib.suppress(OSError):
                caller.connection.sendall(json.dumps(asdict(reply)).encode() + b"\n")
            self._drop(caller)
            if reply == systemctl.REBOOT:
                self._reboot()

    def _reboot(self) -> None:
        """End every process of this host at once, forget what was in memory, and begin anew under another boot id.

        The lab host itself restarts: its guests, its network neighbours and the controller see what a machine's restart shows them.
        """
        sys.stdout.write("reboot: every process ends\n")
        sys.stdout.flush()
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        forget_memory()
        boot_id = str(uuid.uuid4())
        (Path("/run/trimtab-lab-identity") / "boot_id").write_text(boot_id + "\n")
        signal.set_wakeup_fd(-1)
        os.execv(
            sys.executable, [sys.executable, "-m", "trimtab_lab.hostinit", "--again", self._name, boot_id, *self._agent_command]
        )

    def _drop(self, caller: _Caller) -> None:
        self._selector.unregister(caller.connection)
        caller.connection.close()
        self._callers.remove(caller)

    def _record(self) -> None:
        """Writes what runs where the lab on the machine reads it; pids are those of this pid namespace."""
        services = {
            name: {
                "state": service.state,
                "pid": service.process_id,
                "starts": service.starts,
                "last_exit": service.last_exit,
            }
            for name, service in self._supervisor.services.items()
        }
        text = json.dumps({"boot_id": self._boot_id, "limits": self._limits, "services": services}, indent=1)
        if text == self._recorded:
            return
        replacement = INIT_DIRECTORY / "services.json.new"
        replacement.write_text(text + "\n")
        replacement.replace(INIT_DIRECTORY / "services.json")
        self._recorded = text


def forget_memory() -> None:
    """Empty /run but for what the lab mounted and left there."""
    for entry in Path("/run").iterdir():
        if entry == INIT_DIRECTORY or entry.name == "trimtab-lab-identity" or os.path.ismount(entry):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    Path("/run/lock").mkdir(mode=0o1777, exist_ok=True)


def begin_again(name: str, boot_id: str, agent_command: list[str]) -> None:
    """Be the init of a host that restarted; its root stands as it stood."""
    spec = BootSpec(
        name=name,
        network_namespace="",
        cgroup_directories={},
        root="/",
        binds={},
        smbios_uuid="",
        agent_command=agent_command,
        process_id_file="",
    )
    Init(spec, boot_id=boot_id).run()


if __name__ == "__main__":
    if sys.argv[1] == "--again":
        begin_again(sys.argv[2], sys.argv[3], sys.argv[4:])
    sys.exit(launch(BootSpec(**json.loads(Path(sys.argv[1]).read_text()))))
