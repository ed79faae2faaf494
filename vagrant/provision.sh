#!/usr/bin/env bash
# Makes one machine a part of a treeboot lab: installs the programs and runs the daemon of its role under systemd.
# Safe to run again.
#
# Usage: provision.sh coordinator|origin|host NAME ADDRESS COORDINATOR_URL
# The programs are expected in /tmp/treeboot.
set -euo pipefail

if [ $# -ne 4 ]; then
  echo "usage: $0 coordinator|origin|host NAME ADDRESS COORDINATOR_URL" >&2
  exit 2
fi
role=$1 name=$2 address=$3 coordinator=$4
programs=/tmp/treeboot

for program in treeboot treeboot-coordinator treeboot-agent; do
  if [ -x "$programs/$program" ]; then
    install -m 0755 "$programs/$program" "/usr/local/bin/$program"
  elif ! command -v "$program" >/dev/null; then
    echo "$0: $programs/$program is missing; copy the built programs there first" >&2
    exit 1
  fi
done
printf 'TREEBOOT_COORDINATOR=%s\n' "$coordinator" >/etc/treeboot.env
printf 'export TREEBOOT_COORDINATOR=%s\n' "$coordinator" >/etc/profile.d/treeboot.sh

unit() { # name, description, command
  cat >"/etc/systemd/system/$1.service" <<UNIT
[Unit]
Description=$2
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
EnvironmentFile=/etc/treeboot.env
ExecStart=$3
Restart=always
RestartSec=1
# VMs outlive their agent: only the daemon itself is ended with the unit.
KillMode=process

[Install]
WantedBy=multi-user.target
UNIT
  systemctl daemon-reload
  systemctl enable "$1.service" >/dev/null
  systemctl restart "$1.service"
}

agent="/usr/local/bin/treeboot-agent --name $name --state /var/lib/treeboot/agent --cache /var/cache/treeboot"
agent="$agent --listen $address:7401 --portal $address:3260 --coordinator $coordinator"
case $role in
  coordinator)
    unit treeboot-coordinator "treeboot coordinator" \
      "/usr/local/bin/treeboot-coordinator --listen $address:7400 --state /var/lib/treeboot/coordinator"
    ;;
  origin)
    unit treeboot-agent "treeboot agent with a store" "$agent --store /var/lib/treeboot/store"
    ;;
  host)
    unit treeboot-agent "treeboot agent" "$agent"
    ;;
  *)
    echo "$0: '$role' is not a role; use coordinator, origin or host" >&2
    exit 2
    ;;
esac
