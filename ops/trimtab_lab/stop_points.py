"""Stops the controllers' processes exactly between an act and its record: whoever is about to write it waits in the database.

    points = StopPoints(plane)               # of `Replicas`
    with points.held("vm.recover:define"):   # the domain is defined, and nobody has written that down
        lab.crash("node1")
        where = points.wait()                # {"engine1"}: who stands there; kill or freeze it
    ...                                      # from here on the others go on

Points are `<kind of operation>:<step>` (the step was done and is about to be recorded), `<kind of operation>:accept` (decided, and about
to be accepted) and `host:fenced` (proven off, and about to be recorded). A trigger takes an advisory lock that `held` holds meanwhile;
where nothing is held it waits for nobody. Who waits is told by the address at which its process reaches the database.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from trimtab_lab.commands import wait_until
from trimtab_lab.errors import LabError
from trimtab_lab.replicas import PROCESSES, Replicas, address_of

_CLASS = 7411
"""Of the advisory locks; the product uses others."""
_HOLD_TIMEOUT_S = 10.0
_TRIGGERS = f"""
CREATE OR REPLACE FUNCTION trimtab_lab_stop(point text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM set_config('application_name', coalesce(host(inet_server_addr()), ''), true);
  PERFORM pg_advisory_xact_lock_shared({_CLASS}, hashtext(point));
END $$;
CREATE OR REPLACE FUNCTION trimtab_lab_stop_step() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.direction = 'do' AND NEW.outcome = 'succeeded' THEN
    PERFORM trimtab_lab_stop((SELECT kind FROM operation WHERE id = NEW.operation_id) || ':' || NEW.step);
  END IF;
  RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION trimtab_lab_stop_accept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM trimtab_lab_stop(NEW.kind || ':accept');
  RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION trimtab_lab_stop_fenced() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.connectivity = 'fenced' AND OLD.connectivity <> 'fenced' THEN
    PERFORM trimtab_lab_stop('host:fenced');
  END IF;
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS trimtab_lab_stop ON operation_journal;
CREATE TRIGGER trimtab_lab_stop BEFORE INSERT ON operation_journal FOR EACH ROW EXECUTE FUNCTION trimtab_lab_stop_step();
DROP TRIGGER IF EXISTS trimtab_lab_stop ON operation;
CREATE TRIGGER trimtab_lab_stop BEFORE INSERT ON operation FOR EACH ROW EXECUTE FUNCTION trimtab_lab_stop_accept();
DROP TRIGGER IF EXISTS trimtab_lab_stop ON host;
CREATE TRIGGER trimtab_lab_stop BEFORE UPDATE OF connectivity ON host FOR EACH ROW EXECUTE FUNCTION trimtab_lab_stop_fenced();
"""
_WAITING = f"""SELECT DISTINCT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.classid = {_CLASS} AND NOT l.granted"""


class StopPoints:
    """The points of one fleet's database. One is held at a time."""

    def __init__(self, plane: Replicas) -> None:
        self._plane = plane
        plane.query(_TRIGGERS)

    @contextmanager
    def held(self, point: str) -> Iterator[None]:
        """Let nobody past the point meanwhile."""
        holder = subprocess.Popen(
            [*self._plane.psql(), "-c", f"SELECT pg_advisory_lock({_CLASS}, hashtext('{point}'))", "-f", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            if not wait_until(self._is_held, timeout_s=_HOLD_TIMEOUT_S, interval_s=0.05):
                raise LabError(f"the lock of {point} was not given")
            yield
        finally:
            # Its end of input ends psql, and with its session the lock.
            holder.communicate(timeout=_HOLD_TIMEOUT_S)

    def waiting(self) -> set[str]:
        """Return the processes that stand at the point, by name."""
        at = set(self._plane.query(_WAITING).split())
        return {name for name in PROCESSES if address_of(name) in at}

    def wait(self, *, timeout_s: float) -> set[str]:
        """Wait until somebody stands there, and return who does."""
        if not wait_until(lambda: bool(self.waiting()), timeout_s=timeout_s, interval_s=0.05):
            raise LabError(f"nobody came to the point within {timeout_s:.0f} s")
        return self.waiting()

    def _is_held(self) -> bool:
        order = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = {_CLASS} AND granted AND mode = 'ExclusiveLock'"
        return self._plane.query(order).strip() == "1"
