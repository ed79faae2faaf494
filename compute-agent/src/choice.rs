//! Which plane the agent runs, from what a person chose.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use treeboot_block::MemberSpec;
use treeboot_types::{HostName, parse_size as size};

use crate::keys::Keys;
use crate::plane::user::{UserPlane, UserSettings};
use crate::plane::{Plane, PlaneKind, Verb};

/// A member of the cache group: `DIR`, or `DIR=SIZE`.
pub(crate) fn member(text: &str) -> Result<MemberSpec, String> {
    let (path, budget) = match text.rsplit_once('=') {
        Some((path, budget)) => (path, Some(size(budget)?)),
        None => (text, None),
    };
    match path.is_empty() {
        true => Err("give a directory, or DIR=SIZE, for instance /var/cache/treeboot=20G".into()),
        false => Ok(MemberSpec {
            path: path.into(),
            budget,
        }),
    }
}

/// A plane's name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PlaneName {
    /// Everything in the agent's process: no root, nothing but the binary.
    User,
    /// open-iscsi, device-mapper and LIO: root, kernel modules, disks as block devices.
    Kernel,
}

/// What caches on the kernel plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheKind {
    /// bcache: caches what is read, and goes on without its device where that fails.
    Bcache,
    /// dm-cache: caches what the agent brings in.
    DmCache,
    /// Nothing: each read goes to a parent.
    None,
}

/// A size, or none at all.
fn rate(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { size(text) }
}

/// What a person may choose about the plane.
#[derive(Debug, Clone, clap::Args)]
pub struct PlaneOptions {
    /// How blocks move on this host.
    #[arg(long, env = "TREEBOOT_PLANE", value_enum, default_value_t = PlaneName::User)]
    pub plane: PlaneName,
    /// Kernel plane: let the file of a VM's writes grow by this much whenever less than half of it is left, for instance 1G, instead of
    /// giving it, sparse, all the room that it can come to need.
    #[arg(long, env = "TREEBOOT_DELTA_STEP", value_name = "SIZE", value_parser = size)]
    pub delta_step: Option<u64>,
    /// The most that a VM may write, counted in blocks that it wrote and did not discard, where its disk is given no limit of its own, for
    /// instance 20G. User plane only. [default: none]
    #[arg(long, env = "TREEBOOT_DELTA_LIMIT", value_name = "SIZE", value_parser = size)]
    pub delta_limit: Option<u64>,
    /// Kernel plane: what caches.
    #[arg(long, env = "TREEBOOT_CACHE_KIND", value_enum, default_value_t = CacheKind::Bcache)]
    pub cache_kind: CacheKind,
    /// Kernel plane: cache on this block device or file, which must begin with zeroes; may be given several times. [default: a sparse
    /// file in the cache directory]
    #[arg(
        long = "cache-device",
        env = "TREEBOOT_CACHE_DEVICES",
        value_name = "PATH",
        value_delimiter = ','
    )]
    pub cache_devices: Vec<PathBuf>,
    /// Kernel plane: how large the cache's file may become where no cache device is given.
    #[arg(long, env = "TREEBOOT_CACHE_SIZE", value_name = "SIZE", value_parser = size, default_value = "4G")]
    pub cache_size: u64,
    /// Kernel plane: how fast an attached image is brought into the cache, in bytes per second; 0: only what is read is cached.
    #[arg(long, env = "TREEBOOT_FILL_RATE", value_name = "SIZE", value_parser = rate, default_value = "20M")]
    pub fill_rate: u64,
    /// Kernel plane: how many seconds reads wait while no parent answers before they fail.
    #[arg(long, env = "TREEBOOT_QUEUE_LIMIT", value_name = "SECONDS", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub queue_limit: u64,
}

impl Default for PlaneOptions {
    fn default() -> Self {
        Self {
            plane: PlaneName::User,
            delta_step: None,
            delta_limit: None,
            queue_limit: 60,
            cache_kind: CacheKind::Bcache,
            cache_devices: Vec::new(),
            cache_size: 4 << 30,
            fill_rate: 20 << 20,
        }
    }
}

/// Where the chosen plane puts things and who it is.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    pub(crate) host: HostName,
    pub(crate) state: PathBuf,
    /// The user plane's members of the cache group; the first is where the kernel plane has its files.
    pub(crate) cache: Vec<MemberSpec>,
    pub(crate) store: Option<PathBuf>,
    pub(crate) portal: SocketAddr,
    pub(crate) advertise: Option<String>,
    pub(crate) keys: Arc<Keys>,
}

/// Why no plane starts.
#[derive(Debug, thiserror::Error)]
pub enum PlaneOpenError {
    /// The user plane does not start.
    #[error("the user plane does not start; see --portal, --cache and --state")]
    User(#[from] crate::plane::user::OpenError),
    /// The kernel plane does not start.
    #[cfg(feature = "kernel-plane")]
    #[error("the kernel plane does not start")]
    Kernel(#[from] crate::plane::kernel::OpenError),
    /// The kernel plane has no limits.
    #[error("the kernel plane has no --delta-limit: {0}")]
    NoLimit(&'static str),
    /// Budgets, or several directories.
    #[cfg(feature = "kernel-plane")]
    #[error(
        "the kernel plane has one cache directory without a budget (--cache DIR); its cache is set by --cache-device and --cache-size"
    )]
    KernelCache,
    /// The binary has no kernel plane.
    #[cfg(not(feature = "kernel-plane"))]
    #[error(
        "this treeboot-agent was built without the kernel plane; build it with: cargo build --release -p treeboot-agent --features \
         kernel-plane (on Debian that needs libdevmapper-dev and libclang-dev), or say --plane user"
    )]
    NotBuilt,
}

impl PlaneOptions {
    /// Where VMs' writes go, below the state directory.
    pub(crate) fn deltas(&self, state: &Path) -> PathBuf {
        state.join(match self.plane {
            PlaneName::User => "deltas",
            PlaneName::Kernel => "kernel-deltas",
        })
    }
}

/// Starts the chosen plane.
pub(crate) fn open(options: &PlaneOptions, places: Places) -> Result<Arc<dyn Plane>, PlaneOpenError> {
    if let (PlaneName::Kernel, Some(_), Some(why)) = (
        options.plane,
        options.delta_limit,
        Verb::Limit.refusal(PlaneKind::Kernel),
    ) {
        return Err(PlaneOpenError::NoLimit(why));
    }
    match options.plane {
        PlaneName::User => Ok(Arc::new(UserPlane::open(UserSettings {
            host: places.host,
            state: places.state.clone(),
            deltas: options.deltas(&places.state),
            cache: places.cache,
            store: places.store,
            portals: vec![places.portal],
            advertise: places.advertise,
            keys: places.keys,
        })?)),
        PlaneName::Kernel => kernel(options, places),
    }
}

#[cfg(feature = "kernel-plane")]
fn kernel(options: &PlaneOptions, places: Places) -> Result<Arc<dyn Plane>, PlaneOpenError> {
    use crate::plane::kernel::{CacheSettings, DELTA_CHUNK_BYTES, KernelPlane, KernelSettings};
    use treeboot_dm::group::Kind;
    let kind = match options.cache_kind {
        CacheKind::Bcache => Some(Kind::Bcache),
        CacheKind::DmCache => Some(Kind::DmCache),
        CacheKind::None => None,
    };
    Ok(Arc::new(KernelPlane::open(KernelSettings {
        host: places.host,
        state: places.state.join("kernel"),
        deltas: options.deltas(&places.state),
        cache: match &places.cache[..] {
            [MemberSpec { path, budget: None }] => path.clone(),
            _ => return Err(PlaneOpenError::KernelCache),
        },
        store: places.store,
        portals: vec![places.portal],
        advertise: places.advertise,
        keys: places.keys,
        delta_step: options.delta_step,
        delta_chunk_bytes: DELTA_CHUNK_BYTES,
        queue_limit: std::time::Duration::from_secs(options.queue_limit),
        group: kind.map(|kind| CacheSettings {
            kind,
            devices: options.cache_devices.clone(),
            file_bytes: options.cache_size,
            fill_bytes_per_second: options.fill_rate,
        }),
    })?))
}

#[cfg(not(feature = "kernel-plane"))]
fn kernel(_: &PlaneOptions, _: Places) -> Result<Arc<dyn Plane>, PlaneOpenError> {
    Err(PlaneOpenError::NotBuilt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_a_directory_and_perhaps_a_size() {
        let parsed = |text| member(text).ok().map(|spec| (spec.path, spec.budget));
        assert_eq!(parsed("cache"), Some(("cache".into(), None)));
        assert_eq!(parsed("/a=b/c=20G"), Some(("/a=b/c".into(), Some(20 << 30))));
        for wrong in ["", "=20G", "/a=", "/a=lots"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }

    #[cfg(not(feature = "kernel-plane"))]
    #[test]
    fn a_binary_without_the_kernel_plane_says_how_to_build_one() {
        let options = PlaneOptions {
            plane: PlaneName::Kernel,
            ..PlaneOptions::default()
        };
        let places = Places {
            host: HostName::new("host").unwrap(),
            state: "/nowhere".into(),
            cache: vec![],
            store: None,
            portal: "127.0.0.1:3260".parse().unwrap(),
            advertise: None,
            keys: Arc::new(Keys::none()),
        };
        let error = open(&options, places).err().unwrap().to_string();
        assert!(error.contains("--features kernel-plane"), "{error}");
    }
}
