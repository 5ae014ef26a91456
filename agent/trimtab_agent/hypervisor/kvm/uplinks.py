"""By which links each Linux bridge of the operator's reached others when it last had any, over restarts of the agent and boots.

The kernel forgets a link with its device: the bridge of a network card that died looks like one that was never to reach anything.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from trimtab_agent.hypervisor.kvm.host_links import have_vanished
from trimtab_protos.network_messages import Bridge

log = structlog.get_logger(__name__)

FILE_NAME = "uplinks.json"


class Uplinks:
    """The links that were seen, in a file of the agent's. Thread-safe; without a file that can be written, of this process alone."""

    def __init__(self, path: Path, sys_net: Path = Path("/sys/class/net")) -> None:
        self._path, self._sys_net = path, sys_net
        self._lock = threading.Lock()
        self._seen = _read(path)

    def judge(self, bridges: Sequence[Bridge]) -> tuple[Bridge, ...]:
        """Return these bridges as they were read, those whose links have vanished without carrier and with the names of the links.

        What was seen of a bridge is forgotten where one of the devices is there and was taken out of it, and with the bridge itself.
        """
        with self._lock:
            judged = tuple(self._judge(bridge) for bridge in bridges)
            seen = {one.name: one.ports for one in judged if one.ports and not one.is_open_vswitch}
            if seen != self._seen:
                self._seen = seen
                self._write()
            return judged

    def _judge(self, now: Bridge) -> Bridge:
        before = replace(now, ports=self._seen.get(now.name, ()))
        if now.is_open_vswitch or not have_vanished(before, now, self._sys_net):
            return now  # Open vSwitch's own database remembers links that are gone
        return replace(before, has_carrier=False)

    def _write(self) -> None:
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(self._seen, indent=1, sort_keys=True))
            temporary.replace(self._path)
        except OSError as error:
            log.warning("links of bridges cannot be remembered", path=str(self._path), error=str(error))


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        found = json.loads(path.read_text())
        return {str(name): tuple(str(port) for port in ports) for name, ports in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("remembered links of bridges cannot be read", path=str(path), error=str(error))
        return {}
