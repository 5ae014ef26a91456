"""Every metric of the controller, once. Names: `trimtab_<what>_<unit>`; seconds and bytes; labels bounded, never a vm or an operation.

Each process has its own registry and port (`config.Settings.metrics_port_of`); what only one process knows, only that one sets.
"""

from wsgiref.simple_server import WSGIServer

from prometheus_client import Counter, Gauge, Histogram, Info, start_http_server

from trimtab_controller.release import RELEASE

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

BUILD = Info("trimtab_controller_build", "Version of this process.", ["process"])

# api
API_REQUESTS = Counter("trimtab_api_requests", "Requests answered.", ["method", "route", "status"])
API_REQUEST_SECONDS = Histogram("trimtab_api_request_seconds", "Time to answer.", ["method", "route"], buckets=_FAST)
API_REJECTED = Counter("trimtab_api_rejected", "Requests refused before any work: unauthenticated, denied, rate.", ["reason"])
API_WATCHERS = Gauge("trimtab_api_watchers", "Open watch streams.")

# operations, wherever they are driven
OPERATIONS_ENDED = Counter("trimtab_operations_ended", "Operations that ended.", ["kind", "state"])
OPERATION_SECONDS = Histogram("trimtab_operation_seconds", "From acceptance to end.", ["kind"], buckets=_SLOW)
OPERATIONS_LIVE = Gauge("trimtab_operations_live", "Operations that have not ended, as the leader sees them.", ["state"])
OPERATIONS_DUE = Gauge("trimtab_operations_due", "Operations that could be driven now and are not, as the leader sees them.")
STEPS = Counter("trimtab_operation_steps", "Tries of steps by what came of them.", ["kind", "step", "outcome"])
STEP_SECONDS = Histogram("trimtab_operation_step_seconds", "Time in one try of a step.", ["kind", "step"], buckets=_FAST)
NUDGES = Counter("trimtab_nudges", "Nudges published to the broker.", ["outcome"])

# the database, as this process writes it
SQL_COMMITS = Counter("trimtab_sql_commits", "Commits; transactions that came together share one on SQLite.")
SQL_TRANSACTIONS = Counter("trimtab_sql_transactions", "Transactions committed.")

# placement and the leader's loops
LEADER = Gauge("trimtab_engine_leader", "1 where this process leads.")
OVERLAY_UP = Gauge(
    "trimtab_overlay_up", "1 where OVN's database did what the leader asked last; absent without one.", ["database"]
)
LEADER_CHANGES = Counter("trimtab_engine_leader_changes", "Times that this process took or lost the lead.", ["change"])
LOOP_SECONDS = Histogram("trimtab_engine_loop_seconds", "Time of one round of a loop.", ["loop"], buckets=_FAST)
LOOP_FAILURES = Counter("trimtab_engine_loop_failures", "Rounds of a loop that failed.", ["loop"])
PLACEMENTS = Counter("trimtab_placements", "Decisions by result.", ["kind", "result"])
PLACEMENT_SECONDS = Histogram("trimtab_placement_batch_seconds", "Time of one batch of decisions.", buckets=_FAST)
PLACEMENT_BATCH = Histogram("trimtab_placement_batch_requests", "Requests decided in one batch.", buckets=_SIZES)
PLACEMENT_REJECTIONS = Counter("trimtab_placement_rejections", "Hosts ruled out, by filter.", ["filter"])

# agents as the controller calls them
AGENT_CALL_SECONDS = Histogram("trimtab_agent_call_seconds", "Time of a call to an agent.", ["verb", "outcome"], buckets=_FAST)

# fleet, as the leader sees it
HOSTS = Gauge("trimtab_hosts", "Hosts by connectivity.", ["connectivity"])
VMS = Gauge("trimtab_vms", "Vms by observed state.", ["state"])
FLEET_VCPUS = Gauge("trimtab_fleet_vcpus", "Vcpus of the fleet: limit, claimed, unmanaged.", ["figure"])
FLEET_MEMORY_BYTES = Gauge("trimtab_fleet_memory_bytes", "Memory of the fleet: limit, claimed, unmanaged.", ["figure"])
DOCTOR_FINDINGS = Gauge("trimtab_doctor_findings", "What `trimtab doctor` finds, as the leader sees it.", ["severity", "kind"])
FAILOVER_DOMAINS = Gauge("trimtab_failover_domains", "Failure domains by whether the rest holds their vms.", ["kind", "covered"])
FAILOVER_UNCOVERED = Gauge("trimtab_failover_uncovered_vms", "Vms that the loss of some domain of the kind would end.", ["kind"])
FAILOVER_PROOF_SECONDS = Histogram("trimtab_failover_proof_seconds", "Time to bring the proof up to date.", buckets=_FAST)
FAILOVER_FROZEN = Gauge(
    "trimtab_failover_frozen", "1 while failover stands still: by the circuit breaker, by an operator.", ["by"]
)
DATABASE_BEHIND = Gauge(
    "trimtab_database_behind", "1 while the database is known to be older than the fleet: nothing is changed."
)
FAILOVERS = Counter("trimtab_failovers", "Losses of hosts by what came of them: lost, fenced, returned.", ["state", "proof"])
FAILOVER_SECONDS = Histogram(
    "trimtab_failover_seconds", "From the loss of a host: to its fence, to a vm that runs elsewhere.", ["until"], buckets=_SLOW
)
FAILOVER_VMS = Gauge("trimtab_failover_vms", "Vms of lost hosts: waiting, starting.", ["state"])
FENCE_TESTS = Counter("trimtab_fence_tests", "Readiness tests of power devices by the answer.", ["power"])
FENCE_PATHS = Gauge("trimtab_fence_paths", "Power devices by their last readiness test: ready, failed, untested.", ["state"])
FENCE_ACTIONS = Counter("trimtab_fence_actions", "Power-offs by what was read back: on, off, unknown.", ["power"])
HOSTS_WITHOUT_FENCE = Gauge(
    "trimtab_hosts_without_fence", "Hosts with vms to restart that only an operator could prove off: no ready device, no warden."
)
HOSTS_BY_BEACON = Gauge("trimtab_hosts_by_beacon", "Silent hosts that live by their beacons.")
HOSTS_DEGRADED = Gauge(
    "trimtab_hosts_degraded", "Hosts that are heard from, by what they lack: network-degraded, storage-lost.", ["by"]
)
FENCE_INTENTS = Counter(
    "trimtab_fence_intents", "Fence intents by what came of them: written, refused, unreachable, proven, disproven.", ["outcome"]
)
FREE_VCPUS = Gauge("trimtab_capacity_free_vcpus", "Vcpus that vms may still claim: usable by the mean vm, stranded.", ["figure"])
FREE_MEMORY_BYTES = Gauge("trimtab_capacity_free_memory_bytes", "Memory that vms may still claim: usable, stranded.", ["figure"])
REBALANCE_PLANS = Counter("trimtab_rebalance_plans", "Rounds of the rebalancer by what came of them.", ["outcome"])
BACKUP_VMS = Gauge("trimtab_backup_vms", "Vms by how they are protected: with_policy, overdue, without_backup.", ["state"])
BACKUP_WORST_SECONDS = Gauge(
    "trimtab_backup_worst_seconds",
    "Of the vms with a policy the worst: age of last_good (the loss window), last_verified, last_booted; widest_gap; recovery.",
    ["what"],
)
BACKUP_LAST_BYTES = Gauge(
    "trimtab_backup_last_bytes",
    "Sum over the newest good backup of each vm: size of its disks, dirty, read, stored.",
    ["of"],
)
BACKUP_REPO_BACKUPS = Gauge("trimtab_backup_repository_backups", "Backups that a repository lists.", ["repository"])
BACKUP_REPO_BYTES = Gauge(
    "trimtab_backup_repository_bytes",
    "Bytes by repository: of the disks of its backups, stored by them, kept.",
    ["repository", "of"],
)
BACKUP_DEDUP_RATIO = Gauge(
    "trimtab_backup_repository_dedup_ratio", "Bytes of disks for each byte that backups added to it.", ["repository"]
)

# gateway
SESSIONS = Gauge("trimtab_gateway_sessions", "Open sessions of hosts.")
SESSIONS_ENDED = Counter("trimtab_gateway_sessions_ended", "Sessions that ended, by reason.", ["reason"])
SESSIONS_REFUSED = Counter("trimtab_gateway_sessions_refused", "Sessions that were refused, by code.", ["code"])
HEARTBEATS = Counter("trimtab_gateway_heartbeats", "Heartbeats handled.", ["outcome"])
GRANTING = Gauge("trimtab_gateway_granting", "1 while this gateway may grant leases.")
CLOCK_SKEW_SECONDS = Gauge("trimtab_gateway_host_clock_skew_max_seconds", "Largest clock skew among this gateway's hosts.")
UNARMED_HOSTS = Gauge("trimtab_gateway_hosts_without_warden", "Hosts of this gateway whose warden is not armed.")
HOSTS_WITHOUT_BEACON = Gauge(
    "trimtab_gateway_hosts_without_beacon", "Hosts of this gateway whose beacon should renew and does not, or has a problem."
)
OUTBOX_ITEMS = Counter("trimtab_gateway_outbox_items", "Items that hosts must not lose.", ["kind", "outcome"])
COMMIT_SECONDS = Histogram("trimtab_gateway_commit_seconds", "Time of one group commit.", buckets=_FAST)
COMMIT_SIZE = Histogram("trimtab_gateway_commit_works", "Pieces of work in one group commit.", buckets=_SIZES)
REDIS_FAILURES = Counter("trimtab_gateway_redis_failures", "Writes of host states to Redis that failed and were skipped.")
EARLIEST_EXPIRY = Gauge(
    "trimtab_host_certificates_earliest_expiry_timestamp_seconds", "When the first certificate of a live host expires."
)
JOINS = Counter("trimtab_joins", "Joins by outcome.", ["outcome"])
RENEWALS = Counter("trimtab_certificate_renewals", "Renewals of hosts' certificates by outcome.", ["outcome"])
UPLOAD_BYTES = Counter("trimtab_gateway_upload_read_bytes", "Bytes of uploads streamed to hosts.")

# every process that serves TLS
CONTROLLER_EXPIRY = Gauge("trimtab_controller_certificate_expiry_timestamp_seconds", "When this node's certificate expires.")
CA_EXPIRY = Gauge("trimtab_ca_certificate_expiry_timestamp_seconds", "When the CA that signs now expires.")


def count_commit(transactions: int) -> None:
    """Count one commit of so many transactions."""
    SQL_COMMITS.inc()
    SQL_TRANSACTIONS.inc(transactions)


def serve(process: str, port: int, address: str) -> WSGIServer:
    """Export this process's metrics on a port of its own; close the returned server to stop."""
    BUILD.labels(process).info({"version": RELEASE})
    server, _thread = start_http_server(port, addr=address)
    return server
