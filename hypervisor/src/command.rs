//! The command line of a VM. Pure: the same [`VmSpec`] makes the same words.
//!
//! What is set, and why (figures in `docs/guests.md`):
//! - **`rerror=stop,werror=stop`.** A broken connection never reaches the guest anyway: libiscsi reconnects for as long as it
//!   takes and repeats what was not answered, so an agent's restart is a pause. Should a target answer with an error (no
//!   parent left, no room for a delta), the guest is paused instead of shown an error which would turn its root file
//!   system read-only for good; [`RunningVm`](crate::RunningVm) resumes it, and the request is repeated.
//! - **No `timeout` on the iSCSI driver**: a command that takes long is a stall to sit out. The agent answers NOPs again
//!   once it is back; QEMU itself reconnects after three unanswered ones (15 s).
//! - **`cache.direct=on`, `no-flush=off`, `write-cache=on`**: the guest sees a volatile write cache and flushes it; each of its
//!   flushes becomes a SYNCHRONIZE CACHE to the target.
//! - **`logical_block_size=512`** for a block device of the host, whose own blocks may have 4 KiB (the kernel plane's have): images are made for
//!   512, partition table and all. QEMU reads and writes whole blocks of the device around what is shorter. `physical_block_size` tells the guest
//!   what to align to.
//! - **`discard=unmap`**: what the guest trims leaves the delta.
//! - **`-nodefaults`, no display, no option ROM**: each device costs the firmware time under emulation.
//! - **`-sandbox`** without `spawn=deny`: `-daemonize` forks behind it.

use std::ffi::OsString;
use std::path::Path;

use serde_json::{Value, json};

use crate::Acceleration;
use crate::spec::{DiskSource, Readiness, RunDir, VmSpec};

/// Name of the disk's block node; [`DISK_DEVICE`] is the device in front of it.
pub(crate) const DISK_NODE: &str = "disk";
/// The channel of the guest's agent.
pub(crate) const AGENT_CHARDEV: &str = "agent";
/// The secret of the disk, in QEMU.
const DISK_SECRET: &str = "disk-secret";
/// Id of the disk's device.
pub(crate) const DISK_DEVICE: &str = "disk0";

/// Translated code that QEMU keeps for each emulated VM, in MiB. Its default, a large part of the machine's memory, is for
/// one VM alone; a Debian boot translates some 60 MiB.
const TCG_BUFFER_MIB: u32 = 128;

/// The words behind `qemu-system-x86_64`. `forward` is the host port that leads to the guest's readiness port.
pub(crate) fn arguments(spec: &VmSpec, acceleration: Acceleration, forward: Option<u16>) -> Vec<OsString> {
    let dir = RunDir(&spec.run_dir);
    let mut words = Words::default();
    words.option("-name", format!("guest={},debug-threads=on", spec.name));
    words.option("-uuid", spec.instance.uuid());
    words.flag("-daemonize");
    words.path("-pidfile", &dir.pid());
    // `page` logs nothing under system emulation; with some log chosen QEMU keeps its stderr, which is what is wanted.
    words.option("-d", "page");
    words.path("-D", &dir.log());
    words.option("-msg", "timestamp=on");
    words.option("-sandbox", "on,obsolete=deny,resourcecontrol=deny");

    words.flag("-nodefaults");
    words.flag("-no-user-config");
    words.option("-display", "none");
    words.option("-machine", "pc,usb=off,vmport=off,hpet=off");
    match acceleration {
        Acceleration::Kvm => {
            words.option("-accel", "kvm");
            words.option("-cpu", "host");
        }
        Acceleration::Tcg => {
            words.option("-accel", format!("tcg,thread=multi,tb-size={TCG_BUFFER_MIB}"));
            words.option("-cpu", "max");
        }
    }
    words.option("-m", spec.memory_mib.to_string());
    words.option("-smp", spec.cpus.to_string());
    words.option("-boot", "strict=on");

    words.option(
        "-chardev",
        format!("file,id=console,path={}", dir.console().display()),
    );
    words.option("-serial", "chardev:console");
    for (id, path) in [("qmp", dir.qmp()), ("events", dir.events())] {
        words.option(
            "-chardev",
            format!("socket,id={id},path={},server=on,wait=off", path.display()),
        );
        words.option("-mon", format!("chardev={id},mode=control"));
    }

    if let DiskSource::Iscsi {
        secret_file: Some(path),
        ..
    } = &spec.disk
    {
        // In a file, because everybody on the machine sees a command line.
        words.option(
            "-object",
            format!("secret,id={DISK_SECRET},file={}", path.display()),
        );
    }
    words.option("-blockdev", disk(&spec.disk).to_string());
    words.option(
        "-device",
        format!(
            "virtio-blk-pci,drive={DISK_NODE},id={DISK_DEVICE},bootindex=0,write-cache=on,rerror=stop,werror=stop{}",
            blocks(&spec.disk)
        ),
    );
    if spec.seed.is_some() {
        let path = dir.seed();
        let node = json!({ "driver": "file", "node-name": "seed", "filename": path.to_string_lossy(), "read-only": true });
        words.option("-blockdev", node.to_string());
        words.option("-device", "virtio-blk-pci,drive=seed,id=seed0");
    }
    words.option("-object", "rng-random,id=rng,filename=/dev/urandom");
    words.option("-device", "virtio-rng-pci,rng=rng");
    network(spec, forward, &mut words);
    // Last, so that no other device has another address in the guest than before there was one.
    words.option(
        "-chardev",
        format!(
            "socket,id={AGENT_CHARDEV},path={},server=on,wait=off",
            dir.agent().display()
        ),
    );
    words.option("-device", "virtio-serial-pci,id=serial0");
    words.option(
        "-device",
        format!("virtserialport,bus=serial0.0,chardev={AGENT_CHARDEV},name=org.qemu.guest_agent.0"),
    );
    words.0
}

fn disk(disk: &DiskSource) -> Value {
    let mut node = match disk {
        DiskSource::Iscsi {
            url,
            initiator,
            secret_file,
        } => {
            let mut node = json!({
                "driver": "iscsi",
                "transport": "tcp",
                "portal": url.portal(),
                "target": url.target.to_string(),
                "lun": url.lun,
                "initiator-name": initiator.to_string(),
            });
            if secret_file.is_some() {
                node["user"] = initiator.to_string().into();
                node["password-secret"] = DISK_SECRET.into();
            }
            node
        }
        DiskSource::Raw { path } => {
            json!({ "driver": "file", "filename": path.to_string_lossy(), "aio": "threads" })
        }
        DiskSource::Device { path } => {
            json!({ "driver": "host_device", "filename": path.to_string_lossy(), "aio": "threads" })
        }
    };
    node["node-name"] = DISK_NODE.into();
    node["discard"] = "unmap".into();
    // A raw file stays behind the page cache, so that it also lies on file systems without direct I/O.
    let direct = !matches!(disk, DiskSource::Raw { .. });
    node["cache"] = json!({ "direct": direct, "no-flush": false });
    node
}

/// The blocks that the guest sees, where QEMU's own choice would not do.
fn blocks(disk: &DiskSource) -> &'static str {
    match disk {
        DiskSource::Device { .. } => ",logical_block_size=512,physical_block_size=4096",
        DiskSource::Iscsi { .. } | DiskSource::Raw { .. } => "",
    }
}

fn network(spec: &VmSpec, forward: Option<u16>, words: &mut Words) {
    let forward = match (&spec.ready, forward) {
        (Readiness::Port { guest_port, .. }, Some(port)) => {
            format!(",hostfwd=tcp:127.0.0.1:{port}-:{guest_port}")
        }
        _ => String::new(),
    };
    if spec.network || !forward.is_empty() {
        // An empty romfile: no PXE code to load and run.
        words.option("-netdev", format!("user,id=net,restrict=on{forward}"));
        words.option(
            "-device",
            format!("virtio-net-pci,netdev=net,romfile=,mac={}", mac(spec)),
        );
    }
}

/// A locally administered address made of the instance, so that it stays the same over restarts.
fn mac(spec: &VmSpec) -> String {
    let [.., a, b, c, d, e] = spec.instance.0;
    format!("52:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}")
}

#[derive(Default)]
struct Words(Vec<OsString>);

impl Words {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }
    fn option(&mut self, option: &str, value: impl Into<OsString>) {
        self.0.push(option.into());
        self.0.push(value.into());
    }
    fn path(&mut self, option: &str, path: &Path) {
        self.option(option, path);
    }
}

#[cfg(test)]
mod tests {
    use treeboot_types::{Iqn, VmName};

    use super::*;
    use crate::Instance;

    fn line(spec: &VmSpec, forward: Option<u16>) -> String {
        let words = arguments(spec, Acceleration::Tcg, forward);
        words
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    fn spec(disk: DiskSource) -> VmSpec {
        VmSpec {
            name: VmName::new("vm-1").expect("valid"),
            instance: Instance([7; 16]),
            disk,
            memory_mib: 256,
            cpus: 2,
            seed: None,
            ready: Readiness::Started,
            network: false,
            run_dir: "/run/vm-1".into(),
        }
    }

    #[test]
    fn a_lun_is_named_in_full_and_never_cached_by_the_host() {
        let line = line(
            &spec(DiskSource::Iscsi {
                url: "iscsi://[::1]:3261/iqn.2026-11.dev.treeboot:disk:vm-1/0"
                    .parse()
                    .expect("a URL"),
                initiator: Iqn::new("iqn.2026-11.dev.treeboot:vm:vm-1").expect("a name"),
                secret_file: Some("/run/vm-1/disk.secret".into()),
            }),
            None,
        );
        for part in [
            r#""portal":"[::1]:3261""#,
            r#""target":"iqn.2026-11.dev.treeboot:disk:vm-1""#,
            r#""initiator-name":"iqn.2026-11.dev.treeboot:vm:vm-1""#,
            r#""user":"iqn.2026-11.dev.treeboot:vm:vm-1""#,
            r#""password-secret":"disk-secret""#,
            "-object secret,id=disk-secret,file=/run/vm-1/disk.secret",
            r#""direct":true"#,
            r#""no-flush":false"#,
            "rerror=stop,werror=stop",
            "-pidfile /run/vm-1/qemu.pid",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(!line.contains("netdev") && !line.contains("seed"), "{line}");
    }

    #[test]
    fn a_guest_sees_blocks_of_512_bytes_of_every_device() {
        let line = line(
            &spec(DiskSource::Device {
                path: "/dev/sdx".into(),
            }),
            None,
        );
        for part in [
            r#""driver":"host_device""#,
            r#""direct":true"#,
            "logical_block_size=512,physical_block_size=4096",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn a_port_to_watch_is_forwarded_on_loopback_only() {
        let mut spec = spec(DiskSource::Raw { path: "/disk".into() });
        spec.ready = Readiness::Port {
            guest_port: 22,
            send: vec![],
        };
        let line = line(&spec, Some(4022));
        assert!(
            line.contains("restrict=on,hostfwd=tcp:127.0.0.1:4022-:22"),
            "{line}"
        );
    }
}
