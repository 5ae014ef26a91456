# Runs in namespaces of its own: FOLDER LOWER unpack PACKAGE..., lack PROGRAM..., or start DEVICE MAC...
set -eu
folder=$1 lower=$2 what=$3
shift 3
root=$folder/root

mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$folder/upper,workdir=$folder/work" "$root"

case $what in
unpack)
  rm -rf "$root/etc/cloud" "$root/var/lib/cloud" "$root/etc/netplan" "$root/etc/network" "$root"/etc/ssh/ssh_host_*
  # Into the overlay, where /lib is a link, as dpkg does.
  for package; do dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --keep-directory-symlink; done
  chroot "$root" ldconfig
  # What the packages' scripts, and who made the image, would have written.
  mkdir -p "$root/etc/network/interfaces.d" "$root/etc/netplan"
  echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
  echo 'locale: C.UTF-8' >"$root/etc/cloud/cloud.cfg.d/90-image.cfg"
  printf 'auto lo\niface lo inet loopback\nsource /etc/network/interfaces.d/*\n' >"$root/etc/network/interfaces"
  if ! grep -qw iso9660 /proc/filesystems; then
    printf '#!/bin/sh\nexec fuseiso "$1" "$2"\n' >"$root/usr/sbin/mount.iso9660"
    chmod 755 "$root/usr/sbin/mount.iso9660"
  fi
  exit
  ;;
lack)
  for program; do rm -f "$root/usr/sbin/$program" "$root/sbin/$program"; done
  exit
  ;;
esac

device=$1
shift
mount -t proc proc "$root/proc"
echo 'root=/dev/vda1 ro' >"$folder/cmdline"
mount --bind "$folder/cmdline" "$root/proc/cmdline"
for path in sys sysrq-trigger; do
  [ -e "$root/proc/$path" ] || continue
  mount --bind "$root/proc/$path" "$root/proc/$path"
  mount -o remount,bind,ro "$root/proc/$path"
done
mount -t sysfs -o ro sysfs "$root/sys"
# Else this machine's maker would be taken for a source, and its id for the guest's.
if [ -e "$root/sys/devices/virtual/dmi" ]; then mount -t tmpfs tmpfs "$root/sys/devices/virtual/dmi"; fi
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
while read -r name type major minor; do
  mknod -m 666 "$root/dev/$name" "$type" "$major" "$minor"
done <<END
null c 1 3
zero c 1 5
full c 1 7
random c 1 8
urandom c 1 9
tty c 5 0
fuse c 10 229
${device##*/} b 7 ${device##*loop}
END
ln -s /proc/self/fd "$root/dev/fd"

ip link set lo up
number=0
for mac; do
  ip link add "eth$number" address "$mac" type veth peer name "wire$number"
  ip link set "wire$number" up
  number=$((number + 1))
done

setpriv --bounding-set -sys_time,-sys_module,-sys_boot,-sys_rawio,-mknod chroot "$root" sh -eu <<'END'
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
mkdir /seen
exec >/seen/log 2>&1
# As Debian's generator does: cloud-init is started where this finds a source.
if ! /usr/lib/cloud-init/ds-identify --force; then
  tail -n 30 /run/cloud-init/ds-identify.log
  exit 1
fi
for stage in 'init --local' init 'modules --mode=config' 'modules --mode=final'; do
  cloud-init $stage || true
done
cp /run/cloud-init/result.json /run/cloud-init/status.json /etc/machine-id /seen
hostname >/seen/hostname
cloud-init schema --config-file /var/lib/cloud/instance/user-data.txt >/seen/schema 2>&1 || true
if [ -e /usr/sbin/ifup ]; then
  ifup -a || true
  ip -j address >/seen/addresses
  ip -j route >/seen/routes
  ip -6 -j route >/seen/routes6
fi
mkdir -p /run/systemd/network
cp -r /run/systemd/network /seen/network
END
