#!/usr/bin/env bash
# Builds a small Debian box for libvirt on this machine, for where no box can be downloaded: root, mmdebstrap, e2fsprogs, qemu-utils.
# The kernel is started by libvirt itself, so the disk needs no boot loader.
#
# Usage: box.sh OUT.box
# then:  vagrant box add --name treeboot-local OUT.box && TREEBOOT_BOX=treeboot-local vagrant up
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 OUT.box" >&2
  exit 2
fi
out=$(realpath -m "$1")
key=/usr/share/vagrant/keys/vagrant.pub
[ -r "$key" ] || key=$(find / -xdev -path '*/vagrant*/keys/vagrant.pub' -print -quit 2>/dev/null)
if [ -z "$key" ]; then
  echo "$0: vagrant's public key is not here; apt-get install vagrant" >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

packages=linux-image-cloud-amd64,systemd-sysv,udev,dbus,kmod,initramfs-tools,openssh-server,sudo,iproute2,ifupdown,isc-dhcp-client
packages+=,procps,open-iscsi,dmsetup
cat >"$work/customize" <<'HOOK'
set -eu
root=$1 key=$2
chroot "$root" useradd --create-home --shell /bin/bash vagrant
home=$(chroot "$root" sh -c 'echo ~vagrant')
install -d -m 0700 "$root$home/.ssh"
install -m 0600 "$key" "$root$home/.ssh/authorized_keys"
chroot "$root" chown -R vagrant:vagrant "$home/.ssh"
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
# Names of links that do not depend on the machine.
ln -sf /dev/null "$root/etc/systemd/network/99-default.link"
printf 'auto lo eth0\niface lo inet loopback\niface eth0 inet dhcp\nsource /etc/network/interfaces.d/*\n' >"$root/etc/network/interfaces"
echo '/dev/vda / ext4 defaults 0 1' >"$root/etc/fstab"
echo 'UseDNS no' >>"$root/etc/ssh/sshd_config"
HOOK
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
mmdebstrap --quiet --variant=minbase --format=directory --include="$packages" \
  --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --customize-hook="sh '$work/customize' \"\$1\" '$key'" \
  "$release" "$work/tree"

cp "$work"/tree/boot/vmlinuz-* "$work/vmlinuz"
cp "$work"/tree/boot/initrd.img-* "$work/initrd.img"
truncate --size=4G "$work/box.raw"
mkfs.ext4 -q -F -d "$work/tree" "$work/box.raw"
qemu-img convert -O qcow2 "$work/box.raw" "$work/box.img"
echo '{"provider": "libvirt", "format": "qcow2", "virtual_size": 4}' >"$work/metadata.json"
cat >"$work/Vagrantfile" <<'RUBY'
Vagrant.configure("2") do |config|
  config.vm.provider("libvirt") do |libvirt|
    libvirt.kernel = File.join(__dir__, "vmlinuz")
    libvirt.initrd = File.join(__dir__, "initrd.img")
    libvirt.cmd_line = "root=/dev/vda rw console=ttyS0 net.ifnames=0"
  end
end
RUBY
tar --create --gzip --sparse --file "$out" --directory "$work" metadata.json Vagrantfile box.img vmlinuz initrd.img
echo "$out"
