#!/bin/busybox sh
# Process 1 of the busybox guest. What it prints and which keys it obeys: docs/guests.md.
b=/bin/busybox
export PATH=/bin:/sbin
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs run /run
exec </dev/null >/dev/console 2>&1

for module in /lib/modules/nls_*.ko /lib/modules/fat.ko /lib/modules/vfat.ko; do
    insmod "$module"
done
: >/run/seed
if [ -b /dev/vdb ] && mount -t vfat -o ro /dev/vdb /seed; then
    cat /seed/treeboot >/run/seed
    umount /seed
fi

# setting KEY: the last value of that key in the seed.
setting() {
    sed -n "s/^$1=//p" /run/seed | tail -n 1
}

name=$(setting hostname)
name=${name:-unnamed}
machine_id=$(setting machine-id)
hostname "$name"
say() {
    echo "treeboot: $name $*"
}
# The word that tests look for, and what failed.
io_error() {
    echo "treeboot: io error: $name $*"
}

# Is this the disk that we wrote to, or somebody else's?
data=/var/treeboot
if [ -e $data/name ]; then
    read -r owner <$data/name
    [ "$owner" = "$name" ] || io_error "the disk was written by $owner"
else
    echo "$name" >$data/name
fi
boots=0
[ -e $data/boots ] && read -r boots <$data/boots
boots=$((boots + 1))
echo "$boots" >$data/boots.new && mv $data/boots.new $data/boots && sync || io_error "cannot count boots"
echo "$name" >/etc/hostname
echo "$machine_id" >/etc/machine-id
# The host's power button is an input event. It is listened to before the host hears that it may be pressed.
insmod /lib/modules/evdev.ko
insmod /lib/modules/button.ko
button=$(grep -l 'Power Button' /sys/class/input/event*/device/name | head -n 1 | cut -d / -f 5)
[ -n "$button" ] && exec 9<"/dev/input/$button"
say "boot $boots"
echo "treeboot: $name is up, boot $boots, machine-id $machine_id, kernel time $(cut -d ' ' -f 1 /proc/uptime) s"

# pattern SEED KIB: that many KiB which only this VM and this seed make.
pattern() {
    yes "$name $machine_id $1" | head -c $(($2 * 1024))
}

# round SEED KIB FILE: writes, flushes, forgets what is cached, reads again.
round() {
    pattern "$1" "$2" | dd of="$3" bs=64k conv=fsync 2>/run/dd || { io_error "write of $3: $(tail -n 1 /run/dd)"; return 1; }
    echo 3 >/proc/sys/vm/drop_caches
    check "$@"
}

check() {
    pattern "$1" "$2" | cmp -s - "$3" || { io_error "$3 does not hold what was written"; return 1; }
}

read_disk() {
    echo 3 >/proc/sys/vm/drop_caches
    if dd if=/dev/vda of=/dev/null bs=1M count="$1" 2>/run/dd; then
        say "read $1 MiB"
    else
        io_error "read of $1 MiB: $(tail -n 1 /run/dd)"
    fi
}

# base AT: the sum of 256 KiB of the base, from a block of 64 KiB on. Each round forgets what is cached, so they come from the disk.
base() {
    dd if=/dev/vda bs=64k skip="$1" count=4 2>/run/dd | md5sum
}

soak() {
    until=$(($(cut -d . -f 1 /proc/uptime) + $1))
    again=$(setting soak_again)
    [ -n "$again" ] && sum=$(base "$again")
    rounds=0
    errors=0
    while [ "$(cut -d . -f 1 /proc/uptime)" -lt "$until" ]; do
        rounds=$((rounds + 1))
        round "$rounds" 256 $data/soak || errors=$((errors + 1))
        # A part of the base that moves on with each round.
        dd if=/dev/vda of=/dev/null bs=64k skip=$((rounds * 7 % 1500)) count=4 2>/run/dd || {
            io_error "read of the base: $(tail -n 1 /run/dd)"
            errors=$((errors + 1))
        }
        # And one that does not.
        if [ -n "$again" ] && [ "$(base "$again")" != "$sum" ]; then
            io_error "the base differs at block $again: $(tail -n 1 /run/dd)"
            errors=$((errors + 1))
        fi
        say "round $rounds errors $errors"
    done
    say "soak done, rounds $rounds, errors $errors"
}

# The host asks it to hold the file systems still while a snapshot is taken.
guest_agent() {
    insmod /lib/modules/virtio_console.ko
    port=$(grep -l org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name | head -n 1 | cut -d / -f 5)
    if [ -z "$port" ]; then
        say "no port for a guest agent"
        return
    fi
    qemu-ga -m virtio-serial -p "/dev/$port" -t /run -f /run/qemu-ga.pid -l /run/qemu-ga.log &
    say "guest agent on $port"
}

# Lines that are on the disk when they are said.
steady() {
    line=0
    while [ "$line" -lt "$1" ]; do
        line=$((line + 1))
        echo "$line" >>$data/steady && sync && say "line $line"
        sleep 0.2
    done
}

jobs() {
    # In the order of the seed.
    while IFS='=' read -r key value; do
        case $key in
        read_mb) read_disk "$value" ;;
        write_mb) round write $((value * 1024)) $data/written && say "wrote $value MiB" ;;
        verify_mb) check write $((value * 1024)) $data/written && say "verified $value MiB" ;;
        soak_seconds) soak "$value" ;;
        say) say "$value" ;;
        guest_agent) guest_agent ;;
        steady) steady "$value" ;;
        poweroff) going_down ;;
        esac
    done </run/seed
    say "jobs done"
}

going_down() {
    say "going down"
    # Some guests take their time.
    sleep "$(setting slow_end | grep . || echo 0)"
    sync
    mount -o remount,ro / || true
    poweroff -f
}

jobs &
if [ -n "$button" ]; then
    dd bs=24 count=1 <&9 >/dev/null 2>&1 && going_down
fi
while :; do
    sleep 3600
done
