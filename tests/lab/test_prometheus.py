"""A real Prometheus finds every process of the fleet by HTTP service discovery and scrapes all of it."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

PORT = 19090
CONTROLLER_PROCESSES = {"api", "engine", "gateway", "worker"}


@pytest.fixture(scope="module")
def prometheus(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run Prometheus in the control plane's network, knowing nothing but the discovery address; the value is its URL."""
    directory = tmp_path_factory.mktemp("prometheus")
    configuration = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [
            {
                "job_name": "trimtab",
                "http_sd_configs": [
                    {
                        "url": f"{fleet.plane.url}/v1/service-discovery/prometheus",
                        "refresh_interval": "2s",
                        "authorization": {"type": "Bearer", "credentials_file": str(fleet.plane.token_file)},
                        "tls_config": {"ca_file": str(fleet.plane.authority_file)},
                    }
                ],
            }
        ],
    }
    path = directory / "prometheus.yml"
    path.write_text(json.dumps(configuration))
    address = f"{fleet.lab.spec.ctl_address}:{PORT}"
    program = shutil.which("prometheus")
    assert program is not None
    argv = [program, f"--config.file={path}", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}"]
    with (directory / "log").open("w") as log:
        running = subprocess.Popen(fleet.lab.command("ctl", argv), stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        running.terminate()
        running.wait(timeout=30)


def ask(prometheus: str, path: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{prometheus}{path}", timeout=5) as answer:
            return json.load(answer)["data"]
    except OSError:
        return None


def targets(prometheus: str) -> list[dict[str, Any]]:
    return list((ask(prometheus, "/api/v1/targets?state=active") or {}).get("activeTargets", []))


def test_every_process_of_the_fleet_is_found_and_scraped(fleet: Fleet, prometheus: str) -> None:
    expected = CONTROLLER_PROCESSES | set(HOSTS)

    def all_up() -> bool:
        up = {
            target["labels"].get("process") or target["labels"].get("host")
            for target in targets(prometheus)
            if target["health"] == "up"
        }
        return up >= expected

    wait_until(all_up, f"{sorted(expected)} to be scraped")


def test_the_figures_of_controller_and_agents_are_there_to_query(fleet: Fleet, prometheus: str) -> None:
    def value(query: str) -> float | None:
        found = (ask(prometheus, f"/api/v1/query?query={query}") or {}).get("result", [])
        return float(found[0]["value"][1]) if found else None

    wait_until(lambda: value('sum(trimtab_hosts{connectivity="up"})') == 3.0, "three hosts that are up")
    wait_until(lambda: value("count(trimtab_agent_build_info)") == 3.0, "the agents' build figures")


def test_promtool_finds_nothing_wrong_with_any_scrape(fleet: Fleet, prometheus: str) -> None:
    wait_until(lambda: len(targets(prometheus)) >= len(CONTROLLER_PROCESSES) + 3, "all targets")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for target in targets(prometheus):
        scraped = read(opener, target)
        checked = subprocess.run(["promtool", "check", "metrics"], input=scraped, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, f"{target['scrapeUrl']}: {checked.stdout}{checked.stderr}"


def read(opener: urllib.request.OpenerDirector, target: dict[str, Any]) -> str:
    with opener.open(target["scrapeUrl"], timeout=10) as answer:
        return str(answer.read().decode())
