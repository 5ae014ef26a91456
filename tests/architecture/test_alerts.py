"""The alerts that are shipped: promtool takes them, their series exist, and each has a runbook."""

import re
import subprocess
from pathlib import Path

import prometheus_client
import pytest
import yaml

from trimtab_controller import metrics

OPS = Path(__file__).parents[2] / "ops"
DOCTOR = OPS.parent / "controller/trimtab_controller/core/doctor"
RULES = sorted((OPS / "prometheus").glob("*.rules.yml"))


def alerts(path: Path) -> list[dict[str, object]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_promtool_takes_the_rules_and_their_tests(path: Path) -> None:
    subprocess.run(["promtool", "check", "rules", str(path)], check=True, capture_output=True)
    tests = path.with_name(path.name.replace(".rules.yml", ".rules.test.yml"))
    subprocess.run(["promtool", "test", "rules", str(tests)], check=True, capture_output=True)


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_each_alert_asks_for_series_that_exist_and_names_a_runbook_that_does(path: Path) -> None:
    assert metrics.HOSTS is not None
    known = {sample.name for family in prometheus_client.REGISTRY.collect() for sample in (family, *family.samples)}
    known |= {f"{name}_total" for name in known}
    for rule in alerts(path):
        for series in re.findall(r"\btrimtab_[a-z_]+", str(rule["expr"])):
            assert series in known, f"{rule['alert']} asks for {series}"
        book = Path(str(rule["annotations"]["runbook"]))  # type: ignore[index]
        assert book == Path("ops/runbooks") / f"{rule['alert']}.md"
        assert (OPS.parent / book).read_text().startswith(f"# {rule['alert']}\n")


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_each_finding_that_an_alert_waits_for_is_one_that_the_doctor_tells(path: Path) -> None:
    """A kind that is called otherwise would leave its alert silent for ever."""
    told = "".join(file.read_text() for file in DOCTOR.glob("*.py"))
    for rule in alerts(path):
        for kind in re.findall(r'trimtab_doctor_findings\{[^}]*kind="([a-z-]+)"', str(rule["expr"])):
            assert f'"{kind}"' in told, f"{rule['alert']} waits for {kind}"
