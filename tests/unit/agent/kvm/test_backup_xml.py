"""The XML of pull backups, without libvirt."""

from xml.etree import ElementTree

from trimtab_agent.hypervisor.kvm.backup_xml import (
    PulledDisk,
    all_targets,
    backup_xml,
    checkpoint_xml,
    disk_files,
    socket_of_job,
)

DOMAIN = """<domain><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/p/volumes/vol-1.qcow2'/><target dev='vda'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/p/volumes/vol-2.raw'/><target dev='vdb'/></disk>
<disk type='file' device='disk'><driver type='raw'/><source file='/p/ro.raw'/><target dev='vdc'/><readonly/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/p/seed.iso'/><target dev='sda'/><readonly/></disk>
</devices></domain>"""


def test_each_disk_says_since_when_it_is_served() -> None:
    disks = [PulledDisk("vda", "/p/.a.scratch", "tt-bk-1"), PulledDisk("vdb", "/p/.b.scratch")]
    root = ElementTree.fromstring(backup_xml(disks, socket="/run/s.sock", others=["sda"]))
    first, second, left_out = root.findall("disks/disk")
    assert (root.get("mode"), root.find("server").get("socket")) == ("pull", "/run/s.sock")  # type: ignore[union-attr]
    assert (first.get("backupmode"), first.get("incremental"), first.get("exportbitmap")) == (
        "incremental",
        "tt-bk-1",
        "backup-vda",
    )
    assert (second.get("backupmode"), second.get("incremental"), second.get("exportbitmap")) == ("full", None, None)
    assert (left_out.get("name"), left_out.get("backup")) == ("sda", "no")
    assert first.find("scratch").get("file") == "/p/.a.scratch"  # type: ignore[union-attr]
    assert socket_of_job(ElementTree.tostring(root, encoding="unicode")) == "/run/s.sock"
    assert socket_of_job("<none/>") == ""


def test_the_checkpoint_covers_the_same_disks() -> None:
    root = ElementTree.fromstring(checkpoint_xml("tt-bk-2", ["vda"], others=["sda"]))
    assert root.findtext("name") == "tt-bk-2"
    assert [(disk.get("name"), disk.get("checkpoint"), disk.get("bitmap")) for disk in root.findall("disks/disk")] == [
        ("vda", "bitmap", "tt-bk-2"),
        ("sda", "no", None),
    ]
    assert root.find("creationTime") is None
    known_again = ElementTree.fromstring(checkpoint_xml("tt-bk-2", ["vda"], created_s=1_700_000_000))
    assert known_again.findtext("creationTime") == "1700000000", (
        "libvirt takes no checkpoint in again that says nothing of its age"
    )


def test_only_writable_disks_are_backed_up() -> None:
    assert disk_files(DOMAIN) == {"vda": ("/p/volumes/vol-1.qcow2", "qcow2"), "vdb": ("/p/volumes/vol-2.raw", "raw")}
    assert all_targets(DOMAIN) == ["vda", "vdb", "vdc", "sda"]
