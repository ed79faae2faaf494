#!/usr/bin/env bash
# A smoke test of the running lab: imports an image of random bytes, attaches every host to it, reads each host's
# view back through a disk of its own, and compares. Ends with 0 only if every byte is right everywhere.
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

image=smoke-$(date +%s)
trap 'on origin "treeboot image remove --force $image; rm -f /tmp/$image.raw" || true' EXIT
on origin "dd if=/dev/urandom of=/tmp/$image.raw bs=1M count=64 status=none && treeboot image import /tmp/$image.raw $image"
expected=$(on origin "sha256sum < /tmp/$image.raw" | cut -d' ' -f1)

on origin "treeboot image attach $image --all"
on origin "treeboot tree $image"
failed=0
for host in $hosts; do
  on origin "treeboot vm create $image-$host --image $image --host $host" >/dev/null
  url=$(on origin "treeboot vm list --json" | grep -o "iscsi://[^\"]*:disk:$image-$host/0")
  read_back="qemu-img convert -O raw '$url' /tmp/back.raw && sha256sum < /tmp/back.raw; rm -f /tmp/back.raw"
  got=$(on "$host" "sudo apt-get -qq install -y qemu-utils qemu-block-extra >/dev/null; $read_back" | cut -d' ' -f1)
  if [ "$got" = "$expected" ]; then
    echo "$host: identical"
  else
    echo "$host: DIFFERENT ('$got', not $expected)"
    failed=1
  fi
  on origin "treeboot vm destroy $image-$host" >/dev/null
done
exit $failed
