//! What a VM is to be. Values only; they are written to the run directory, so that a VM is known after a restart.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use treeboot_types::{Iqn, IscsiUrl, VmName};

use crate::Seed;

/// The file of a run directory that says what was asked for: the first one in it.
pub const SPEC_FILE: &str = "vm.json";

/// Longest run directory in bytes: the path of a socket in it must fit `sun_path` (108 bytes, `unix(7)`).
pub const MAX_RUN_DIR_BYTES: usize = 107 - "/events.sock".len();
/// Least memory that a VM gets, in MiB.
pub(crate) const MIN_MEMORY_MIB: u32 = 16;
/// Most processors that a VM gets: the limit of QEMU's `pc` machine.
pub(crate) const MAX_CPUS: u32 = 255;

/// A VM to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Its name.
    pub name: VmName,
    /// Who it is, for as long as its disk lives.
    pub instance: Instance,
    /// What it boots from.
    pub disk: DiskSource,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// The identity that its first boot takes from a second disk; `None` for guests that bring their own.
    pub seed: Option<Seed>,
    /// How readiness is seen.
    pub ready: Readiness,
    /// Whether the guest gets a network card on QEMU's user network (DHCP, 10.0.2.0/24), which lets nothing out: the card
    /// is there for the host to reach the guest. [`Readiness::Port`] implies it.
    pub network: bool,
    /// The directory of this VM alone; made if it is not there.
    pub run_dir: PathBuf,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    /// A LUN.
    Iscsi {
        /// Where it is served.
        url: IscsiUrl,
        /// The name by which QEMU logs in.
        initiator: Iqn,
        /// A file with the CHAP secret, which goes with that name; absent where the LUN asks for none.
        #[serde(default)]
        secret_file: Option<PathBuf>,
    },
    /// A raw file, which the guest writes to.
    Raw {
        /// Its path.
        path: PathBuf,
    },
    /// A block device of the host, which the guest writes to.
    Device {
        /// Its path.
        path: PathBuf,
    },
}

/// How to see from outside that a guest is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Readiness {
    /// A line of the serial console holds one of these texts.
    Console {
        /// The texts; compared as they are.
        any_of: Vec<String>,
    },
    /// A TCP port of the guest answers with at least one byte. (That a connection opens proves nothing: QEMU's user
    /// network accepts it before the guest does.)
    Port {
        /// The port inside the guest.
        guest_port: u16,
        /// What is sent first; empty where the server speaks first, as sshd does.
        send: Vec<u8>,
    },
    /// QEMU runs, nothing else is known.
    Started,
}

/// The 128 bits that tell a VM from every other: its SMBIOS UUID, its machine-id and its cloud-init instance-id.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Instance(pub [u8; 16]);

impl Instance {
    /// 32 hexadecimal digits in lower case, the form of `machine-id(5)`.
    pub fn machine_id(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The form of RFC 9562 §4.
    pub fn uuid(&self) -> String {
        let hex = self.machine_id();
        format!(
            "{}-{}-{}-{}-{}",
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..]
        )
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uuid())
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uuid())
    }
}

/// Why a [`VmSpec`] cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The path of a socket would not fit.
    #[error(
        "the run directory {dir} of VM {vm} has {bytes} bytes; a socket's path allows {MAX_RUN_DIR_BYTES}: use a shorter one"
    )]
    LongRunDir {
        /// The VM.
        vm: VmName,
        /// The directory.
        dir: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// QEMU changes to `/`, so a relative path would lead elsewhere; a comma has a meaning on its command line.
    #[error("the path {path} of VM {vm} must be absolute, in UTF-8 and without ','")]
    Path {
        /// The VM.
        vm: VmName,
        /// The path.
        path: PathBuf,
    },
    /// Too little memory or none.
    #[error(
        "VM {vm} is to have {memory_mib} MiB of memory; give at least {MIN_MEMORY_MIB}, and 256 for a Debian"
    )]
    Memory {
        /// The VM.
        vm: VmName,
        /// What was asked.
        memory_mib: u32,
    },
    /// No processor, or more than a machine takes.
    #[error("VM {vm} is to have {cpus} processors; give 1 to {MAX_CPUS}")]
    Cpus {
        /// The VM.
        vm: VmName,
        /// What was asked.
        cpus: u32,
    },
}

impl VmSpec {
    /// Checks what can be known without the machine.
    ///
    /// # Errors
    /// [`SpecError`] names the VM, the value and the limit.
    pub fn check(&self) -> Result<(), SpecError> {
        let vm = || self.name.clone();
        let bytes = self.run_dir.as_os_str().len();
        if bytes > MAX_RUN_DIR_BYTES {
            return Err(SpecError::LongRunDir {
                vm: vm(),
                dir: self.run_dir.clone(),
                bytes,
            });
        }
        let disk = match &self.disk {
            DiskSource::Raw { path } | DiskSource::Device { path } => Some(path),
            DiskSource::Iscsi { secret_file, .. } => secret_file.as_ref(),
        };
        for path in disk.into_iter().chain([&self.run_dir]) {
            let plain = path
                .to_str()
                .is_some_and(|text| !text.contains([',', '\n', '\0']));
            if !path.is_absolute() || !plain {
                return Err(SpecError::Path {
                    vm: vm(),
                    path: path.clone(),
                });
            }
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return Err(SpecError::Memory {
                vm: vm(),
                memory_mib: self.memory_mib,
            });
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(SpecError::Cpus {
                vm: vm(),
                cpus: self.cpus,
            });
        }
        Ok(())
    }
}

/// The files of a run directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir<'a>(pub(crate) &'a Path);

impl RunDir<'_> {
    pub(crate) fn spec(&self) -> PathBuf {
        self.0.join(SPEC_FILE)
    }
    pub(crate) fn pid(&self) -> PathBuf {
        self.0.join("qemu.pid")
    }
    pub(crate) fn qmp(&self) -> PathBuf {
        self.0.join("qmp.sock")
    }
    pub(crate) fn events(&self) -> PathBuf {
        self.0.join("events.sock")
    }
    pub(crate) fn agent(&self) -> PathBuf {
        self.0.join("agent.sock")
    }
    pub(crate) fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }
    pub(crate) fn log(&self) -> PathBuf {
        self.0.join("qemu.log")
    }
    pub(crate) fn launch_log(&self) -> PathBuf {
        self.0.join("launch.log")
    }
    pub(crate) fn seed(&self) -> PathBuf {
        self.0.join("seed.img")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn spec() -> VmSpec {
        VmSpec {
            name: VmName::new("vm-1").expect("valid"),
            instance: Instance([0xab; 16]),
            disk: DiskSource::Raw { path: "/disk".into() },
            memory_mib: 256,
            cpus: 1,
            seed: None,
            ready: Readiness::Started,
            network: false,
            run_dir: "/run/vm-1".into(),
        }
    }

    #[test]
    fn a_spec_that_cannot_run_is_refused_with_its_name() {
        type Change = fn(&mut VmSpec);
        let changes: [(Change, &str); 6] = [
            (|s| s.run_dir = format!("/{}", "x".repeat(120)).into(), "shorter"),
            (|s| s.run_dir = "relative".into(), "absolute"),
            (|s| s.run_dir = "/a,b".into(), "','"),
            (|s| s.disk = DiskSource::Raw { path: "disk".into() }, "absolute"),
            (|s| s.memory_mib = 0, "MiB"),
            (|s| s.cpus = 0, "processors"),
        ];
        assert_eq!(spec().check(), Ok(()));
        for (change, word) in changes {
            let mut spec = spec();
            change(&mut spec);
            let message = spec.check().expect_err(word).to_string();
            assert!(message.contains(word) && message.contains("vm-1"), "{message}");
        }
    }

    #[test]
    fn an_instance_prints_as_uuid_and_machine_id() {
        let instance = Instance([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(instance.uuid(), "00010203-0405-0607-0809-0a0b0c0d0e0f");
        assert_eq!(instance.machine_id(), "000102030405060708090a0b0c0d0e0f");
    }

    #[test]
    fn a_spec_survives_its_file() {
        let json = serde_json::to_string(&spec()).expect("serialises");
        assert_eq!(serde_json::from_str::<VmSpec>(&json).expect("parses"), spec());
    }
}
