"""Logs hold no secrets and name their process; Prometheus is told where everything is."""

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import structlog

from trimtab_controller import log
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Host
from trimtab_controller.services import hosts as host_service

AT = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Leave the process's logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("own_logging")
def test_lines_are_json_name_their_process_and_hide_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("gateway", log_format="json")
    with log.operation_context("op-1"):
        structlog.get_logger("test").info("token made", secret="s3cret", admin_token="s3cret", token_id="tok-1", host_id="host-1")
    logging.getLogger("library").warning("disk %s", "slow")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0]["operation_id"] == "op-1"
    assert (lines[0]["secret"], lines[0]["admin_token"], lines[0]["token_id"]) == ("(redacted)", "(redacted)", "tok-1")
    assert [line["process"] for line in lines] == ["gateway", "gateway"]
    assert lines[1]["event"] == "disk slow"


def test_service_discovery_lists_agents_and_the_controllers_processes() -> None:
    host = Host(
        id="host-1",
        name="node1",
        host_class_id="hc-1",
        labels={},
        is_cordoned=False,
        agent_address="[2001:db8::5]:8446",
        migration_address="2001:db8::5",
        machine_id="m",
        smbios_uuid="s",
        connectivity=HostConnectivity.UP,
        connectivity_at=AT,
        boot_id="",
        incarnation="",
        lease_number=1,
        inventory=None,
        inventory_at=None,
        generation=0,
        vcpus_limit=0,
        memory_limit_mib=0,
        vcpus_claimed=0,
        memory_claimed_mib=0,
        unmanaged_vcpus=0,
        unmanaged_memory_mib=0,
        version=1,
        created_at=AT,
    )
    found = host_service.discovery_targets([host], controller_targets={"api": "192.0.2.1:9108"}, agent_metrics_port=9107)
    assert found == [
        {"targets": ["192.0.2.1:9108"], "labels": {"job": "trimtab-controller", "process": "api"}},
        {"targets": ["[2001:db8::5]:9107"], "labels": {"job": "trimtab-agent", "host": "node1", "host_id": "host-1"}},
    ]
