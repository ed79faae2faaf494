//! Tokens: the ones by which a host joins once, and the ones by which a program acts for a person.
//!
//! A join token is a file in the authority's folder, so it can be made while the coordinator runs. Its text holds the authority's
//! fingerprint, so that the host knows its coordinator at the first connection. A bearer token is a text that the authority
//! signed; nobody keeps it.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use treeboot_types::HostName;

use crate::authority::{Authority, AuthorityError, Fingerprint};
use crate::who::{Person, Role, Who};
use crate::{der, files, hex, sha256, unix_now};

/// What a join token begins with; the number is its format's.
const JOIN: &str = "treeboot-join-1";
/// What a bearer token begins with.
const BEARER: &str = "treeboot-bearer-1";
/// Longest text that is looked at.
const MAX_TOKEN_BYTES: usize = 1024;
/// A token that is over is kept so long, so that who uses it is told what is wrong with it.
const KEPT: Duration = Duration::from_secs(30 * 86_400);

/// Why a token is refused.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Not a token.
    #[error("this is no join token; make one with 'treeboot-coordinator token create'")]
    Shape,
    /// Another coordinator's.
    #[error("the join token is for another cluster: its authority is {token}, this one's is {here}")]
    OtherAuthority {
        /// In the token.
        token: Fingerprint,
        /// Ours.
        here: Fingerprint,
    },
    /// Never made, or long over, or the secret is wrong.
    #[error("the join token is not known here; make one with 'treeboot-coordinator token create'")]
    Unknown,
    /// Too late.
    #[error("the join token expired {ago_seconds} s ago; make one with 'treeboot-coordinator token create'")]
    Expired {
        /// Since when.
        ago_seconds: u64,
    },
    /// As often as it was meant to be.
    #[error("the join token was used already, by {by}; make one with 'treeboot-coordinator token create'")]
    Used {
        /// By whom.
        by: String,
    },
    /// Made for another.
    #[error("the join token is for host '{meant}', not for '{asks}'")]
    OtherHost {
        /// For whom.
        meant: HostName,
        /// Who asks.
        asks: HostName,
    },
    /// The name has a certificate.
    #[error(
        "host '{host}' has joined already; to let it join anew, make a token for it alone: treeboot-coordinator token create --host {host}"
    )]
    NameTaken {
        /// Which.
        host: HostName,
    },
    /// Files.
    #[error("cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

impl TokenError {
    /// Whether whoever asks is to blame, and not the files here.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::File { .. } => false,
            Self::Authority(error) => matches!(error, AuthorityError::Request(_)),
            _ => true,
        }
    }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> TokenError {
    let path = path.to_owned();
    move |source| TokenError::File { path, source }
}

/// A join token, as a host is given it.
#[derive(Clone)]
pub struct JoinToken {
    id: String,
    secret: String,
    /// Of the authority that made it.
    pub fingerprint: Fingerprint,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({})", self.id)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{JOIN}.{}.{}.{}", self.id, self.secret, self.fingerprint)
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::Shape);
        }
        let parts: Vec<&str> = text.split('.').collect();
        let [JOIN, id, secret, fingerprint] = parts[..] else {
            return Err(TokenError::Shape);
        };
        let digits =
            |text: &str, count: usize| text.len() == count && text.bytes().all(|b| b.is_ascii_hexdigit());
        // The id becomes a file's name.
        if !digits(id, 16) || !digits(secret, 32) {
            return Err(TokenError::Shape);
        }
        Ok(Self {
            id: id.to_ascii_lowercase(),
            secret: secret.into(),
            fingerprint: fingerprint.parse().map_err(|()| TokenError::Shape)?,
        })
    }
}

/// What is kept of a token: not the secret.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    secret_sha256: String,
    host: Option<HostName>,
    until_unix: u64,
    uses_left: u32,
    /// Who used it: host, and SHA-256 of the request, so that a request whose answer was lost is answered again.
    used: Vec<(HostName, String)>,
}

/// What a host that has a certificate leaves.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    until_unix: u64,
}

/// The tokens and the hosts that joined, beside an authority.
#[derive(Debug)]
pub struct Gatebook<'a> {
    authority: &'a Authority,
}

impl<'a> Gatebook<'a> {
    /// Of `authority`.
    #[must_use]
    pub fn new(authority: &'a Authority) -> Self {
        Self { authority }
    }

    fn token_path(&self, id: &str) -> PathBuf {
        self.authority.dir().join("tokens").join(format!("{id}.json"))
    }

    fn host_path(&self, host: &HostName) -> PathBuf {
        self.authority.dir().join("hosts").join(format!("{host}.json"))
    }

    /// Makes a token for `uses` hosts, or for `host` alone, that is good for `life`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(&self, host: Option<HostName>, uses: u32, life: Duration) -> Result<JoinToken, TokenError> {
        let token = JoinToken {
            id: hex(&rand::random::<[u8; 8]>()),
            secret: hex(&rand::random::<[u8; 16]>()),
            fingerprint: self.authority.fingerprint(),
        };
        let kept = Kept {
            secret_sha256: hex(&sha256(token.secret.as_bytes())),
            host,
            until_unix: unix_now().saturating_add(life.as_secs()),
            uses_left: uses,
            used: Vec::new(),
        };
        self.sweep();
        write(&self.token_path(&token.id), &kept)?;
        Ok(token)
    }

    /// Lets `host` join by a token: its use is counted before the certificate is made.
    /// Whoever calls sees to it that no two calls run at once.
    ///
    /// # Errors
    /// [`TokenError`] says what is wrong with the token, for its holder to read.
    pub fn enroll(
        &self,
        token: &JoinToken,
        host: &HostName,
        request: &[u8],
        life: Duration,
    ) -> Result<Vec<u8>, TokenError> {
        let here = self.authority.fingerprint();
        if token.fingerprint != here {
            return Err(TokenError::OtherAuthority {
                token: token.fingerprint,
                here,
            });
        }
        let path = self.token_path(&token.id);
        let mut kept: Kept = read(&path)?.ok_or(TokenError::Unknown)?;
        // Hashes of a secret of 128 random bits: how long a comparison takes says nothing about it.
        if kept.secret_sha256 != hex(&sha256(token.secret.as_bytes())) {
            return Err(TokenError::Unknown);
        }
        let use_ = (host.clone(), hex(&sha256(request)));
        let again = kept.used.contains(&use_);
        let now = unix_now();
        if now >= kept.until_unix {
            return Err(TokenError::Expired {
                ago_seconds: now - kept.until_unix,
            });
        }
        if let Some(meant) = &kept.host
            && meant != host
        {
            return Err(TokenError::OtherHost {
                meant: meant.clone(),
                asks: host.clone(),
            });
        }
        if !again {
            if kept.uses_left == 0 {
                let by: Vec<String> = kept.used.iter().map(|(host, _)| format!("'{host}'")).collect();
                return Err(TokenError::Used { by: by.join(", ") });
            }
            // A token for anybody makes no second owner of a name.
            if kept.host.is_none() && read::<Known>(&self.host_path(host))?.is_some() {
                return Err(TokenError::NameTaken { host: host.clone() });
            }
            kept.uses_left -= 1;
            kept.used.push(use_);
            write(&path, &kept)?;
        }
        self.certify(host, request, life)
    }

    /// Gives a host that proved its name its next certificate.
    ///
    /// # Errors
    /// The request is not valid, or it cannot be recorded.
    pub fn certify(&self, host: &HostName, request: &[u8], life: Duration) -> Result<Vec<u8>, TokenError> {
        let certificate = self.authority.certify(request, &Who::Host(host.clone()), life)?;
        let known = Known {
            until_unix: unix_now().saturating_add(life.as_secs()),
        };
        write(&self.host_path(host), &known)?;
        Ok(certificate)
    }

    /// Removes what nobody will ask for any more.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(self.authority.dir().join("tokens")) else {
            return;
        };
        for entry in entries.flatten() {
            let over = read::<Kept>(&entry.path())
                .ok()
                .flatten()
                .is_some_and(|kept| kept.until_unix.saturating_add(KEPT.as_secs()) < unix_now());
            if over {
                // It is tried again with the next token.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, TokenError> {
    let Some(text) = files::read_if_there(path).map_err(file_error(path))? else {
        return Ok(None);
    };
    let value = serde_json::from_slice(&text).map_err(|error| file_error(path)(error.into()))?;
    Ok(Some(value))
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), TokenError> {
    let text = serde_json::to_vec(value).map_err(|error| file_error(path)(error.into()))?;
    let dir = path.parent().unwrap_or_else(|| Path::new("."));
    files::private_dir(dir)
        .and_then(|()| files::write_private(path, &text))
        .map_err(file_error(path))
}

/// What a bearer token says.
#[derive(Debug, Serialize, Deserialize)]
struct Claim {
    name: String,
    role: String,
    until_unix: u64,
}

fn signed_text(body: &str) -> String {
    format!("{BEARER}.{body}")
}

/// Makes a bearer token for a person.
///
/// # Errors
/// The signature failed.
pub fn bearer(
    authority: &Authority,
    name: &Person,
    role: Role,
    life: Duration,
) -> Result<String, AuthorityError> {
    let claim = serde_json::json!({
        "name": name.as_str(),
        "role": role.as_str(),
        "until_unix": unix_now().saturating_add(life.as_secs()),
    });
    let text = signed_text(&BASE64.encode(claim.to_string()));
    let signature = authority.sign(text.as_bytes())?;
    Ok(format!("{text}.{}", BASE64.encode(signature)))
}

/// Who shows a bearer token, by the authority's certificate alone.
///
/// # Errors
/// Why it is refused, for its holder to read.
pub fn who_bears(token: &str, authority: &CertificateDer<'_>) -> Result<Who, String> {
    const MAKE: &str = "make one with 'treeboot-coordinator user create NAME --role ROLE --bearer'";
    let wrong = || format!("the bearer token is not one of this cluster's; {MAKE}");
    let (text, signature) = token
        .get(..MAX_TOKEN_BYTES.min(token.len()))
        .and_then(|token| token.rsplit_once('.'))
        .ok_or_else(wrong)?;
    let body = text
        .strip_prefix(BEARER)
        .and_then(|rest| rest.strip_prefix('.'))
        .ok_or_else(wrong)?;
    let signature = BASE64.decode(signature).map_err(|_| wrong())?;
    let key = der::certificate(authority).ok_or_else(wrong)?.key;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
        .verify(text.as_bytes(), &signature)
        .map_err(|_| wrong())?;
    let claim: Claim = BASE64
        .decode(body)
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok())
        .ok_or_else(wrong)?;
    if unix_now() >= claim.until_unix {
        return Err(format!("the bearer token has expired; {MAKE}"));
    }
    Ok(Who::Person {
        name: Person::new(&claim.name).map_err(|_| wrong())?,
        role: claim.role.parse().map_err(|_| wrong())?,
    })
}
