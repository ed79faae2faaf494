#!/usr/bin/env bash
# A smoke test of the running lab: imports an image of random bytes, attaches every host to it, reads each host's
# view back through a disk of its own, by the host's own iSCSI initiator, and compares; then writes to each disk and sees that
# it keeps its bytes over a restart of the agent. Ends with 0 only if every byte is right everywhere.
set -euo pipefail
cd "$(dirname "$0")"

on() { # machine, command
  vagrant ssh "$1" --no-tty -c "$2" 2>/dev/null
}
hosts=$(vagrant status --machine-readable | awk -F, '$3 == "state" && $4 == "running" && $2 ~ /^host-/ { print $2 }')
if [ -z "$hosts" ]; then
  echo "no host is running; 'vagrant up' first" >&2
  exit 1
fi

# What a host does with a disk: logs in where the disk is a LUN, and prints the path of the block device.
# shellcheck disable=SC2016 # for the shell on the host
disk='set -eu
place=$(treeboot vm list --json | tr -d " \n" | tr "{" "\n" | grep "\"name\":\"$vm\"" | grep -oE "(iscsi://|/dev/)[^\"]*" | head -n 1)
case $place in
  /dev/*) echo "$place"; exit ;;
esac
rest=${place#iscsi://}; portal=${rest%%/*}; rest=${rest#*/}; target=${rest%/*}; lun=${rest##*/}
node() { sudo iscsiadm -m node -T "$target" -p "$portal" -I "front-$vm" "$@" >/dev/null; }
set_to() { node -o update -n "$1" -v "$2"; }
if ! node --login 2>/dev/null; then
  # The disk is for its VM only: by the name of its initiator, and by the secret where the lab has an authority.
  initiator=iqn.2026-11.dev.treeboot:vm:$vm
  sudo iscsiadm -m iface -I "front-$vm" -o new >/dev/null 2>&1 || true
  sudo iscsiadm -m iface -I "front-$vm" -o update -n iface.initiatorname -v "$initiator" >/dev/null
  node -o new
  secret=$(mktemp -u)
  if treeboot vm show "$vm" --secret-file "$secret" >/dev/null 2>&1; then
    set_to node.session.auth.authmethod CHAP
    set_to node.session.auth.username "$initiator"
    set_to node.session.auth.password "$(cat "$secret")"
    rm -f "$secret"
  fi
  node --login
fi
path=/dev/disk/by-path/ip-$portal-iscsi-$target-lun-$lun
for try in $(seq 100); do [ -b "$path" ] && break; sleep 0.1; done
[ -b "$path" ]
echo "$path"'

sum_of() { # host, vm
  on "$1" "vm=$2; disk=\$($disk); sudo blockdev --flushbufs \$disk; sudo sha256sum < \$disk" | cut -d' ' -f1
}

image=smoke-$(date +%s)
# shellcheck disable=SC2317 # called by the trap
clean() {
  for host in $hosts; do
    on "$host" "sudo iscsiadm -m node --logoutall=all >/dev/null; treeboot vm destroy $image-$host >/dev/null" || true
  done
  on origin "treeboot image remove --force $image; rm -f /tmp/$image.raw" || true
}
trap clean EXIT
on origin "dd if=/dev/urandom of=/tmp/$image.raw bs=1M count=64 status=none && treeboot image import /tmp/$image.raw $image"
expected=$(on origin "sha256sum < /tmp/$image.raw" | cut -d' ' -f1)

on origin "treeboot image attach $image --all"
on origin "treeboot tree $image"
failed=0
check() { # host, what, got, expected
  if [ "$3" = "$4" ]; then
    echo "$1: $2"
  else
    echo "$1: NOT $2 ('$3', not '$4')"
    failed=1
  fi
}
for host in $hosts; do
  vm=$image-$host
  on origin "treeboot vm create $vm --image $image --host $host" >/dev/null
  check "$host" identical "$(sum_of "$host" "$vm")" "$expected"
  on "$host" "vm=$vm; disk=\$($disk); echo $host | sudo dd of=\$disk conv=fsync,notrunc status=none"
  written=$(sum_of "$host" "$vm")
  on "$host" "sudo systemctl restart treeboot-agent"
  check "$host" "kept over a restart of the agent" "$(sum_of "$host" "$vm")" "$written"
done
exit $failed
