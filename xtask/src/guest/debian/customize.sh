#!/bin/sh
# Run by mmdebstrap on the finished tree, which is "$1".
set -eu
root=$1
echo localhost >"$root/etc/hostname"
printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
echo '/dev/vda1 / ext4 rw,noatime 0 0' >"$root/etc/fstab"
# Each machine finds its own: systemd fills an empty file, and makes up nothing where it is missing.
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root"/etc/ssh/ssh_host_* "$root/var/lib/systemd/random-seed"
ln -sf /etc/machine-id "$root/var/lib/dbus/machine-id" 2>/dev/null || true
chroot "$root" systemctl enable treeboot-identity.service treeboot-ready.service systemd-networkd.service
# What a machine that lives for an hour has no use for, and what would write to each one's own disk.
chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-networkd-wait-online.service systemd-pstore.service \
    systemd-update-utmp.service systemd-update-utmp-runlevel.service getty@tty1.service systemd-firstboot.service \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
    sys-fs-fuse-connections.mount modprobe@configfs.service modprobe@dm_mod.service modprobe@drm.service \
    modprobe@efi_pstore.service modprobe@fuse.service modprobe@loop.service
# Most machines have no card; the driver is in the initrd, so a card is there before systemd looks.
mkdir -p "$root/etc/systemd/system/systemd-networkd.service.d"
printf '[Unit]\nConditionPathExistsGlob=/sys/class/net/e*\n' \
    >"$root/etc/systemd/system/systemd-networkd.service.d/treeboot.conf"
# The journal in memory: on disk it would be written by every machine.
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\n' >"$root/etc/systemd/journald.conf.d/treeboot.conf"
# A console without a password, for whoever can reach it: that is the host's owner.
chroot "$root" passwd --delete root
# Nothing changes between now and the first boot: no caches to rebuild there (systemd-update-done.service(8)).
touch "$root/etc/.updated" "$root/var/.updated"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/usr/share/doc/*
