#!/bin/sh
# One line for the host. See docs/guests.md.
name=$(hostname)
boots=$(($(cat /var/lib/treeboot/boots 2>/dev/null || echo 0) + 1))
mkdir -p /var/lib/treeboot
echo "$boots" >/var/lib/treeboot/boots
# The end of the public key: enough to tell two machines apart, and no program is run for it.
key=none
[ -r /etc/ssh/ssh_host_ed25519_key.pub ] && read -r _ key _ </etc/ssh/ssh_host_ed25519_key.pub
read -r uptime _ </proc/uptime
read -r id </etc/machine-id
echo "treeboot: $name is up, boot $boots, machine-id $id, host key $key, kernel time $uptime s" >/dev/console
