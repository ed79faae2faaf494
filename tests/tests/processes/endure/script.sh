# Writes to a disk, syncs and verifies, and reads its base meanwhile, until the file $STOP is there; then compares the base with the image.
# Of DISK, the first WRITTEN bytes are written, the rest up to BYTES is the image's, the first MiB of which is read and compared again and again; how often is in the file $AGAIN.
# AWK and LEAST make pauses of fio's logs.
options="--filename=$DISK --bs=4k --direct=1 --ioengine=psync --log_unix_epoch=1"
pauses() {
    awk -F, -v least="$LEAST" "$AWK" "$1_clat.1.log"
    rm -f "$1"_*.log
}
fio $options --name=base --rw=read --offset="$WRITTEN" --size=$((BYTES - WRITTEN)) --rate_iops="$READS" \
    --write_lat_log=base --output=base.txt &
reader=$!
mib=$((WRITTEN >> 20))
dd if="$IMAGE" bs=1M skip=$mib count=1 2>dd.txt >again.bin
again() {
    times=0
    while [ ! -e "$STOP" ]; do
        dd if="$DISK" iflag=direct bs=64k skip=$((mib * 16)) count=16 2>dd.txt | cmp - again.bin || return 1
        times=$((times + 1))
        echo $times >"$AGAIN.new"
        mv "$AGAIN.new" "$AGAIN"
        sleep 0.2
    done
}
again &
again=$!
pass=0
while [ ! -e "$STOP" ]; do
    blkdiscard -f --length "$WRITTEN" "$DISK"
    pass=$((pass + 1))
    if ! fio $options --name=verified --rw=randwrite --size="$WRITTEN" --rate_iops=,"$WRITES" --fsync=8 --randseed=$pass \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --write_lat_log=verified --output=verified.txt; then
        cat verified.txt
        echo "the writer failed"
        exit 1
    fi
    pauses verified
    echo "PASS $pass"
done
if ! wait $again; then
    cat dd.txt
    echo "the base was another one"
    exit 1
fi
# Told to end, it says so by its status; what it met stands in its report.
kill -TERM $reader 2>/dev/null || true
wait $reader || true
if ! grep -q 'err= 0' base.txt; then
    cat base.txt
    echo "the reader failed"
    exit 1
fi
pauses base
cmp --ignore-initial="$WRITTEN" "$DISK" "$IMAGE"
echo "WELL after $pass passes"
