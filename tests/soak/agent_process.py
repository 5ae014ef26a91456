"""Some agents in a process of their own, over simulated hosts that live elsewhere: what a campaign kills and freezes.

Journals are on disk, so an agent that comes back knows what it was told; guests are in the world (`world.py`) and never noticed.
"""

import argparse
import asyncio
import json
import random
import signal
from pathlib import Path
from typing import Any

from tests.soak.world import RemoteHypervisor
from trimtab_agent import log
from trimtab_agent.agent import Agent, AgentParts
from trimtab_agent.certificates import FixedCredentials
from trimtab_agent.journal import JournalFile
from trimtab_agent.simulated_agents import shared_pools
from trimtab_agent.workers import WorkerPool
from trimtab_protos.tls import Credentials


async def serve(document: dict[str, Any]) -> None:
    pools, watch = shared_pools(threads=16, job_threads=16), WorkerPool("watch", threads=4)
    journal = JournalFile(Path(document["journal"]))
    agents = [Agent(_parts(document, host, journal, pools, watch)) for host in document["hosts"]]
    for agent in agents:
        await agent.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    for agent in agents:
        await agent.stop()
    journal.close()


def _parts(document: dict[str, Any], host: dict[str, str], journal: JournalFile, pools: Any, watch: WorkerPool) -> AgentParts:
    credentials = Credentials(document["ca_pem"].encode(), host["certificate_pem"].encode(), host["key_pem"].encode())
    return AgentParts(
        host_id=host["host_id"],
        hypervisor=RemoteHypervisor(Path(document["world"]), host["host_id"]),  # type: ignore[arg-type]
        journal=journal,
        pools=pools,
        watch=watch,
        listen_address=host["address"],
        migration_address="192.0.2.1",
        gateways=tuple(document["gateways"]),
        credentials=FixedCredentials(credentials),
        boot_id=host["boot_id"],
        rng=random.Random(host["host_id"]),
        has_own_connections=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", type=Path)
    log.configure("agents", level="warning")
    asyncio.run(serve(json.loads(parser.parse_args().document.read_text())))


if __name__ == "__main__":
    main()
