#!/bin/busybox sh
# Finds the root disk and goes over to it. If that fails, the end of this process is a kernel panic, which the host sees.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do
    $b insmod "/modules/$module"
done
tries=0
until $b mount -t ext4 -o rw,noatime /dev/vda1 /root; do
    tries=$((tries + 1))
    [ "$tries" -lt 50 ] || exit 1
    $b usleep 20000
done
$b mount --move /dev /root/dev
exec $b switch_root /root /sbin/init
