"""Overlay networks: OVN's database that takes no changes, routers whose outer side no living host carries."""

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity, some


def unwritten(fleet: FleetFacts) -> tuple[Finding, ...]:
    if not fleet.overlay_problem:
        return ()
    return (
        Finding(
            severity=Severity.WARNING,
            kind="overlay-not-written",
            subject="overlay networks",
            message=f"new guests on them have no network, changes wait: {fleet.overlay_problem}",
            cure="on the machine of OVN's database: systemctl restart ovn-central; ovn-nbctl show",
            since=fleet.overlay_since,
        ),
    )


def without_gateway(fleet: FleetFacts) -> tuple[Finding, ...]:
    found = []
    for router in fleet.routers:
        if len(router.up) > 1:
            continue
        if router.up:
            told = f"only host {router.up[0]} can carry its outer side: the loss of that one cuts its networks off from {router.outer}"
        else:
            told = f"no host that is up reaches {router.outer}: its networks have no way out" + (
                f", which {some(router.down)} could be" if router.down else ""
            )
        found.append(
            Finding(
                severity=Severity.NOTICE if router.up else Severity.CRITICAL,
                kind="router-gateway-single" if router.up else "router-without-gateway",
                subject=f"router {router.project}/{router.name}",
                message=told,
                cure=f"trimtab network get {router.outer}",
            )
        )
    return tuple(found)
