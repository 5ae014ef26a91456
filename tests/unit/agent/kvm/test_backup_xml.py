"""The XML of pull backups, without libvirt."""

from xml.etree import ElementTree

from trimtab_agent.hypervisor.kvm.backup_xml import (
    PulledDisk,
    all_targets,
    backup_xml,
    checkpoint_xml,
    socket_of_job,
)
from trimtab_agent.hypervisor.kvm.disk_sources import DiskSource, sources_of

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
    assert sources_of(DOMAIN) == {
        "vda": DiskSource("qcow2", "/p/volumes/vol-1.qcow2"),
        "vdb": DiskSource("raw", "/p/volumes/vol-2.raw"),
    }
    assert all_targets(DOMAIN) == ["vda", "vdb", "vdc", "sda"]


IN_THE_NETWORK = """<domain><devices>
<disk type='network' device='disk'><driver name='qemu' type='raw'/>
  <source protocol='iscsi' name='iqn.2026-01.example:san/3'><host name='10.0.0.5' port='3260'/>
    <auth username='fleet'><secret type='iscsi' uuid='u-1'/></auth></source>
  <target dev='vda'/><alias name='ua-vol-1'/></disk>
<disk type='network' device='disk'><driver name='qemu' type='raw'/>
  <source protocol='rbd' name='vms/vol-2'><host name='10.0.0.6' port='6789'/><host name='fd00::1' port='3300'/>
    <auth username='trimtab'><secret type='ceph' uuid='u-2'/></auth></source>
  <target dev='vdb'/><alias name='ua-vol-2'/></disk>
<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg0/vol-3'/>
  <target dev='vdc'/><alias name='ua-vol-3'/></disk>
</devices></domain>"""


def test_a_stopped_vms_disks_in_the_network_are_opened_as_their_pool_says_and_nobody_makes_a_file_of_them() -> None:
    lun, image, device = sources_of(IN_THE_NETWORK).values()
    assert lun.options == (
        "driver=iscsi,transport=tcp,portal=10.0.0.5:3260,target=iqn.2026-01.example:san,lun=3,user=fleet,password-secret=pool-secret"
    )
    assert (lun.secret_uuid, lun.is_ceph, lun.is_file, lun.keeps_bitmaps) == ("u-1", False, False, False)
    assert image.options == (
        "driver=rbd,pool=vms,image=vol-2,user=trimtab,auth-client-required.0=cephx,key-secret=pool-secret,"
        "server.0.host=10.0.0.6,server.0.port=6789,server.1.host=fd00::1,server.1.port=3300"
    )
    assert (image.secret_uuid, image.is_ceph) == ("u-2", True)
    assert (device.path, device.is_file, device.keeps_bitmaps) == ("/dev/vg0/vol-3", False, False)
