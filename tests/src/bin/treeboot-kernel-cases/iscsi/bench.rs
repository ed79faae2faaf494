//! What the cases of LIO and open-iscsi are made of: two files, a loop device, one target name and one initiator.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_block::{BlockDevice as _, FileDevice, FileOptions};
use treeboot_iscsi::initiator::{RemoteDevice, SessionOptions};
use treeboot_iscsi::lio::{Backing, Backstore, BackstoreName, CONFIGFS, Export, Lio, Outcome};
use treeboot_iscsi::login::{Chap, Credentials, Secret};
use treeboot_iscsi::open_iscsi::{Endpoint, OpenIscsi, Settings, UnitDevice};
use treeboot_iscsi::target::{Access, LunSpec, Server, ServerConfig, TargetSpec};
use treeboot_types::{ImageId, Iqn};

/// The host that the cases are.
pub(crate) const HOST: &str = "case-host";
pub(crate) const SECRET: &str = "the initiators secret";
pub(crate) const TARGET_SECRET: &str = "the-targets-secret";

/// The machine's own initiator, which must not be used.
pub(crate) const OWN_NAME: &str = "iqn.2026-11.org.example:the-machine";

const PORT: u16 = 3260;
const DATA_BYTES: usize = 8 << 20;
const HASH_BYTES: usize = 1 << 20;

/// For whatever a case waits for.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn chap() -> Result<Chap> {
    chap_of(SECRET, TARGET_SECRET)
}

pub(crate) fn chap_of(initiators: &str, targets: &str) -> Result<Chap> {
    let initiator = Credentials::new("the-initiator", Secret::new(initiators)?)?;
    let target = Credentials::new("the-target", Secret::new(targets)?)?;
    Ok(Chap::mutual(initiator, target)?)
}

pub(crate) fn is_prepared() -> bool {
    Path::new(CONFIGFS).join("target/core").exists() || Path::new("/sys/class/iscsi_transport").exists()
}

pub(crate) fn command(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program).args(args).stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("{program} {args:?}"))?;
    ensure!(status.success(), "{program} {args:?}: {status}");
    Ok(())
}

pub(crate) fn mount_configfs() -> Result<()> {
    if fs::read_to_string("/proc/mounts")?.contains(CONFIGFS) {
        return Ok(());
    }
    command("modprobe", &["configfs"])?;
    command("mount", &["-n", "-t", "configfs", "none", CONFIGFS])
}

pub(crate) fn load_modules() -> Result<()> {
    mount_configfs()?;
    command(
        "modprobe",
        &["-a", "target_core_mod", "iscsi_tcp", "sd_mod", "loop"],
    )
}

pub(crate) fn iscsid_runs() -> bool {
    Path::new("/proc")
        .read_dir()
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.trim() == "iscsid"))
}

pub(crate) fn start_iscsid() -> Result<()> {
    if iscsid_runs() {
        return Ok(());
    }
    fs::create_dir_all("/etc/iscsi")?;
    fs::write(
        "/etc/iscsi/initiatorname.iscsi",
        format!("InitiatorName={OWN_NAME}\n"),
    )?;
    command("iscsid", &[])?;
    wait("iscsid to run", || Ok(iscsid_runs().then_some(())))
}

/// Kills the daemons by their pids, as a crash would.
pub(crate) fn kill_iscsid() -> Result<()> {
    for entry in Path::new("/proc").read_dir()?.flatten() {
        let named = fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.trim() == "iscsid");
        if let (true, Ok(pid)) = (named, entry.file_name().to_string_lossy().parse()) {
            // The second of the two may have gone with the first.
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
    wait("iscsid to end", || Ok((!iscsid_runs()).then_some(())))
}

/// Waits for a value, for at most [`LIMIT`].
pub(crate) fn wait<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    match wait_at_most(LIMIT, || look().transpose()) {
        Some(found) => found.with_context(|| format!("while waiting for {what}")),
        None => bail!("{what}: not within {LIMIT:?}"),
    }
}

/// Looks until there is a value, or the limit has passed.
pub(crate) fn wait_at_most<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        let found = look();
        if found.is_some() || Instant::now() >= end {
            return found;
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// The nodes of devices are made a moment after sysfs shows them.
pub(crate) fn wait_for_node(unit: &UnitDevice) -> Result<()> {
    let path = unit.path();
    wait("a device's node", || Ok(path.exists().then_some(())))
}

pub(crate) fn expect(found: &[u8], wanted: &[u8]) -> Result<()> {
    let at = found.iter().zip(wanted).position(|(a, b)| a != b);
    ensure!(
        found == wanted,
        "{} bytes instead of {}, the first difference at {at:?}",
        found.len(),
        wanted.len()
    );
    Ok(())
}

pub(crate) fn read_all(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .with_context(|| format!("reading {}", path.display()))?;
    Ok(bytes)
}

/// Reads past the page cache.
pub(crate) fn read_direct(device: &Path, offset: u64) -> std::io::Result<()> {
    // O_DIRECT wants memory aligned to the device's block; a page's worth of room around holds one such piece.
    const O_DIRECT: i32 = 0o40000;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(O_DIRECT)
        .open(device)?;
    let mut room = vec![0; 8192];
    let skip = room.as_ptr().align_offset(4096);
    let piece = room.get_mut(skip..skip + 4096).unwrap_or_default();
    file.read_exact_at(piece, offset)
}

pub(crate) fn write_at(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(bytes, offset)?;
    file.sync_all()?;
    Ok(())
}

pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(future)
}

/// All of a LUN, by treeboot's own initiator.
pub(crate) fn read_remote(options: SessionOptions, lun: u16) -> Result<Vec<u8>> {
    block_on(async {
        let device = RemoteDevice::connect(options, lun).await?;
        let mut bytes = vec![0; device.geometry().bytes as usize];
        device.read(0, &mut bytes).await?;
        device.close().await;
        Ok(bytes)
    })
}

/// Bytes that differ everywhere, and from one case to another.
fn bytes(case: &str, count: usize) -> Vec<u8> {
    let mut state = case.bytes().fold(0x9E37_79B9_7F4A_7C15_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3)
    });
    let mut bytes = Vec::with_capacity(count);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

/// One case's files, names and connections.
pub(crate) struct Bench {
    pub(crate) lio: Lio,
    pub(crate) initiator: OpenIscsi,
    pub(crate) target: Iqn,
    pub(crate) data: Vec<u8>,
    pub(crate) hashes: Vec<u8>,
    folder: PathBuf,
    data_file: PathBuf,
    hash_file: PathBuf,
    loop_device: PathBuf,
}

impl Bench {
    /// Makes the files and the loop device; LIO has nothing of ours yet.
    pub(crate) fn new(case: &str) -> Result<Self> {
        load_modules()?;
        if case != "missing" {
            start_iscsid()?;
        }
        let folder = PathBuf::from("/run/treeboot-cases").join(case);
        fs::create_dir_all(&folder)?;
        let (data, hashes) = (bytes(case, DATA_BYTES), bytes(&case.to_uppercase(), HASH_BYTES));
        let (data_file, hash_file) = (folder.join("data.img"), folder.join("hashes.img"));
        fs::write(&data_file, &data)?;
        fs::write(&hash_file, &hashes)?;
        let output = Command::new("losetup")
            .arg("--find")
            .arg("--show")
            .arg(&data_file)
            .output()?;
        ensure!(output.status.success(), "losetup: {output:?}");
        let loop_device = PathBuf::from(String::from_utf8(output.stdout)?.trim());
        let image: ImageId = format!("{case}@1").parse()?;
        let bench = Self {
            lio: Lio::default(),
            initiator: OpenIscsi::new(&HOST.parse()?, Settings::default()),
            target: Iqn::of_image(&image),
            data,
            hashes,
            folder,
            data_file,
            hash_file,
            loop_device,
        };
        bench.expect_nothing().context("before the case")?;
        Ok(bench)
    }

    /// The bench of the process that started this one; [`Self::leave`] ends it without touching anything.
    pub(crate) fn of_parent(case: &str, loop_device: &str) -> Result<Self> {
        let folder = PathBuf::from("/run/treeboot-cases").join(case);
        let image: ImageId = format!("{case}@1").parse()?;
        Ok(Self {
            lio: Lio::default(),
            initiator: OpenIscsi::new(&HOST.parse()?, Settings::default()),
            target: Iqn::of_image(&image),
            data: Vec::new(),
            hashes: Vec::new(),
            data_file: folder.join("data.img"),
            hash_file: folder.join("hashes.img"),
            loop_device: loop_device.into(),
            folder,
        })
    }

    /// What [`Self::of_parent`] needs.
    pub(crate) fn for_child(&self) -> [String; 2] {
        let case = self
            .folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        [case, self.loop_device.display().to_string()]
    }

    /// Lets go of everything as it is.
    pub(crate) fn leave(self) {
        std::mem::forget(self);
    }

    pub(crate) fn portals() -> Vec<SocketAddr> {
        vec![
            SocketAddr::from(([127, 0, 0, 1], PORT)),
            SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], PORT)),
        ]
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint {
            target: self.target.clone(),
            portal: Self::portals()[0],
        }
    }

    pub(crate) fn endpoint_6(&self) -> Endpoint {
        Endpoint {
            target: self.target.clone(),
            portal: Self::portals()[1],
        }
    }

    /// The file behind a LUN.
    pub(crate) fn file(&self, lun: u16) -> &Path {
        if lun == 0 {
            &self.data_file
        } else {
            &self.hash_file
        }
    }

    pub(crate) fn block_backstore(&self, writable: bool) -> Backstore {
        Backstore {
            name: BackstoreName::new("data-case").expect("it is one"),
            backing: Backing::Block {
                path: self.loop_device.clone(),
            },
            writable,
            serial: "0123456789abcdef0123456789abcdef".into(),
        }
    }

    pub(crate) fn file_backstore(&self, writable: bool) -> Backstore {
        Backstore {
            name: BackstoreName::new("hash-case").expect("it is one"),
            backing: Backing::File {
                path: self.hash_file.clone(),
                bytes: HASH_BYTES as u64,
            },
            writable,
            serial: "fedcba9876543210fedcba9876543210".into(),
        }
    }

    /// LUN 0 on the loop device, LUN 1 on the file.
    pub(crate) fn wanted(&self, writable: bool, access: Access) -> (Backstore, Backstore, Export) {
        let (data, hashes) = (self.block_backstore(writable), self.file_backstore(writable));
        let export = Export {
            name: self.target.clone(),
            portals: Self::portals(),
            luns: vec![(0, data.name.clone()), (1, hashes.name.clone())],
            access,
            writable,
        };
        (data, hashes, export)
    }

    pub(crate) fn build(&self, data: &Backstore, hashes: &Backstore, export: &Export) -> Result<()> {
        self.build_with(&self.lio, data, hashes, export)
    }

    pub(crate) fn build_with(
        &self,
        lio: &Lio,
        data: &Backstore,
        hashes: &Backstore,
        export: &Export,
    ) -> Result<()> {
        lio.ensure_backstore(data)?;
        lio.ensure_backstore(hashes)?;
        lio.ensure_target(export)?;
        Ok(())
    }

    pub(crate) fn export(&self, writable: bool, access: Access) -> Result<()> {
        let (data, hashes, export) = self.wanted(writable, access);
        self.build(&data, &hashes, &export)
    }

    pub(crate) fn remove(&self) -> Result<()> {
        self.initiator.forget_all()?;
        self.remove_with(&self.lio)
    }

    pub(crate) fn remove_with(&self, lio: &Lio) -> Result<()> {
        lio.remove_target(&self.target, Duration::ZERO)?;
        lio.remove_backstore(&self.block_backstore(false).name)?;
        lio.remove_backstore(&self.file_backstore(false).name)?;
        Ok(())
    }

    pub(crate) fn detach_loop(&self) -> Result<()> {
        command("losetup", &["-d", &self.loop_device.display().to_string()])
    }

    /// Nothing of ours, by the kernel's own directories.
    pub(crate) fn expect_nothing(&self) -> Result<()> {
        let names = |path: String| -> Vec<String> {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        };
        let targets = names(format!("{CONFIGFS}/target/iscsi"));
        ensure!(
            !targets.iter().any(|name| name.contains("treeboot")),
            "{targets:?}"
        );
        let hbas = names(format!("{CONFIGFS}/target/core"));
        ensure!(!hbas.iter().any(|name| name.ends_with("26111")), "{hbas:?}");
        ensure!(self.initiator.sessions()?.is_empty(), "sessions are left");
        for record in names("/etc/iscsi/nodes".into()) {
            let portals = names(format!("/etc/iscsi/nodes/{record}"));
            ensure!(
                portals.iter().all(|name| name.matches(',').count() > 1),
                "{record}: {portals:?}"
            );
        }
        let found = self.lio.found()?;
        ensure!(
            found.targets.is_empty() && found.backstores.is_empty(),
            "{found:?}"
        );
        Ok(())
    }

    /// Removes all that the case made, and looks whether it is gone.
    pub(crate) fn end(&self) -> Result<()> {
        self.remove()?;
        self.expect_nothing()?;
        if fs::read_dir("/sys/block")?.flatten().any(|disk| {
            let file = disk.path().join("loop/backing_file");
            fs::read_to_string(file).is_ok_and(|file| file.trim() == self.data_file.display().to_string())
        }) {
            self.detach_loop()?;
        }
        fs::remove_dir_all(&self.folder)?;
        Ok(())
    }

    /// Starts treeboot's own target on the data file, as a process that can be killed and stopped.
    pub(crate) fn serve(&self, port: u16) -> Result<Served> {
        let ready = self.folder.join("ready");
        let child = Command::new(std::env::current_exe()?)
            .args(["helper", "iscsi", "serve"])
            .arg(self.target.as_str())
            .arg(&self.data_file)
            .arg(port.to_string())
            .arg(&ready)
            .spawn()?;
        let served = Served { child };
        wait("the target to serve", || Ok(ready.exists().then_some(())))?;
        Ok(served)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // After a failed case: the next one finds the place as it should be, as far as that can be had.
        if self.folder.exists() {
            let _ = self.remove();
            for target in self.lio.found().unwrap_or_default().targets {
                let _ = self.lio.remove_target(&target.name, Duration::ZERO);
            }
            let _ = self.remove();
            let _ = self.detach_loop();
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// A target in a process of its own.
pub(crate) struct Served {
    child: Child,
}

impl Served {
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        Ok(nix::sys::signal::kill(pid, signal)?)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may be dead already; that is what some cases are about.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `serve TARGET FILE PORT READY`: serves until it is killed.
pub(crate) fn serve(args: &[String]) -> Result<()> {
    let [target, file, port, ready] = args else {
        bail!("serve TARGET FILE PORT READY");
    };
    let device = FileDevice::open(file, FileOptions::default())?;
    let address = SocketAddr::from(([127, 0, 0, 1], port.parse()?));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let server = Server::bind(&[address], ServerConfig::default())?;
        server.add_target(TargetSpec {
            name: target.parse()?,
            luns: vec![LunSpec {
                lun: 0,
                device: Arc::new(device),
                serial: "case".into(),
                product: "case".into(),
                ident: [1; 16],
            }],
            access: Access::Anyone,
        })?;
        File::create(ready)?.write_all(b"ready")?;
        std::future::pending::<()>().await;
        Ok(())
    })
}

/// What an outcome should be, for the error's sake.
pub(crate) fn is(outcome: Outcome, wanted: Outcome) -> Result<()> {
    ensure!(outcome == wanted, "{outcome:?} instead of {wanted:?}");
    Ok(())
}
