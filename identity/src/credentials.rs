//! A party's certificate and key, and the authority's certificate, in one file of PEM blocks: it is renewed at once or not at all.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use parking_lot::RwLock;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::files;
use crate::who::{Certified, NotOurs};

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file.
    #[error("cannot use the identity file {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It holds something else.
    #[error("{place} holds no certificate, authority and key as treeboot writes them: {why}")]
    Content {
        /// The file, or what else they came from.
        place: String,
        /// What is missing or wrong.
        why: String,
    },
    /// The certificate names nobody of ours.
    #[error(transparent)]
    Who(#[from] NotOurs),
    /// A key could not be made or used.
    #[error("the cryptography failed: {0}")]
    Crypto(String),
}

impl From<rcgen::Error> for CredentialsError {
    fn from(error: rcgen::Error) -> Self {
        Self::Crypto(error.to_string())
    }
}

/// A key that has no certificate yet.
pub struct NewKey {
    key: KeyPair,
}

impl NewKey {
    /// ECDSA over P-256.
    ///
    /// # Errors
    /// The operating system gives no random numbers.
    pub fn generate() -> Result<Self, CredentialsError> {
        Ok(Self {
            key: KeyPair::generate()?,
        })
    }

    /// The request for a certificate (PKCS #10, DER): it proves that whoever asks has the key, and claims nothing else.
    ///
    /// # Errors
    /// The signature failed.
    pub fn request(&self) -> Result<Vec<u8>, CredentialsError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        Ok(params.serialize_request(&self.key)?.der().to_vec())
    }

    /// Puts the key together with what the authority made of the request.
    ///
    /// # Errors
    /// They do not belong together.
    pub fn with(self, certificate: Vec<u8>, authority: Vec<u8>) -> Result<Credentials, CredentialsError> {
        let key = PrivateKeyDer::Pkcs8(self.key.serialize_der().into());
        Credentials::new(
            certificate.into(),
            authority.into(),
            key,
            "the coordinator's answer",
        )
    }
}

/// Who we are, and how we show it.
pub struct Credentials {
    certified: Certified,
    certificate: CertificateDer<'static>,
    authority: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    pub(crate) signer: Arc<CertifiedKey>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the key.
        f.debug_struct("Credentials")
            .field("certified", &self.certified)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    pub(crate) fn new(
        certificate: CertificateDer<'static>,
        authority: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
        place: &str,
    ) -> Result<Self, CredentialsError> {
        let content = |why: String| CredentialsError::Content {
            place: place.to_owned(),
            why,
        };
        let certified = Certified::of(&certificate)?;
        let signing = rustls::crypto::ring::sign::any_ecdsa_type(&key).map_err(|e| content(e.to_string()))?;
        // The authority goes along, so that a host which knows only its fingerprint can check the rest.
        let signer = CertifiedKey::new(vec![certificate.clone(), authority.clone()], signing);
        signer.keys_match().map_err(|e| content(e.to_string()))?;
        Ok(Self {
            certified,
            certificate,
            authority,
            key,
            signer: Arc::new(signer),
        })
    }

    /// What the certificate says.
    #[must_use]
    pub fn certified(&self) -> &Certified {
        &self.certified
    }

    /// The authority's certificate.
    #[must_use]
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    /// Reads `text`, which came from `place`: a certificate, its authority's, and the key.
    ///
    /// # Errors
    /// Something of it is missing, or does not fit the rest.
    pub fn from_pem(text: &[u8], place: &str) -> Result<Self, CredentialsError> {
        let content = |why: String| CredentialsError::Content {
            place: place.to_owned(),
            why,
        };
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
        let certificates = certificates.map_err(|error| content(error.to_string()))?;
        let [certificate, authority] = <[_; 2]>::try_from(certificates)
            .map_err(|found| content(format!("{} certificates instead of 2", found.len())))?;
        let key = PrivateKeyDer::from_pem_slice(text).map_err(|error| content(error.to_string()))?;
        Self::new(certificate, authority, key, place)
    }

    /// The file's text. It holds the key.
    #[must_use]
    pub fn to_pem(&self) -> String {
        [
            pem("CERTIFICATE", &self.certificate),
            pem("CERTIFICATE", &self.authority),
            pem("PRIVATE KEY", self.key.secret_der()),
        ]
        .concat()
    }

    /// Reads a file; `None` where there is none.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn load(path: &Path) -> Result<Option<Self>, CredentialsError> {
        let file = |source| CredentialsError::File {
            path: path.to_owned(),
            source,
        };
        let bytes = files::read_if_there(path).map_err(file)?;
        bytes
            .map(|bytes| Self::from_pem(&bytes, &path.display().to_string()))
            .transpose()
    }

    /// Writes the file for its owner only, whole or not at all.
    ///
    /// # Errors
    /// [`CredentialsError::File`].
    pub fn save(&self, path: &Path) -> Result<(), CredentialsError> {
        let dir = path.parent().unwrap_or_else(|| Path::new("."));
        files::private_dir(dir)
            .and_then(|()| files::write_private(path, self.to_pem().as_bytes()))
            .map_err(|source| CredentialsError::File {
                path: path.to_owned(),
                source,
            })
    }
}

pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let mut text = format!("-----BEGIN {label}-----\n");
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

/// The credentials in force. Clones share them; new connections take what was put in last.
#[derive(Debug, Clone)]
pub struct Holder {
    current: Arc<RwLock<Arc<Credentials>>>,
}

impl Holder {
    /// Holds `credentials`.
    #[must_use]
    pub fn new(credentials: Credentials) -> Self {
        Self {
            current: Arc::new(RwLock::new(Arc::new(credentials))),
        }
    }

    /// What is in force.
    #[must_use]
    pub fn current(&self) -> Arc<Credentials> {
        Arc::clone(&self.current.read())
    }

    /// Puts new ones in their place.
    pub fn replace(&self, credentials: impl Into<Arc<Credentials>>) {
        *self.current.write() = credentials.into();
    }
}
