//! What a VM is made of and how it is seen to be ready, as options of `vm start` and `fleet boot`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use treeboot_proto::v1;

use crate::failure::{Exit, Failure};
use crate::output::parse_duration;

/// What Debian's getty writes on a console when a machine is up, and most other distributions' too.
const DEFAULT_READY_LINE: &str = "login:";

/// The longest file of keys: a message of gRPC must hold it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The VM's machine.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct MachineArgs {
    /// Memory: 512 or 512M (MiB), 2G; the agent's default where it is left out
    #[arg(long, value_parser = parse_memory, value_name = "SIZE")]
    memory: Option<u32>,
    /// Virtual processors
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=255), value_name = "N")]
    cpus: u32,
    /// A file of public keys that may log in (cloud-init)
    #[arg(long, value_name = "FILE")]
    ssh_keys: Option<PathBuf>,
}

/// How it is seen from outside that a VM is up.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ReadyArgs {
    /// Ready when this text appears on the serial console [default: login:]
    #[arg(long, value_name = "TEXT", conflicts_with = "ready_port")]
    ready_line: Option<String>,
    /// Ready when this TCP port of the guest accepts a connection
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    ready_port: Option<u16>,
    /// How long being ready may take
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    ready_timeout: Duration,
}

impl ReadyArgs {
    /// The readiness to ask an agent for.
    pub(crate) fn message(&self) -> v1::Readiness {
        use v1::readiness::When;
        let when = match (self.ready_port, &self.ready_line) {
            (Some(port), _) => When::GuestPort(port.into()),
            (None, Some(line)) => When::ConsoleLine(line.clone()),
            (None, None) => When::ConsoleLine(DEFAULT_READY_LINE.into()),
        };
        let deadline_ms = u64::try_from(self.ready_timeout.as_millis()).unwrap_or(u64::MAX);
        v1::Readiness {
            when: Some(when),
            deadline_ms,
        }
    }

    /// How long being ready may take.
    pub(crate) fn limit(&self) -> Duration {
        self.ready_timeout
    }
}

/// A machine whose files were read.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    memory_mib: u32,
    cpus: u32,
    ssh_authorized_keys: Vec<String>,
}

impl MachineArgs {
    /// Reads the files, before anything is sent.
    ///
    /// # Errors
    /// A file is not there, too long or not text.
    pub(crate) fn read(&self) -> Result<Machine, Failure> {
        let keys = self
            .ssh_keys
            .as_deref()
            .map(read_text)
            .transpose()?
            .unwrap_or_default();
        let keys = keys
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        Ok(Machine {
            memory_mib: self.memory.unwrap_or(0),
            cpus: self.cpus,
            ssh_authorized_keys: keys.map(str::to_owned).collect(),
        })
    }
}

impl Machine {
    /// The request that starts a VM of this kind.
    pub(crate) fn request(
        &self,
        vm: &str,
        image: Option<v1::ImageId>,
        ready: v1::Readiness,
    ) -> v1::StartVmRequest {
        v1::StartVmRequest {
            vm: vm.to_owned(),
            image,
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            ready: Some(ready),
            ssh_authorized_keys: self.ssh_authorized_keys.clone(),
            user_data: String::new(),
        }
    }
}

fn read_text(path: &Path) -> Result<String, Failure> {
    let what = format!("cannot read '{}'", path.display());
    let length = std::fs::metadata(path)
        .map_err(|error| Failure::io(&what, &error))?
        .len();
    if length > MAX_FILE_BYTES {
        return Err(Failure::new(
            Exit::Usage,
            format!("{what}: it has {length} bytes; the limit is {MAX_FILE_BYTES}"),
        ));
    }
    std::fs::read_to_string(path).map_err(|error| Failure::io(&what, &error))
}

/// Reads a size of a disk's writes into bytes.
///
/// # Errors
/// What is wrong and how to write it.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size; write for instance 512M, 20G, 1T or none");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let mib = match unit {
        "M" | "MiB" => Some(number),
        "G" | "GiB" => number.checked_mul(1 << 10),
        "T" | "TiB" => number.checked_mul(1 << 20),
        _ => None,
    };
    // A disk of an EiB is none.
    mib.filter(|mib| (1..=1 << 40).contains(mib))
        .map(|mib| mib << 20)
        .ok_or_else(wrong)
}

/// Reads a size of memory into MiB.
fn parse_memory(text: &str) -> Result<u32, String> {
    let wrong = || format!("'{text}' is not a size of memory; write for instance 512M or 2G");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u32 = number.parse().map_err(|_| wrong())?;
    let mib = match unit {
        "" | "M" | "MiB" => Some(number),
        "G" | "GiB" => number.checked_mul(1024),
        _ => None,
    };
    // 16 MiB is less than any guest boots in; 16 TiB more than any host has.
    mib.filter(|mib| (16..=16 << 20).contains(mib)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_has_a_unit() {
        for (text, bytes) in [("1M", 1 << 20), ("20G", 20 << 30), ("2TiB", 2 << 40)] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for bad in ["", "20", "0M", "-1G", "1.5G", "20 G", "18446744073709551615T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_in_mib_unless_it_says_otherwise() {
        for (text, mib) in [("512", 512), ("512M", 512), ("2G", 2048), ("2GiB", 2048)] {
            assert_eq!(parse_memory(text), Ok(mib));
        }
        for bad in ["", "M", "-1", "1", "512 M", "1.5G", "4294967295G", "512K"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }
}
