//! The disk that tells a guest who it is: a cloud-init NoCloud seed, a VFAT of 256 KiB labelled `CIDATA`.
//!
//! | file | read by | holds |
//! | --- | --- | --- |
//! | `meta-data` | cloud-init, treeboot's guests | `instance-id`, `local-hostname` |
//! | `user-data` | cloud-init | hostname, authorised keys, fresh host keys, machine-id |
//! | `network-config` | cloud-init | DHCP on whatever card there is |
//! | `treeboot` | treeboot's guests | lines `key=value`: `machine-id`, and what a test asks of its guest (`docs/guests.md`) |
//! | `authorized_keys` | treeboot's guests | the keys, one a line |
//!
//! What makes two VMs of one image different: the *machine-id* is the VM's [`Instance`], by cloud-init's `bootcmd`, by our own
//! guests' first step, and by systemd itself, which takes QEMU's `-uuid` where an image comes without a machine-id (as every
//! image for clouds should). The *host keys* are made anew by cloud-init whenever it sees a new instance-id.

use std::fmt::Write as _;
use std::io::{Cursor, Write as _};

use serde::{Deserialize, Serialize};
use treeboot_types::VmName;

use crate::Instance;

/// Bytes of the seed's disk.
const SEED_BYTES: usize = 256 * 1024;
/// Most bytes of all texts of a seed: half the disk, the rest is the file system's.
const MAX_TEXT_BYTES: usize = SEED_BYTES / 2;

/// What a guest learns at its first boot, beside its name and [`Instance`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    /// Public keys in OpenSSH's form, one line each, for the image's default user.
    pub authorized_keys: Vec<String>,
    /// `key=value` for treeboot's own guests.
    pub settings: Vec<(String, String)>,
    /// YAML that is appended to the cloud-init user data; empty for none.
    #[serde(default)]
    pub user_data: String,
}

impl Seed {
    /// Takes a text of one's own in: lines `key=value` are settings for treeboot's own guests, anything else is YAML for cloud-init.
    #[must_use]
    pub fn with_user_data(mut self, text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let settings: Option<Vec<(String, String)>> = lines.map(setting).collect();
        match settings {
            Some(settings) => self.settings.extend(settings),
            None => text.clone_into(&mut self.user_data),
        }
        self
    }
}

fn setting(line: &str) -> Option<(String, String)> {
    let (key, value) = line.split_once('=')?;
    // No key of YAML looks like this: it would be followed by a colon.
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    let is_key = !key.is_empty() && key.chars().all(plain);
    is_key.then(|| (key.to_owned(), value.to_owned()))
}

/// Why a seed cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// Too much in it.
    #[error("the seed of VM {vm} has {bytes} bytes of text; the limit is {MAX_TEXT_BYTES}: give fewer keys")]
    TooLong {
        /// The VM.
        vm: VmName,
        /// What was given.
        bytes: usize,
    },
    /// A text that would become several lines.
    #[error(
        "the seed of VM {vm} holds a key or setting with a line break or another control character: {text:?}"
    )]
    Control {
        /// The VM.
        vm: VmName,
        /// The text.
        text: String,
    },
    /// The file system could not be made.
    #[error("cannot make the seed of VM {vm}")]
    Io {
        /// The VM.
        vm: VmName,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Seed {
    /// The disk's bytes.
    ///
    /// # Errors
    /// [`SeedError`]: too long, or a line break where none can be.
    pub fn image(&self, name: &VmName, instance: Instance) -> Result<Vec<u8>, SeedError> {
        self.check(name)?;
        let files = self.files(name, instance);
        let bytes = files.iter().map(|(_, text)| text.len()).sum();
        if bytes > MAX_TEXT_BYTES {
            return Err(SeedError::TooLong {
                vm: name.clone(),
                bytes,
            });
        }
        format(&files, instance).map_err(|source| SeedError::Io {
            vm: name.clone(),
            source,
        })
    }

    fn check(&self, name: &VmName) -> Result<(), SeedError> {
        let settings = self.settings.iter().flat_map(|(key, value)| [key, value]);
        for text in self.authorized_keys.iter().chain(settings) {
            if text.chars().any(char::is_control) {
                return Err(SeedError::Control {
                    vm: name.clone(),
                    text: text.clone(),
                });
            }
        }
        let lines = self.user_data.lines();
        if let Some(line) = lines
            .into_iter()
            .find(|line| line.chars().any(|c| c.is_control() && c != '\t'))
        {
            return Err(SeedError::Control {
                vm: name.clone(),
                text: line.to_owned(),
            });
        }
        Ok(())
    }

    fn files(&self, name: &VmName, instance: Instance) -> [(&'static str, String); 5] {
        let machine_id = instance.machine_id();
        let meta_data = format!("instance-id: {instance}\nlocal-hostname: {name}\n");
        let mut user_data = format!(
            "#cloud-config\n\
             hostname: {name}\n\
             preserve_hostname: false\n\
             ssh_deletekeys: true\n\
             bootcmd:\n\
             - [cloud-init-per, instance, treeboot-machine-id, sh, -c, \"echo {machine_id} > /etc/machine-id\"]\n"
        );
        let mut keys = String::new();
        if !self.authorized_keys.is_empty() {
            user_data.push_str("ssh_authorized_keys:\n");
        }
        for key in &self.authorized_keys {
            // A JSON string is a YAML string, whatever is in it. Writing to a String cannot fail.
            let _ = writeln!(user_data, "- {}", serde_json::Value::from(key.as_str()));
            let _ = writeln!(keys, "{key}");
        }
        if !self.user_data.is_empty() {
            let _ = writeln!(user_data, "{}", self.user_data.trim_end());
        }
        let network = "version: 2\nethernets:\n  any:\n    match: {name: \"e*\"}\n    dhcp4: true\n    optional: true\n".to_owned();
        let mut treeboot = format!("hostname={name}\nmachine-id={machine_id}\ninstance-id={instance}\n");
        for (key, value) in &self.settings {
            let _ = writeln!(treeboot, "{key}={value}");
        }
        [
            ("meta-data", meta_data),
            ("user-data", user_data),
            ("network-config", network),
            ("treeboot", treeboot),
            ("authorized_keys", keys),
        ]
    }
}

fn format(files: &[(&str, String)], instance: Instance) -> std::io::Result<Vec<u8>> {
    let [a, b, c, d, ..] = instance.0;
    let mut disk = Cursor::new(vec![0; SEED_BYTES]);
    let options = fatfs::FormatVolumeOptions::new()
        .volume_label(*b"CIDATA     ")
        .volume_id(u32::from_be_bytes([a, b, c, d]));
    fatfs::format_volume(&mut disk, options)?;
    let fs = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
    for (name, text) in files {
        let mut file = fs.root_dir().create_file(name)?;
        file.write_all(text.as_bytes())?;
        file.flush()?;
    }
    fs.unmount()?;
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn name() -> VmName {
        VmName::new("vm-1").expect("valid")
    }

    fn read(image: Vec<u8>, file: &str) -> String {
        let fs = fatfs::FileSystem::new(Cursor::new(image), fatfs::FsOptions::new()).expect("a file system");
        assert_eq!(fs.volume_label(), "CIDATA");
        assert_eq!(
            fs.read_volume_label_from_root_dir().expect("reads").as_deref(),
            Some("CIDATA")
        );
        let mut text = String::new();
        fs.root_dir()
            .open_file(file)
            .expect("is there")
            .read_to_string(&mut text)
            .expect("reads");
        text
    }

    #[test]
    fn a_seed_says_who_the_guest_is() {
        let seed = Seed {
            authorized_keys: vec!["ssh-ed25519 AAAA \"me\": #1".into()],
            settings: vec![("read_mb".into(), "5".into())],
            ..Seed::default()
        };
        let image = seed.image(&name(), Instance([0x1a; 16])).expect("makes");
        let id = "1a1a1a1a-1a1a-1a1a-1a1a-1a1a1a1a1a1a";
        assert_eq!(
            read(image.clone(), "meta-data"),
            format!("instance-id: {id}\nlocal-hostname: vm-1\n")
        );
        let user_data = read(image.clone(), "user-data");
        assert!(user_data.starts_with("#cloud-config\n"), "{user_data}");
        assert!(
            user_data.contains(r#"- "ssh-ed25519 AAAA \"me\": #1""#),
            "{user_data}"
        );
        assert!(read(image.clone(), "treeboot").ends_with("\nread_mb=5\n"));
        assert_eq!(read(image, "authorized_keys"), "ssh-ed25519 AAAA \"me\": #1\n");
    }

    #[test]
    fn a_seed_is_refused_that_would_say_something_else() {
        let line_break = Seed {
            settings: vec![("a".into(), "1\nhostname=root".into())],
            ..Seed::default()
        };
        assert!(matches!(
            line_break.image(&name(), Instance([1; 16])),
            Err(SeedError::Control { .. })
        ));
        let long = Seed {
            authorized_keys: vec!["k".repeat(MAX_TEXT_BYTES)],
            ..Seed::default()
        };
        assert!(matches!(
            long.image(&name(), Instance([1; 16])),
            Err(SeedError::TooLong { .. })
        ));
    }

    #[test]
    fn a_text_of_ones_own_is_settings_where_every_line_is_one_and_yaml_otherwise() {
        let settings = Seed::default().with_user_data("write_mb=4\nsay=a=b\n");
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(settings.settings, [pair("write_mb", "4"), pair("say", "a=b")]);
        assert!(settings.user_data.is_empty());

        let yaml = Seed::default().with_user_data("packages:\n- fio\nruncmd:\n- A=1 true\n");
        assert!(yaml.settings.is_empty());
        let name = VmName::new("vm-1").expect("valid");
        let image = yaml.image(&name, Instance([1; 16])).expect("fits");
        let user_data = read(image, "user-data");
        assert!(user_data.starts_with("#cloud-config\n"), "{user_data}");
        assert!(
            user_data.ends_with("packages:\n- fio\nruncmd:\n- A=1 true\n"),
            "{user_data}"
        );
    }
}
