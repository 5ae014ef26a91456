#!/usr/bin/env bash
# Prepares a Debian 12 machine for Trimtab from a clone: Debian packages and the virtual environment .venv.
#
#   ops/bootstrap.sh          install what is missing (nothing and under 2 s when all is there)
#   ops/bootstrap.sh --bench  also the peers that `make bench` compares with (ops/bench-packages.txt)
#   ops/bootstrap.sh --plan   only say what would be installed
#   ops/bootstrap.sh --made   say what earlier runs installed and is still there
#
# It refuses an unsupported system before it changes anything, starts no service, leaves services that run alone, and
# touches neither firewall nor routing. Needs root or sudo only when packages are missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.trimtab-bootstrap
packages_file=$root/ops/packages.txt
bench_packages_file=$root/ops/bench-packages.txt
package_lists=("$packages_file")
installed_file=$root/.cache/installed-packages
policy=/usr/sbin/policy-rc.d
python=${TRIMTAB_PYTHON:-/usr/bin/python3}
# Units that come enabled with the packages above; what this run installs must not start at the next boot either.
units=(libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirt-guests.service virtlogd.socket
  virtlogd-admin.socket virtlockd.socket virtlockd-admin.socket redis-server.service postgresql.service
  prometheus.service openvswitch-switch.service ovsdb-server.service ovs-vswitchd.service ovn-central.service
  ovn-ovsdb-server-nb.service ovn-ovsdb-server-sb.service ovn-northd.service ovn-host.service ovn-controller.service
  tgt.service ipmievd.service openipmi.service ceph.target ceph-mon.target ceph-mgr.target ceph-osd.target ceph-crash.service
  rbdmap.service)

say() { printf '%s\n' "$*"; }
refuse() {
  printf 'bootstrap: %s\nNothing was changed.\n' "$*" >&2
  exit 1
}

os_release() {
  sed -n "s/^$1=\"\{0,1\}\([^\"]*\)\"\{0,1\}\$/\1/p" "${TRIMTAB_OS_RELEASE:-/etc/os-release}" 2>/dev/null || true
}

check_system() {
  local system
  system="$(os_release ID) $(os_release VERSION_ID)"
  if [ "$system" != "debian 12" ]; then refuse "this system is '$system'; supported is Debian 12 (bookworm)"; fi
  if [ "$(uname -m)" != x86_64 ]; then refuse "this machine is $(uname -m); supported is x86_64"; fi
  if [ ! -f "$root/requirements.txt" ]; then refuse "$root is not a clone of Trimtab"; fi
}

wanted_packages() { sed -e 's/#.*//' -e 's/[[:space:]]*$//' -e '/^$/d' "${package_lists[@]}"; }

missing_packages() {
  local wanted
  wanted=$(wanted_packages)
  # shellcheck disable=SC2086  # one word per package is meant
  comm -23 <(sort <<<"$wanted") \
    <(dpkg-query -W -f='${Package} ${db:Status-Status}\n' $wanted 2>/dev/null | sed -n 's/ installed$//p' | sort)
}

fingerprint() {
  cat "$root/requirements.txt" "$root/pyproject.toml" "$packages_file" | sha256sum | cut -d' ' -f1
}

venv_is_current() {
  [ -x "$venv/bin/python" ] && [ -x "$venv/bin/trimtab-lab" ] && [ -f "$stamp" ] &&
    [ "$(cat "$stamp")" = "$(fingerprint)" ]
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

restore_policy() {
  if [ -e "$policy.before-trimtab" ]; then
    as_root mv -f "$policy.before-trimtab" "$policy"
  elif grep -qs 'made by trimtab bootstrap' "$policy"; then
    as_root rm -f "$policy"
  fi
}

forbid_service_starts() {
  restore_policy # a run that was killed may have left its own behind
  if [ -e "$policy" ]; then as_root mv "$policy" "$policy.before-trimtab"; fi
  printf '#!/bin/sh\n# made by trimtab bootstrap, removed when it ends: packages must not start services\nexit 101\n' |
    as_root tee "$policy" >/dev/null
  as_root chmod 755 "$policy"
}

enabled_units() {
  local unit
  for unit in "${units[@]}"; do
    if systemctl is-enabled --quiet "$unit" 2>/dev/null; then say "$unit"; fi
  done
}

# Only under a running systemd: elsewhere nothing starts by itself.
disable_new_units() {
  [ -d /run/systemd/system ] || return 0
  local unit
  for unit in $(comm -13 <(sort <<<"$1") <(enabled_units | sort)); do
    as_root systemctl disable --quiet "$unit"
    say "  $unit stays disabled"
  done
}

install_packages() {
  local enabled_before=''
  if [ -d /run/systemd/system ]; then enabled_before=$(enabled_units); fi
  trap restore_policy EXIT
  trap 'exit 130' INT TERM
  forbid_service_starts
  say "Reading package lists"
  as_root apt-get -qq update
  say "Installing $(wc -w <<<"$*") Debian packages"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null
  mkdir -p "$(dirname "$installed_file")"
  printf '%s\n' "$@" >>"$installed_file"
  disable_new_units "$enabled_before"
  restore_policy
  trap - EXIT INT TERM
}

make_venv() {
  say "Creating $venv"
  rm -f "$stamp"
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  # uv first, itself by hash: it installs the other hundred packages several times faster than pip.
  if [ ! -x "$venv/bin/uv" ]; then
    sed -n '/^uv==/,/[^\\]$/p' "$root/requirements.txt" >"$venv/uv-requirement.txt"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
      -r "$venv/uv-requirement.txt"
  fi
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --require-hashes -r "$root/requirements.txt"
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps -e "$root"
  fingerprint >"$stamp"
}

print_plan() {
  local missing=$1
  say "Trimtab on this machine ($(os_release PRETTY_NAME)):"
  if [ -n "$missing" ]; then
    say "- install Debian packages (no service of theirs is started or enabled):"
    local name
    for name in $missing; do
      say "    $name  $(sed -n "s/^$name *# */for: /p" "$packages_file")"
    done
  else
    say "- Debian packages: all there"
  fi
  if venv_is_current; then
    say "- virtual environment $venv: up to date"
  else
    say "- virtual environment $venv: create or bring up to date, $(grep -c '^[^ #].*==' "$root/requirements.txt") packages by hash"
  fi
  say "- later, for the lab's guest: download (not install) Debian's linux-image-cloud-amd64, shim-signed and grub-efi-amd64-signed"
}

print_made() {
  if [ -d "$venv" ]; then say "virtual environment $venv"; fi
  if [ -s "$installed_file" ]; then
    say "Debian packages installed for Trimtab (apt-get remove takes them away): $(sort -u "$installed_file" | tr '\n' ' ')"
  fi
}

main() {
  case ${1:-} in
  '' | --plan) ;;
  --bench) package_lists+=("$bench_packages_file") ;;
  --made)
    print_made
    return
    ;;
  *) refuse "unknown argument '$1'; there are --bench, --plan and --made" ;;
  esac
  check_system
  local missing
  missing=$(missing_packages)
  if [ "${1:-}" = --plan ]; then
    print_plan "$missing"
    return
  fi
  if [ -n "$missing" ] && [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
    refuse "packages are missing and this is neither root nor is there sudo: $(tr '\n' ' ' <<<"$missing")"
  fi
  exec 9<"${BASH_SOURCE[0]}"
  flock 9 # a second run waits for the first and then finds all done
  if [ -n "$missing" ]; then
    # shellcheck disable=SC2086  # one word per package is meant
    install_packages $missing
  fi
  if ! venv_is_current; then make_venv; fi
}

main "$@"
