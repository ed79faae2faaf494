#!/bin/sh
# Reads the NoCloud seed (a VFAT labelled CIDATA, the second disk) when it names another instance than the last time.
# Written for the seeds that treeboot makes; docs/decisions/0040 says why this is not cloud-init.
set -eu
known=/var/lib/treeboot
disk=

# RSA is left out: an emulated processor takes seconds to find one.
make_keys() {
    for type in ed25519 ecdsa; do
        [ -s "/etc/ssh/ssh_host_${type}_key" ] ||
            ssh-keygen -q -t "$type" -N '' -C "root@$(hostname)" -f "/etc/ssh/ssh_host_${type}_key"
    done
}

for device in /dev/vd[b-z] /dev/sd[b-z] /dev/sr[0-9]; do
    if [ -b "$device" ] && [ "$(blkid -s LABEL -o value "$device" || true)" = CIDATA ]; then
        disk=$device
    fi
done
if [ -z "$disk" ]; then
    echo "treeboot: no seed; this machine keeps the name $(cat /etc/hostname)"
    make_keys
    exit 0
fi
modprobe -a vfat nls_ascii nls_cp437 || true
mkdir -p /run/treeboot/seed "$known"
mount -t vfat -o ro "$disk" /run/treeboot/seed
trap 'umount /run/treeboot/seed' EXIT
seed=/run/treeboot/seed

# meta KEY: its value in meta-data, which is "key: value" a line.
meta() {
    sed -n "s/^$1:[[:space:]]*//p" $seed/meta-data | tail -n 1 | tr -d '\r"'
}

instance=$(meta instance-id)
name=$(meta local-hostname)
if [ "$(cat "$known/instance-id" 2>/dev/null || true)" = "$instance" ]; then
    exit 0
fi

echo "$name" >/etc/hostname
hostname "$name"
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost\n' "$name" >/etc/hosts

# The seed's machine-id; without one systemd's own, which it took from the hypervisor or made up.
id=$(sed -n 's/^machine-id=//p' $seed/treeboot 2>/dev/null || true)
if [ -n "$id" ] && [ "$(cat /etc/machine-id)" != "$id" ]; then
    # systemd may have mounted its own over the empty file of the image.
    umount /etc/machine-id 2>/dev/null || true
    echo "$id" >/etc/machine-id
fi

# Keys of this instance alone.
rm -f /etc/ssh/ssh_host_*
make_keys
if [ -s $seed/authorized_keys ]; then
    mkdir -p -m 700 /root/.ssh
    cp $seed/authorized_keys /root/.ssh/authorized_keys
    chmod 600 /root/.ssh/authorized_keys
fi
# Last: an interrupted start begins again.
sync
echo "$instance" >"$known/instance-id"
