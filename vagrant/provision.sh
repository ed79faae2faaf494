#!/usr/bin/env bash
# Makes a machine a part of a treeboot lab. The virtual machines of vagrant/ and the user-mode Linux hosts of `cargo xtask lab` are made by it alike.
# Each verb is safe to run again.
#
# Usage:
#   provision.sh install ROLE NAME ADDRESS COORDINATOR_URL        programs from /tmp/treeboot, packages, a systemd service
#   provision.sh prepare                                          what the kernel plane needs of a booted machine
#   provision.sh run ROLE NAME ADDRESS COORDINATOR_URL [ARG...]   becomes the daemon of that role
# ROLE is coordinator, origin or host.
# TREEBOOT_PLANE is user (unless told otherwise) or kernel; TREEBOOT_LIB is where state is kept, /var/lib/treeboot.
# Beside the programs may lie what the lab's authority made: identity/ for the coordinator, join.token for an agent, admin.pem for people.
set -euo pipefail

programs=/tmp/treeboot
plane=${TREEBOOT_PLANE:-user}
lib=${TREEBOOT_LIB:-/var/lib/treeboot}

# Not all of these are used by both planes, and a kernel may have some built in: whoever misses one says so by its name.
modules="loop dm_mod dm_multipath dm_round_robin dm_service_time dm_queue_length dm_switch dm_verity dm_snapshot dm_cache
  dm_cache_smq bcache configfs iscsi_tcp target_core_mod target_core_iblock target_core_file iscsi_target_mod"

usage() {
  sed -n '5,10 s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

say() {
  echo "$(basename "$0"): $*" >&2
}

need_role() { # role
  case $1 in
    coordinator | origin | host) ;;
    *)
      say "'$1' is not a role; use coordinator, origin or host"
      exit 2
      ;;
  esac
}

prepare() {
  # shellcheck disable=SC2086 # a list of names
  modprobe --all --quiet $modules || say "some kernel modules are missing; the user plane needs none of them"
  if ! mountpoint --quiet /sys/kernel/config; then
    mount -t configfs configfs /sys/kernel/config || say "no configfs; the kernel plane cannot export"
  fi
  # LIO keeps its records here, and complains of their absence.
  mkdir -p /etc/target /var/target /etc/iscsi /run/lock/iscsi
  if ! grep -qs '^InitiatorName=iqn\.' /etc/iscsi/initiatorname.iscsi || ! [ -e "$lib/initiator" ]; then
    mkdir -p "$lib"
    # A name of this machine's own: one that an image of the machine brought is everybody's.
    echo "InitiatorName=iqn.2026-11.dev.treeboot:lab:$(hostname)" >/etc/iscsi/initiatorname.iscsi
    rm -rf /etc/iscsi/nodes /etc/iscsi/send_targets
    touch "$lib/initiator"
  fi
  if command -v iscsid >/dev/null && ! kill -0 "$(cat /run/iscsid.pid 2>/dev/null)" 2>/dev/null; then
    iscsid || say "iscsid does not start; the kernel plane cannot attach"
  fi
}

# Becomes the daemon. The same words start it under systemd, in a lab and by hand.
run() { # role, name, address, URL of the coordinator, further arguments
  local role=$1 name=$2 address=$3 coordinator=$4
  shift 4
  if [ "$role" = coordinator ]; then
    exec treeboot-coordinator --listen "$address:7400" --state "$lib/coordinator" "$@"
  fi
  if [ "$role" = origin ]; then
    set -- --store "$lib/store" "$@"
  fi
  # An agent without the kernel plane does not know the option, and needs none.
  if [ "$plane" != user ]; then
    set -- --plane "$plane" "$@"
  fi
  exec treeboot-agent --name "$name" --state "$lib/agent" --cache "$lib/cache" \
    --listen "$address:7401" --portal "$address:3260" --coordinator "$coordinator" "$@"
}

install_programs() {
  local program
  for program in treeboot treeboot-coordinator treeboot-agent; do
    if [ -x "$programs/$program" ]; then
      install -m 0755 "$programs/$program" "/usr/local/bin/$program"
    elif ! command -v "$program" >/dev/null; then
      say "$programs/$program is missing; copy the built programs there first"
      exit 1
    fi
  done
  install -D -m 0755 "$0" /usr/local/lib/treeboot/provision.sh
}

install_packages() {
  local packages="" package
  for package in open-iscsi dmsetup; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || packages+=" $package"
  done
  if [ -n "$packages" ]; then
    # shellcheck disable=SC2086 # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $packages >/dev/null ||
      { [ "$plane" = user ] || { say "could not install$packages"; exit 1; }; }
  fi
}

# Who the machine is: the coordinator's authority, or the token by which an agent joins once. People on it are the lab's admin.
install_identity() { # role
  if [ "$1" = coordinator ] && [ -d "$programs/identity" ] && ! [ -e "$lib/coordinator/identity/authority.pem" ]; then
    mkdir -p "$lib/coordinator"
    chmod 0700 "$lib/coordinator"
    cp -R "$programs/identity" "$lib/coordinator/"
    chmod -R go= "$lib/coordinator/identity"
  fi
  if [ "$1" != coordinator ] && [ -e "$programs/join.token" ]; then
    install -D -m 0600 "$programs/join.token" "$lib/join.token"
  fi
  if [ -e "$programs/admin.pem" ]; then
    # Whoever has a shell on a machine of the lab is its admin.
    install -D -m 0644 "$programs/admin.pem" /usr/local/lib/treeboot/admin.pem
  fi
  rm -rf "$programs/identity" "$programs/join.token" "$programs/admin.pem"
}

install_service() { # role, name, address, URL
  local unit=treeboot-agent user_plane_needs=
  [ "$1" = coordinator ] && unit=treeboot-coordinator
  [ "$1" = coordinator ] || user_plane_needs="ExecStartPre=/usr/local/lib/treeboot/provision.sh prepare"
  printf 'TREEBOOT_COORDINATOR=%s\nTREEBOOT_PLANE=%s\n' "$4" "$plane" >/etc/treeboot.env
  printf 'export TREEBOOT_COORDINATOR=%s\n' "$4" >/etc/profile.d/treeboot.sh
  if [ "$1" != coordinator ] && [ -e "$lib/join.token" ]; then
    echo "TREEBOOT_JOIN_TOKEN_FILE=$lib/join.token" >>/etc/treeboot.env
  fi
  if [ -e /usr/local/lib/treeboot/admin.pem ]; then
    echo 'export TREEBOOT_IDENTITY=/usr/local/lib/treeboot/admin.pem' >>/etc/profile.d/treeboot.sh
  fi
  cat >"/etc/systemd/system/$unit.service" <<UNIT
[Unit]
Description=treeboot, $1
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
EnvironmentFile=/etc/treeboot.env
$user_plane_needs
ExecStart=/usr/local/lib/treeboot/provision.sh run $1 $2 $3 $4
Restart=always
RestartSec=1
# VMs outlive their agent: only the daemon itself is ended with the unit.
KillMode=process

[Install]
WantedBy=multi-user.target
UNIT
  systemctl daemon-reload
  systemctl enable "$unit.service" >/dev/null
  systemctl restart "$unit.service"
}

[ $# -ge 1 ] || usage
verb=$1
shift
case $verb in
  prepare)
    [ $# -eq 0 ] || usage
    prepare
    ;;
  run)
    [ $# -ge 4 ] || usage
    need_role "$1"
    run "$@"
    ;;
  install)
    [ $# -eq 4 ] || usage
    need_role "$1"
    install_programs
    [ "$1" = coordinator ] || install_packages
    install_identity "$1"
    install_service "$@"
    ;;
  *)
    usage
    ;;
esac
