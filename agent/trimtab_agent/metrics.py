"""Every metric of the agent, once. Names: `trimtab_agent_` for the host and the agent, `trimtab_vm_` for one vm.

Series per vm are exported here and nowhere else: a host has dozens, a fleet has tens of thousands, which would stall a controller.
Gauges are read when Prometheus asks; a hypervisor that does not answer costs the scrape its vm series, never more than the timeout.
"""

from collections import Counter as Count
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from threading import Thread
from typing import Any

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab_agent.agent import Agent
from trimtab_agent.hypervisor.statistics import BalloonSource, DomainStatistics, StatisticsSource
from trimtab_agent.served import SERVED_SECONDS
from trimtab_agent.version import agent_version
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import Certificate, DomainObservation, DomainState

SCRAPE_TIMEOUT_S = 3.0
MIB = 1 << 20


class AgentCollector(Collector):
    """What one agent shows."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("trimtab_agent_build", "Release of this agent.", {"version": agent_version()})
        yield from self._session()
        yield from self._work()
        yield from self._host()
        yield from _certificates(self._agent.parts.certificates())
        domains = self._ask(self._agent.observer.refresh_domains, otherwise=None)
        if domains is None:
            return
        yield from _vms([domain for domain in domains if domain.vm_id])
        yield _states(domains)
        hypervisor = self._agent.parts.hypervisor
        if isinstance(hypervisor, BalloonSource):
            yield from _balloons(hypervisor)
        if isinstance(hypervisor, StatisticsSource):
            yield from _statistics(self._ask(hypervisor.domain_statistics, otherwise=()))

    def _session(self) -> Iterator[Metric]:
        agent, now_s = self._agent, self._agent.parts.clock.boottime_s()
        lease, session = agent.lease_state(), agent.session
        yield _gauge("trimtab_agent_lease_live", "1 while the host may start guests.", lease.is_live)
        remaining_s = max(0.0, lease.expires_at_boottime - now_s) if lease.is_live else 0.0
        yield _gauge("trimtab_agent_lease_remaining_seconds", "Time until the host's lease ends.", remaining_s)
        if session is None:
            return
        yield _gauge("trimtab_agent_session_open", "1 while a gateway answers.", bool(session.gateway))
        yield _counter("trimtab_agent_session_reconnects", "Sessions that ended.", session.reconnects)
        yield _gauge(
            "trimtab_agent_heartbeat_round_trip_seconds",
            "From sending the newest acknowledged heartbeat to its ack.",
            session.last_heartbeat_s,
        )
        if session.last_ack_boottime:
            age_s = now_s - session.last_ack_boottime
            yield _gauge("trimtab_agent_heartbeat_age_seconds", "Time since the controller last acknowledged.", age_s)

    def _work(self) -> Iterator[Metric]:
        agent = self._agent
        yield _gauge("trimtab_agent_outbox_items", "Reports that the controller has not acknowledged.", agent.outbox.stored)
        yield _gauge("trimtab_agent_commands_under_way", "Commands that run or wait for their vm.", agent.commands.under_way)
        jobs = GaugeMetricFamily("trimtab_agent_jobs", "Jobs that run or wait.", labels=["kind", "phase"])
        for (kind, phase), count in agent.jobs.counts().items():
            jobs.add_metric([kind, phase], count)
        yield jobs
        pools = GaugeMetricFamily("trimtab_agent_pool_calls", "Calls in a thread pool that run or wait.", labels=["threads"])
        for pool in (*agent.parts.pools.all(), agent.parts.watch):
            pools.add_metric([pool.name], pool.unfinished)
        yield pools

    def _host(self) -> Iterator[Metric]:
        observer = self._agent.observer
        load = observer.load
        yield _gauge("trimtab_agent_hypervisor_up", "1 while libvirt answers.", observer.is_hypervisor_up)
        yield _gauge("trimtab_agent_host_cpu_used_ratio", "Share of the host's CPUs in use.", load.cpu_used_permille / 1000)
        yield _gauge("trimtab_agent_host_cpu_steal_ratio", "Share stolen from the host.", load.cpu_steal_permille / 1000)
        yield _gauge(
            "trimtab_agent_host_memory_available_bytes", "Memory that guests could still get.", load.memory_available_mib * MIB
        )
        yield _gauge("trimtab_agent_host_uplink_carrier", "1 while the host's uplink has carrier.", load.has_uplink_carrier)
        pressure = GaugeMetricFamily("trimtab_agent_host_pressure_ratio", "Pressure stall, some, over 10 s.", labels=["resource"])
        for resource, value in (("cpu", load.cpu_pressure), ("memory", load.memory_pressure), ("io", load.io_pressure)):
            pressure.add_metric([resource], value / 10_000)
        yield pressure
        yield from self._storage()

    def _storage(self) -> Iterator[Metric]:
        families = {
            "capacity_bytes": GaugeMetricFamily("trimtab_agent_pool_capacity_bytes", "Size of a pool.", labels=["pool_id"]),
            "available_bytes": GaugeMetricFamily(
                "trimtab_agent_pool_available_bytes", "Free space of a pool.", labels=["pool_id"]
            ),
            "promised_bytes": GaugeMetricFamily(
                "trimtab_agent_pool_promised_bytes", "What sparse volumes may still take.", labels=["pool_id"]
            ),
            "is_responsive": GaugeMetricFamily("trimtab_agent_pool_responsive", "1 while a pool answers.", labels=["pool_id"]),
        }
        for seen in self._agent.observer.pools():
            for name, family in families.items():
                family.add_metric([seen.pool_id], float(getattr(seen, name)))
        yield from families.values()

    def _ask(self, question: Callable[[], Any], *, otherwise: Any) -> Any:
        try:
            return self._agent.parts.pools.query.submit(question).result(SCRAPE_TIMEOUT_S)
        except (TrimtabError, FutureTimeoutError):
            return otherwise


def serve(agent: Agent, address: str) -> Callable[[], None]:
    """Serve the agent's metrics over HTTP at `address:port`; return what ends it."""
    registry = CollectorRegistry()
    registry.register(AgentCollector(agent))
    registry.register(SERVED_SECONDS)
    ended = Counter("trimtab_agent_jobs_ended", "Jobs that ended.", ["kind", "state"], registry=registry)
    agent.jobs.notify(lambda kind, state: ended.labels(kind.value, state.value).inc())
    host, _, port = address.rpartition(":")
    server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        _join(thread)

    return stop


def _join(thread: Thread) -> None:
    thread.join(timeout=SCRAPE_TIMEOUT_S)


def _certificates(certificates: Sequence[Certificate]) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "trimtab_agent_certificate_expiry_timestamp_seconds", "When a certificate of the host ends.", labels=["purpose"]
    )
    for certificate in certificates:
        family.add_metric([certificate.purpose], certificate.not_after_s)
    yield family


def _states(domains: Sequence[DomainObservation]) -> Metric:
    family = GaugeMetricFamily("trimtab_agent_domains", "Domains on the host.", labels=["state", "managed"])
    counts = Count((domain.state, bool(domain.vm_id)) for domain in domains)
    for state in DomainState:
        for is_managed in (True, False):
            family.add_metric([state.value, str(is_managed).lower()], counts[(state, is_managed)])
    return family


def _vms(domains: Sequence[DomainObservation]) -> Iterator[Metric]:
    info = InfoMetricFamily("trimtab_vm", "A vm on this host.", labels=["vm_id"])
    running = GaugeMetricFamily("trimtab_vm_running", "1 while the vm runs.", labels=["vm_id"])
    cpu = CounterMetricFamily("trimtab_vm_cpu_seconds", "CPU time of the vm's process.", labels=["vm_id"])
    vcpus = GaugeMetricFamily("trimtab_vm_vcpus", "Virtual CPUs of the vm.", labels=["vm_id"])
    memory = GaugeMetricFamily("trimtab_vm_memory_bytes", "Memory that the vm was given.", labels=["vm_id"])
    resident = GaugeMetricFamily("trimtab_vm_memory_resident_bytes", "Host memory that the vm holds.", labels=["vm_id"])
    starts = CounterMetricFamily("trimtab_vm_starts", "Starts of the vm seen by this agent.", labels=["vm_id"])
    for domain in domains:
        label = [domain.vm_id]
        info.add_metric(label, {"uuid": domain.uuid, "domain": domain.name})
        running.add_metric(label, float(domain.state is DomainState.RUNNING))
        cpu.add_metric(label, domain.cpu_time_ns / 1e9)
        vcpus.add_metric(label, domain.vcpus)
        memory.add_metric(label, domain.memory_mib * MIB)
        resident.add_metric(label, domain.rss_mib * MIB)
        starts.add_metric(label, domain.starts)
    yield from (info, running, cpu, vcpus, memory, resident, starts)


def _balloons(source: BalloonSource) -> Iterator[Metric]:
    given = GaugeMetricFamily("trimtab_vm_balloon_given_bytes", "Memory that the vm's balloon leaves it.", labels=["vm_id"])
    usable = GaugeMetricFamily("trimtab_vm_balloon_usable_bytes", "Of it, what its programs could still take.", labels=["vm_id"])
    for balloon in source.balloon_statistics():
        given.add_metric([balloon.vm_id], balloon.given_mib * MIB)
        if balloon.usable_mib is not None:
            usable.add_metric([balloon.vm_id], balloon.usable_mib * MIB)
    changes = CounterMetricFamily("trimtab_agent_balloon_changes", "Targets given to balloons.", labels=["reason"])
    for reason, count in source.balloon_changes().items():
        changes.add_metric([reason], count)
    yield from (given, usable, changes)


_BLOCK_FAMILIES = (
    ("trimtab_vm_block_read_bytes", "Bytes read from a disk.", "read_bytes"),
    ("trimtab_vm_block_read_requests", "Reads of a disk.", "read_requests"),
    ("trimtab_vm_block_written_bytes", "Bytes written to a disk.", "written_bytes"),
    ("trimtab_vm_block_write_requests", "Writes to a disk.", "write_requests"),
)
_NIC_FAMILIES = (
    ("trimtab_vm_network_receive_bytes", "Bytes that a NIC received.", "received_bytes"),
    ("trimtab_vm_network_receive_packets", "Packets that a NIC received.", "received_packets"),
    ("trimtab_vm_network_transmit_bytes", "Bytes that a NIC sent.", "transmitted_bytes"),
    ("trimtab_vm_network_transmit_packets", "Packets that a NIC sent.", "transmitted_packets"),
    ("trimtab_vm_network_dropped_packets", "Packets that were dropped at a NIC.", "dropped_packets"),
)


def _statistics(statistics: Sequence[DomainStatistics]) -> Iterator[Metric]:
    for name, documentation, attribute in _BLOCK_FAMILIES:
        family = CounterMetricFamily(name, documentation, labels=["vm_id", "device"])
        for domain in statistics:
            for block in domain.blocks:
                family.add_metric([domain.vm_id, block.device], getattr(block, attribute))
        yield family
    for name, documentation, attribute in _NIC_FAMILIES:
        family = CounterMetricFamily(name, documentation, labels=["vm_id", "mac"])
        for domain in statistics:
            for nic in domain.nics:
                family.add_metric([domain.vm_id, nic.mac], getattr(nic, attribute))
        yield family


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=float(value))


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(name, documentation, value=float(value))
