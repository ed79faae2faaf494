//! What the kernel plane needs of its host, looked for before anything is begun, and named with what to type.

use std::path::Path;
use std::process::{Command, Stdio};

use treeboot_dm::group::Kind;
use treeboot_dm::{Mapper, MapperError};
use treeboot_iscsi::lio::{Lio, LioError};
use treeboot_iscsi::open_iscsi::OpenIscsiError;

/// A kernel module that the plane uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Its name for `modprobe`.
    pub module: &'static str,
    /// What it is for.
    pub purpose: &'static str,
}

const fn need(module: &'static str, purpose: &'static str) -> Need {
    Need { module, purpose }
}

/// Everything but what a cache needs.
const MODULES: [Need; 11] = [
    need("dm_mod", "device-mapper"),
    need("dm_multipath", "paths to parents"),
    need("dm_round_robin", "paths by turns"),
    need("dm_verity", "checking what parents send"),
    need("dm_snapshot", "VMs' disks"),
    need("loop", "hash trees and deltas in files"),
    need("iscsi_tcp", "sessions with parents"),
    need("target_core_mod", "exports (LIO)"),
    need("target_core_iblock", "exports of block devices"),
    need("target_core_file", "exports of hash trees"),
    need("iscsi_target_mod", "exports over iSCSI"),
];

/// Sends each stripe's reads to that stripe's parents.
const SWITCH: &str = "dm_switch";

/// Modules without which only some images cannot be attached; they are tried, and their absence is logged.
const SOMETIMES: [Need; 3] = [
    need(
        SWITCH,
        "reading stripes apart; without it this host has one parent for all",
    ),
    need("dm_service_time", "the path policy service-time"),
    need("dm_queue_length", "the path policy queue-length"),
];

/// Kind bcache.
const BCACHE: [Need; 1] = [need("bcache", "the cache; or say --cache-kind dm-cache or none")];

/// Kind dm-cache.
const DM_CACHE: [Need; 3] = [
    need("dm_cache", "the cache; or say --cache-kind none"),
    need("dm_cache_smq", "what the cache keeps"),
    need("dm_flakey", "filling the cache"),
];

/// What the host lacks.
#[derive(Debug, thiserror::Error)]
pub enum NeedError {
    /// Not root.
    #[error(
        "the kernel plane needs root (it makes block devices and LIO targets); run the agent with sudo, or say --plane user"
    )]
    Root,
    /// A module.
    #[error(
        "the kernel module '{module}' ({purpose}) is not there and cannot be loaded; type: modprobe {module}. On Debian it comes with \
         linux-image-amd64 (not with the cloud kernel), on Ubuntu with linux-modules-extra-$(uname -r)", module = .0.module, purpose = .0.purpose
    )]
    Module(Need),
    /// open-iscsi.
    #[error("open-iscsi cannot be used; type: apt-get install open-iscsi && systemctl start iscsid")]
    OpenIscsi(#[from] OpenIscsiError),
    /// LIO.
    #[error("LIO cannot be used")]
    Lio(#[from] LioError),
    /// device-mapper.
    #[error("device-mapper cannot be used")]
    Mapper(#[from] MapperError),
}

/// Loads the modules that are missing and opens what the plane works with.
///
/// # Errors
/// [`NeedError`] names the first thing that is missing.
pub(super) fn meet(cache: Option<Kind>) -> Result<(Mapper, Lio), NeedError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(NeedError::Root);
    }
    let caching: &[Need] = match cache {
        None => &[],
        Some(Kind::Bcache) => &BCACHE,
        Some(Kind::DmCache) => &DM_CACHE,
    };
    for &need in MODULES.iter().chain(caching) {
        if !load(need.module) {
            return Err(NeedError::Module(need));
        }
    }
    for need in SOMETIMES {
        if !load(need.module) {
            tracing::warn!(
                module = need.module,
                purpose = need.purpose,
                "a kernel module is missing"
            );
        }
    }
    let mapper = Mapper::new()?;
    let lio = Lio::default();
    lio.check()?;
    Ok((mapper, lio))
}

/// Whether this host can read an image's stripes apart.
pub(super) fn splits_stripes() -> bool {
    load(SWITCH)
}

/// Whether a module is there, loaded now if it was not. One that is built in has a folder in sysfs only if it has parameters, so what
/// `modprobe` says counts.
pub(super) fn load(module: &str) -> bool {
    let loaded = Path::new("/sys/module").join(module).exists();
    loaded
        || Command::new("modprobe")
            .args(["--quiet", "--", module])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}
