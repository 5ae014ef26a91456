"""`trimtab-warden`: kills the guests that may start elsewhere when this host's lease has ended, whatever became of the agent.

    waiting ─ hand-over ─► guarding ─ lease ended, no channel renewed it ─► killing ─ hand-over with a later end ─► guarding
                              └─ SIGHUP: a successor arms, then tells this one to leave

It knows a deadline and a list, both handed over by the agent with every renewal, and nothing of libvirt, the network or storage: on
the way from deadline to kill it touches only memory and /proc. It never kills what is not on the list: guests with a local disk,
guests that are not kept (ha=none) and domains that are not Trimtab's. A hung or killed warden is started again by its supervisor's
watchdog and goes on from the list that the agent left on /run.

What it does not cover: a machine that is paused as a whole. That needs a hardware watchdog or power fencing.
"""

import argparse
import contextlib
import json
import math
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab_agent import beacon_state, warden_guests, warden_rights, warden_state
from trimtab_agent.supervised import notify, watchdog_limit_s
from trimtab_agent.warden_guests import Guest, Held, boottime_s
from trimtab_agent.warden_reset import Reset
from trimtab_agent.warden_state import HandOver

TICK_S = 0.1
"""How late a deadline may be noticed on an idle machine; a wake-up costs some 20 microseconds."""
SEARCH_EVERY_S = 0.5
"""While the lease is over: a guest that libvirt was just starting appears late."""
LOOK_EVERY_S = 5.0
"""Between searches for processes of an unchanged list, so that `guests` in the answer is fresh."""
REHEARSE_EVERY_S = 60.0
REHEARSAL_LIMIT_S = 0.5
"""Nothing else is done meanwhile, so there is none when the lease ends soon."""
WORST_KEPT_S = 600.0
"""A worst figure is forgotten after one to two times this."""
SUPERVISORS_RESTART_S = 0.2
AGENT_SILENT_S = 10.0


@dataclass(slots=True)
class Worst:
    """The largest of the last ten to twenty minutes."""

    values: list[float] = field(default_factory=lambda: [0.0, 0.0])
    since_s: float = 0.0

    def note(self, value: float, *, now_s: float) -> None:
        if now_s - self.since_s > WORST_KEPT_S:
            self.values, self.since_s = [self.values[1], 0.0], now_s
        self.values[1] = max(self.values[1], value)

    def get(self) -> float:
        return max(self.values)


class Warden:
    """One thread, one loop; nothing here waits for a disk, a socket or another process."""

    def __init__(
        self,
        *,
        runtime_dir: Path,
        killed_path: Path,
        reset: Reset,
        watchdog_s: float,
        missing: Sequence[str],
        rate: warden_rights.ClockRate | None = None,
    ) -> None:
        self._runtime_dir, self._killed_path, self._reset = runtime_dir, killed_path, reset
        self._watchdog_s = watchdog_s
        self._missing = list(missing) if watchdog_s else [*missing, "no supervisor watches it (WATCHDOG_USEC)"]
        self.handed: HandOver | None = warden_state.read(runtime_dir)
        # What the beacon renewed before this process began: with the controllers away it is all that keeps the guests.
        self._beacon_deadline_s = beacon_state.read_state(runtime_dir).deadline_s
        self._held: list[Held] = []
        self._killed_at: dict[int, float] = {}
        self._looked_s = 0.0
        self._late, self._kill = Worst(), Worst()
        self._rehearsed_s = float("-inf")
        self._rate, self._rate_ppm = rate or warden_rights.ClockRate(), 0
        self._startup_s = 0.0
        self._heard_s = boottime_s()
        self._was_silent = False

    # --- what it is told -------------------------------------------------------------------------------------------------------

    def take(self, message: dict[str, Any]) -> dict[str, Any]:
        """Take one message of agent or beacon and return the answer. ValueError, KeyError: it is none."""
        self._rate_ppm = self._rate.ppm()
        if message["type"] == "beacon":
            self._beacon_deadline_s = max(self._beacon_deadline_s, float(message["deadline"]))
            return {"type": "holds", "seq": int(message["seq"]), "armed": self.is_armed}
        handed = warden_state.parse(message)
        if self._was_silent:
            say("agent is back")
        self._heard_s, self._was_silent = boottime_s(), False
        has_changed = self.handed is None or handed.guests != self.handed.guests
        if self.handed is None or handed.deadline_s >= self.handed.deadline_s:
            self.handed = handed
        else:
            # An agent that started again knows no lease yet; what it granted before it ended runs on.
            self.handed = HandOver(handed.sequence, self.handed.deadline_s, handed.guests)
        if has_changed or boottime_s() - self._looked_s > LOOK_EVERY_S:
            self._look()
        return self.answer(handed.sequence)

    def answer(self, sequence: int) -> dict[str, Any]:
        return {
            "type": "holds",
            "seq": sequence,
            "armed": self.is_armed,
            "pid": os.getpid(),
            "deadline": self.deadline_s,
            "kill_ms": self.kill_ms,
            "rate_ppm": self._rate_ppm,
            "missing": [*self._missing, *self._reset.missing, *self._bent_clock()],
            "guests": sorted({held.guest.vm_id for held in self._held if not held.has_ended}),
        }

    @property
    def is_armed(self) -> bool:
        """True while it would do its work in time: it knows a list, no guest has survived its kill, and its clock is to be trusted."""
        return self.handed is not None and not self._reset.is_due and not self._bent_clock()

    def _bent_clock(self) -> list[str]:
        if abs(self._rate_ppm) <= warden_rights.RATE_LIMIT_PPM:
            return []
        limit = warden_rights.RATE_LIMIT_PPM
        return [
            f"its clock is bent by {self._rate_ppm} millionths, more than {limit}: leases are not counted on until it runs even"
        ]

    @property
    def deadline_s(self) -> float:
        """When the lease ends; the later of what the two channels renewed to. 0: there is none."""
        return max(self.handed.deadline_s, self._beacon_deadline_s) if self.handed is not None else 0.0

    @property
    def kill_ms(self) -> int:
        """K: from the end of the lease to no process left, at the worst of the last minutes; a restart of this process included."""
        restart_s = self._watchdog_s + SUPERVISORS_RESTART_S + self._startup_s if self._watchdog_s else 0.0
        worst_s = restart_s + self._late.get() + self._kill.get() + self._reset.takes_s
        return math.ceil(worst_s * 1000)

    # --- what it does ----------------------------------------------------------------------------------------------------------

    def tick(self, *, late_s: float) -> None:
        """Look at the clock and act; called ten times a second, `late_s` after it should have been."""
        now_s = boottime_s()
        self._late.note(max(0.0, late_s), now_s=now_s)
        if self.handed is not None and self.handed.guests and 0 < self.deadline_s <= now_s:
            self._enforce(now_s)
            return
        self._killed_at.clear()
        self._reset.settle()
        is_near = 0 < self.deadline_s - now_s < 2 * REHEARSAL_LIMIT_S
        if now_s - self._rehearsed_s > REHEARSE_EVERY_S and not is_near:
            self._rehearsed_s = now_s
            self._kill.note(rehearse(), now_s=now_s)
        if now_s - self._heard_s > AGENT_SILENT_S and not self._was_silent:
            self._was_silent = True
            say(f"agent has been silent for {AGENT_SILENT_S:g} s; the lease ends in {self.deadline_s - now_s:.1f} s")

    def started(self) -> None:
        """Note that this process guards from now on."""
        self._look()
        self._startup_s = boottime_s() - _own_start_s()

    def _look(self) -> None:
        """Open the processes of the list, and let go of ended ones and of guests that left the list."""
        assert self.handed is not None or not self._held
        guests = self.handed.guests if self.handed is not None else ()
        self._looked_s = boottime_s()
        kept = []
        for held in self._held:
            if held.has_ended or held.guest not in guests:
                held.close()
            else:
                kept.append(held)
        self._held = kept + warden_guests.find(guests, known=[held.process_id for held in kept])

    def _enforce(self, now_s: float) -> None:
        assert self.handed is not None
        if now_s - self._looked_s > SEARCH_EVERY_S or not self._killed_at:
            self._look()
        for held in self._held:
            if held.process_id not in self._killed_at:
                self._killed_at[held.process_id] = now_s
                say(f"lease ended {now_s - self.deadline_s:.2f} s ago: killing {held.guest.vm_id} (pid {held.process_id})")
            held.kill()
        ended = [held for held in self._held if held.has_ended]
        for held in ended:
            self._kill.note(boottime_s() - self._killed_at.get(held.process_id, now_s), now_s=now_s)
            self._held.remove(held)
            held.close()
        if ended:
            self._record([held.guest for held in ended])
        oldest_s = min((self._killed_at[held.process_id] for held in self._held), default=now_s)
        self._reset.guests_survive(now_s - oldest_s, [held.guest.vm_id for held in self._held])
        if not self._killed_at:
            self._killed_at[0] = now_s  # nothing ran: search at the slower pace

    def _record(self, guests: Sequence[Guest]) -> None:
        """Write what was killed, in a child: a disk that hangs must not make this process late."""
        lines = [
            {"vm_id": guest.vm_id, "epoch": guest.epoch, "boottime_s": boottime_s(), "deadline_s": self.deadline_s}
            for guest in guests
        ]
        if os.fork() == 0:
            try:
                warden_rights.become_ordinary()
                warden_state.append_killed(self._killed_path, lines)
            finally:
                os._exit(0)


def rehearse() -> float:
    """Kill a child of our own and return how long it took to be gone, in seconds."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.pause()
        os._exit(0)
    held = Held(Guest("", "", 0), child, os.pidfd_open(child))
    began_s = boottime_s()
    held.kill()
    # Asleep, not spinning: at our priority the child would never get the processor on which it is to die.
    held.wait(REHEARSAL_LIMIT_S)
    held.close()
    return boottime_s() - began_s


class Server:
    """The socket, the signals and the supervisor's watchdog around a `Warden`."""

    def __init__(self, warden: Warden, *, runtime_dir: Path, watchdog_s: float, reset: Reset) -> None:
        self._warden, self._watchdog_s, self._reset = warden, watchdog_s, reset
        self._path = runtime_dir / warden_state.SOCKET_NAME
        self._selector = selectors.DefaultSelector()
        self._received: dict[socket.socket, bytes] = {}
        self._is_leaving = False
        self._fed_s = float("-inf")

    def open(self) -> None:
        """Listen at the known place; a predecessor's listener is replaced in one step, its callers keep talking to it."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        fresh = self._path.with_suffix(f".{os.getpid()}")
        fresh.unlink(missing_ok=True)
        listener.bind(str(fresh))
        fresh.chmod(0o600)
        listener.listen(8)
        fresh.replace(self._path)
        self._selector.register(listener, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Run until SIGTERM, which is a successor's that guards, or the end of the host's service."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_is_leaving", True))
        signal.signal(signal.SIGHUP, lambda *_: _start_successor())
        while not self._is_leaving:
            due_s = boottime_s() + TICK_S
            ready = self._selector.select(TICK_S)
            self._warden.tick(late_s=0.0 if ready else boottime_s() - due_s)
            for key, _events in ready:
                if key.data is None:
                    self._accept(key.fileobj)
                else:
                    self._receive(key.data)
            self._feed()
            _reap()
        say("leaves")
        self._reset.leave()

    def _feed(self) -> None:
        now_s = boottime_s()
        if now_s - self._fed_s >= max(TICK_S, self._watchdog_s / 4):
            self._fed_s = now_s
            notify("WATCHDOG=1")
            self._reset.feed()

    def _accept(self, listener: Any) -> None:
        with contextlib.suppress(OSError):
            connection, _address = listener.accept()
            connection.setblocking(False)
            self._received[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ, connection)

    def _receive(self, connection: socket.socket) -> None:
        try:
            part = connection.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        lines = (self._received[connection] + part).split(b"\n")
        self._received[connection] = lines.pop()
        if not part or len(self._received[connection]) > warden_state.LINE_MAX_BYTES:
            self._drop(connection)
            return
        try:
            for line in lines:
                connection.sendall(json.dumps(self._warden.take(json.loads(line))).encode() + b"\n")
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"connection dropped: {type(error).__name__}: {error}")
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        del self._received[connection]


def say(text: str) -> None:
    """Write a line to the log, or lose it: a log that does not take it must not hold the warden up."""
    with contextlib.suppress(OSError):
        os.write(2, f"{boottime_s():.3f} warden[{os.getpid()}]: {text}\n".encode())


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _own_start_s() -> float:
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def _start_successor() -> None:
    """Start the program anew beside us, as it is on disk now; we go on guarding until it tells us to leave."""
    arguments = [word for word in sys.argv[1:] if not word.startswith("--after=")]
    command = [sys.executable, "-m", "trimtab_agent.warden", *arguments, f"--after={os.getpid()}"]
    with contextlib.suppress(OSError):
        os.posix_spawn(sys.executable, command, {**os.environ, "WATCHDOG_PID": ""})


def main(arguments: Sequence[str] | None = None) -> int:
    """Guard until SIGTERM."""
    parser = argparse.ArgumentParser(prog="trimtab-warden", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runtime-dir", type=Path, default=Path("/run/trimtab"), help="where socket and hand-over lie")
    parser.add_argument("--state-dir", type=Path, default=Path("/var/lib/trimtab"), help="where killed guests are recorded")
    parser.add_argument("--reset", choices=["off", "sysrq", "watchdog"], default=os.environ.get("TRIMTAB_WARDEN_RESET", "off"))
    parser.add_argument("--reset-after-s", type=float, default=5.0, help="how long a killed guest may take to die")
    parser.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    with contextlib.suppress(OSError):
        os.set_blocking(2, False)
    given.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    watchdog_s = watchdog_limit_s()
    reset = Reset(kind=given.reset, after_s=given.reset_after_s, say=say)
    missing = warden_rights.take()
    reset.feed()
    warden = Warden(
        runtime_dir=given.runtime_dir,
        killed_path=given.state_dir / warden_state.KILLED_NAME,
        reset=reset,
        watchdog_s=watchdog_s,
        missing=missing,
    )
    server = Server(warden, runtime_dir=given.runtime_dir, watchdog_s=watchdog_s, reset=reset)
    warden.started()
    warden.tick(late_s=0.0)
    server.open()
    notify(f"READY=1\nMAINPID={os.getpid()}")
    lacking = (*missing, *reset.missing)
    say(f"guards{'' if not lacking else '; not granted: ' + ', '.join(lacking)}")
    if given.after:
        with contextlib.suppress(ProcessLookupError):
            os.kill(given.after, signal.SIGTERM)
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
