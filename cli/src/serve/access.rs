//! Who may log in: the options, and the files that hold secrets. A secret is never an argument, because everybody on
//! the machine can read those.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use treeboot_iscsi::login::{Chap, Credentials, MAX_SECRET_BYTES, Secret};
use treeboot_iscsi::target::Access;
use treeboot_types::Iqn;

use crate::failure::{Exit, Failure, chain};

/// The options.
#[derive(Debug, clap::Args)]
pub(super) struct AccessArgs {
    /// Let in only who authenticates by CHAP under this name
    #[arg(long, value_name = "NAME", requires = "chap_secret_file")]
    chap_user: Option<String>,
    /// The file that holds the secret of --chap-user: 12 to 255 bytes, a newline at the end does not count
    #[arg(long, value_name = "FILE", requires = "chap_user")]
    chap_secret_file: Option<PathBuf>,
    /// Prove this target to initiators that ask for it, under this name (mutual CHAP)
    #[arg(
        long,
        value_name = "NAME",
        requires = "mutual_secret_file",
        requires = "chap_user"
    )]
    mutual_user: Option<String>,
    /// The file that holds the secret of --mutual-user, another one than that of --chap-user
    #[arg(long, value_name = "FILE", requires = "mutual_user")]
    mutual_secret_file: Option<PathBuf>,
    /// Let in only initiators of this name; may be given several times
    #[arg(long = "allow-initiator", value_name = "IQN")]
    allow_initiators: Vec<Iqn>,
}

impl AccessArgs {
    /// Reads the secrets.
    pub(super) fn read(&self) -> Result<Access, Failure> {
        let credentials = |user: &Option<String>, file: &Option<PathBuf>| match (user, file) {
            (Some(user), Some(file)) => read_credentials(user, file).map(Some),
            _ => Ok(None),
        };
        let initiator = credentials(&self.chap_user, &self.chap_secret_file)?;
        let target = credentials(&self.mutual_user, &self.mutual_secret_file)?;
        let chap = match (initiator, target) {
            (Some(initiator), Some(target)) => Some(Chap::mutual(initiator, target).map_err(|error| {
                Failure::new(Exit::Usage, chain(&error))
                    .advice("put another secret into the file of --mutual-secret-file")
            })?),
            (initiator, _) => initiator.map(Chap::one_way),
        };
        let names: BTreeSet<Iqn> = self.allow_initiators.iter().cloned().collect();
        Ok(match (chap, names.is_empty()) {
            (None, true) => Access::Anyone,
            (None, false) => Access::Initiators(names),
            (Some(chap), true) => Access::Secret(chap),
            (Some(chap), false) => {
                let each = names.into_iter().map(|name| (name, Some(chap.clone())));
                Access::Each(each.collect::<BTreeMap<_, _>>())
            }
        })
    }

    /// What to say of it once the target is served.
    pub(super) fn announcement(&self) -> String {
        let mut text = String::new();
        if let Some(user) = &self.chap_user {
            text.push_str(&format!("initiators authenticate by CHAP as '{user}'"));
            match &self.mutual_user {
                Some(target) => text.push_str(&format!(", and the target to them as '{target}'\n")),
                None => text.push('\n'),
            }
        }
        if !self.allow_initiators.is_empty() {
            let names: Vec<_> = self.allow_initiators.iter().map(Iqn::as_str).collect();
            text.push_str(&format!("only for {}\n", names.join(", ")));
        }
        text
    }
}

fn read_credentials(user: &str, file: &Path) -> Result<Credentials, Failure> {
    let wrong = |why: &dyn std::error::Error| {
        Failure::new(
            Exit::Usage,
            format!(
                "the secret of '{user}' in '{}' cannot be used: {}",
                file.display(),
                chain(why)
            ),
        )
        .advice("make one with: head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'")
    };
    let secret = read_secret(file)
        .map_err(|error| Failure::io(format!("cannot read the secret in '{}'", file.display()), &error))?;
    let secret = Secret::new(secret).map_err(|error| wrong(&error))?;
    Credentials::new(user, secret).map_err(|error| {
        Failure::new(Exit::Usage, chain(&error)).advice("give a name that the initiators use, too")
    })
}

/// The file's content without the newline at its end; of a file that is too long only enough to see that it is.
fn read_secret(file: &Path) -> std::io::Result<Vec<u8>> {
    let longest = MAX_SECRET_BYTES as u64 + "\r\n".len() as u64 + 1;
    let mut secret = Vec::new();
    std::fs::File::open(file)?
        .take(longest)
        .read_to_end(&mut secret)?;
    if secret.last() == Some(&b'\n') {
        secret.pop();
        if secret.last() == Some(&b'\r') {
            secret.pop();
        }
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        read_secret(file.path()).unwrap()
    }

    #[test]
    fn one_newline_at_the_end_of_a_secret_does_not_count() {
        assert_eq!(read(b"a secret"), b"a secret");
        assert_eq!(read(b"a secret\n"), b"a secret");
        assert_eq!(read(b"a secret\r\n"), b"a secret");
        assert_eq!(read(b" a\nsecret \n\n"), b" a\nsecret \n");
        assert_eq!(read(b""), b"");
        assert_eq!(read(&[b'x'; MAX_SECRET_BYTES]).len(), MAX_SECRET_BYTES);
        assert!(read(&[b'x'; 1 << 20]).len() > MAX_SECRET_BYTES);
    }
}
