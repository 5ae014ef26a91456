"""The end of a lab: nothing of it stays behind, however it ended, and nothing of others is touched."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from trimtab_lab import networks, storage
from trimtab_lab.commands import mount_points
from trimtab_lab.ctl import create_ctl_groups
from trimtab_lab.hosts import Lab
from trimtab_lab.main import main
from trimtab_lab.specs import LabSpec

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def traces_of(spec: LabSpec) -> dict[str, set[str]]:
    """Everything on the machine that bears the lab's mark."""
    links = json.loads(subprocess.run(["ip", "-json", "link"], check=True, capture_output=True, text=True).stdout)
    processes = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, groups = (path / "cmdline").read_text(), (path / "cgroup").read_text()
        except OSError:
            continue
        # A process without a command line is a zombie that the machine's init has yet to reap.
        if command and (str(spec.state_directory) in command or f"/{spec.prefix}-" in groups):
            processes.add(command.replace("\0", " "))
    return {
        "namespaces": {path.name for path in networks.namespaces_of(spec)},
        "links": {link["ifname"] for link in links if link["ifname"].startswith(spec.prefix)},
        "mounts": {str(path) for path in mount_points() if path.is_relative_to(spec.state_directory)},
        "cgroups": {str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{spec.prefix}-*")},
        "processes": processes,
        "files": {str(path) for path in [spec.state_directory] if path.exists()},
    }


def other_traces() -> set[str]:
    """What a lab could leave under a name that is not its own."""
    links = {path.name for path in Path("/sys/class/net").iterdir() if not path.name.startswith("tl-")}
    places = ("/etc/pki", "/etc/trimtab", "/srv", "/var/lib", "/var/log", "/run", "/var/cache")
    files = {str(each) for place in places if Path(place).is_dir() for each in Path(place).iterdir()}
    return links | files - {"/run/netns", "/var/lib/trimtab-lab"}


def test_down_leaves_nothing_may_be_repeated_and_the_name_may_be_used_again(tmp_path: Path) -> None:
    before = other_traces()
    lab = Lab.named("gone", state_directory=tmp_path / "state")
    try:
        lab.up(hosts=2)
        lab.nbd_disk("disk", size_mib=8)
        assert all(traces_of(lab.spec).values())
    finally:
        lab.down()
    assert {kind: found for kind, found in traces_of(lab.spec).items() if found} == {}
    assert other_traces() - before == set()
    lab.down()
    again = Lab.named("gone", state_directory=tmp_path / "state")
    assert again.spec.host_count == 0
    try:
        again.up(hosts=1)
        assert again.run("node1", ["virsh", "list", "--all", "--name"]).stdout.strip() == "", "its libvirt answers, and is new"
    finally:
        again.down()
    assert {kind: found for kind, found in traces_of(again.spec).items() if found} == {}
    assert other_traces() - before == set()


def test_down_cleans_up_after_an_up_that_was_killed_half_way(tmp_path: Path) -> None:
    lab = Lab.named("half", state_directory=tmp_path / "state")
    lab.spec.state_directory.mkdir()
    with networks.allocation_lock():
        lab.spec = replace(lab.spec, network=networks.choose_network(), host_count=2)
        (lab.spec.state_directory / "lab.json").write_text(lab.spec.to_json())
        networks.build_fabric(lab.spec)
    create_ctl_groups(lab.spec)
    storage.mount_shared(lab.spec)
    networks.build_host(lab.spec.host("node1"))
    assert traces_of(lab.spec)["mounts"]
    Lab.named("half", state_directory=tmp_path / "state").down()
    assert {kind: found for kind, found in traces_of(lab.spec).items() if found} == {}


def test_state_directory_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not delete")
    refused = CliRunner().invoke(main, ["up", "--no-controller", "--state-dir", str(tmp_path)])
    assert refused.exit_code == 1
    assert "is not empty and holds no lab" in refused.output
    CliRunner().invoke(main, ["down", "--state-dir", str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text() == "do not delete"
