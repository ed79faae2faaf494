//! What a host lacks, said with what to type.

use std::path::PathBuf;

/// Something that the kernel plane needs and this host lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// A kernel module.
    #[error(
        "the kernel module '{module}' is missing; type: modprobe {module} (it comes with the kernel's package: Debian linux-image-amd64, \
         Ubuntu linux-modules-extra-$(uname -r))"
    )]
    Module {
        /// Its name.
        module: &'static str,
    },
    /// The right to talk to the kernel.
    #[error("no right to open {}: run as root (type: sudo -i), with CAP_SYS_ADMIN", path.display())]
    Root {
        /// What could not be opened.
        path: PathBuf,
    },
}
