//! The cluster's certificate authority, kept in the coordinator's state directory.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, SigningKey as _,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::credentials::{NewKey, pem};
use crate::who::Who;
use crate::{Credentials, CredentialsError, der, files, hex, sha256, unix_now};

/// How long an authority holds: longer than its machines. A new one means that everybody joins anew.
const LIFE: Duration = Duration::from_secs(20 * 365 * 86_400);
/// A certificate holds from a little before it was made, because clocks differ.
const BACKDATED: Duration = Duration::from_secs(300);
/// Largest request for a certificate; one of ours has some 200 bytes.
const MAX_REQUEST_BYTES: usize = 4096;
/// Most names of the coordinator.
const MAX_NAMES: usize = 64;

/// SHA-256 of an authority's certificate: whoever has it knows the authority when they see it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// A certificate's.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha256(certificate))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return Err(());
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            let digits = text.get(index * 2..index * 2 + 2).ok_or(())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| ())?;
        }
        Ok(Self(bytes))
    }
}

/// Why the authority cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// There is one.
    #[error("{} holds an authority already; to begin anew, move that folder away: every host and person must then join again", dir.display())]
    Exists {
        /// Where.
        dir: PathBuf,
    },
    /// A file of it.
    #[error("cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{} is damaged ({why}); restore it from a backup", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        why: String,
    },
    /// A name of the coordinator that is no DNS name and no address.
    #[error("'{0}' is neither a DNS name nor an IP address")]
    Name(String),
    /// The request for a certificate.
    #[error("the request for a certificate is not valid: {0}")]
    Request(String),
    /// Keys and signatures.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}

impl From<rcgen::Error> for AuthorityError {
    fn from(error: rcgen::Error) -> Self {
        CredentialsError::from(error).into()
    }
}

/// The authority, with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    names: Vec<String>,
    dir: PathBuf,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

/// Where a coordinator with this state directory keeps its authority.
#[must_use]
pub fn dir(state: &Path) -> PathBuf {
    state.join("identity")
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::File { path, source }
}

impl Authority {
    /// Makes an authority in `dir`. `names` are those by which foreign programs reach the coordinator; ours need none.
    ///
    /// # Errors
    /// There is one already, or it cannot be written.
    pub fn create(dir: &Path, names: &[String]) -> Result<Self, AuthorityError> {
        let path = dir.join("authority.pem");
        if files::read_if_there(&path).map_err(file_error(&path))?.is_some() {
            return Err(AuthorityError::Exists { dir: dir.to_owned() });
        }
        check_names(names)?;
        files::private_dir(dir).map_err(file_error(dir))?;
        let key = KeyPair::generate()?;
        let mut params = authority_params(&format!("treeboot {:08x}", rand::random::<u32>()));
        let now = unix_now();
        (params.not_before, params.not_after) =
            (moment(now - BACKDATED.as_secs()), moment(now + LIFE.as_secs()));
        let certificate = params.self_signed(&key)?;
        let names_path = dir.join("names");
        files::write_private(&names_path, names.join("\n").as_bytes()).map_err(file_error(&names_path))?;
        // Certificate and key in one file, the last: it is there whole, or there is no authority.
        let text = pem("CERTIFICATE", certificate.der()) + &pem("PRIVATE KEY", &key.serialize_der());
        files::write_private(&path, text.as_bytes()).map_err(file_error(&path))?;
        Self::put_together(dir, certificate.der().clone(), key, names.to_vec())
    }

    /// Opens the authority in `dir`; `None` where there is none.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(dir: &Path) -> Result<Option<Self>, AuthorityError> {
        let path = dir.join("authority.pem");
        let Some(text) = files::read_if_there(&path).map_err(file_error(&path))? else {
            return Ok(None);
        };
        let damaged = |why: String| AuthorityError::Damaged {
            path: path.clone(),
            why,
        };
        let certificate = CertificateDer::from_pem_slice(&text).map_err(|e| damaged(e.to_string()))?;
        let key = PrivateKeyDer::from_pem_slice(&text).map_err(|e| damaged(e.to_string()))?;
        let key = KeyPair::try_from(&key).map_err(|e| damaged(e.to_string()))?;
        let names = dir.join("names");
        let names = match files::read_if_there(&names).map_err(file_error(&names))? {
            Some(text) => String::from_utf8_lossy(&text).lines().map(Into::into).collect(),
            None => Vec::new(),
        };
        Self::put_together(dir, certificate, key, names).map(Some)
    }

    fn put_together(
        dir: &Path,
        certificate: CertificateDer<'static>,
        key: KeyPair,
        names: Vec<String>,
    ) -> Result<Self, AuthorityError> {
        let name = der::certificate(&certificate)
            .and_then(|parsed| parsed.name)
            .unwrap_or_default();
        let params = authority_params(name);
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
            names,
            dir: dir.to_owned(),
        })
    }

    /// Where it is kept.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// Makes a certificate for whoever has the key of `request` (PKCS #10, DER). Of the request only the key counts.
    ///
    /// # Errors
    /// [`AuthorityError::Request`], or the signature failed.
    pub fn certify(&self, request: &[u8], who: &Who, life: Duration) -> Result<Vec<u8>, AuthorityError> {
        let now = unix_now();
        let backdated = BACKDATED.min(life / 10);
        self.certify_for(request, who, now - backdated.as_secs(), now + life.as_secs())
    }

    /// As [`Authority::certify`], from and until given seconds since 1970.
    ///
    /// # Errors
    /// As [`Authority::certify`].
    pub fn certify_for(
        &self,
        request: &[u8],
        who: &Who,
        from: u64,
        until: u64,
    ) -> Result<Vec<u8>, AuthorityError> {
        if request.len() > MAX_REQUEST_BYTES {
            return Err(AuthorityError::Request(format!(
                "{} bytes; the limit is {MAX_REQUEST_BYTES}",
                request.len()
            )));
        }
        let key = der::request(request).ok_or_else(|| {
            AuthorityError::Request("it is not a PKCS #10 request that its own key (P-256) signed".into())
        })?;
        let names = match who {
            Who::Coordinator => self.names.clone(),
            // A host's name has the letters of a DNS name.
            Who::Host(host) => vec![host.to_string()],
            Who::Person { .. } => Vec::new(),
        };
        let mut params = CertificateParams::new(names)?;
        let (unit, name) = who.unit_and_name();
        params.distinguished_name = subject(unit, name);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match who {
            Who::Coordinator => vec![ExtendedKeyUsagePurpose::ServerAuth],
            Who::Host(_) => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
            // Nobody who holds a person's key can pass for a host.
            Who::Person { .. } => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (moment(from), moment(until));
        let certificate = params.signed_by(&RawKey(key), &self.issuer)?;
        Ok(certificate.der().to_vec())
    }

    /// A new key with its certificate.
    ///
    /// # Errors
    /// As [`Authority::certify`].
    pub fn issue(&self, who: &Who, life: Duration) -> Result<Credentials, AuthorityError> {
        let key = NewKey::generate()?;
        let certificate = self.certify(&key.request()?, who, life)?;
        Ok(key.with(certificate, self.certificate.to_vec())?)
    }

    /// Signs a text (ECDSA P-256, SHA-256, ASN.1).
    pub(crate) fn sign(&self, text: &[u8]) -> Result<Vec<u8>, AuthorityError> {
        Ok(self.issuer.key().sign(text)?)
    }
}

/// A request's public key.
struct RawKey<'a>(&'a [u8]);

impl PublicKeyData for RawKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject("authority", name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn subject(unit: &str, name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, "treeboot");
    subject.push(DnType::OrganizationalUnitName, unit);
    subject.push(DnType::CommonName, name);
    subject
}

fn moment(unix: u64) -> time::OffsetDateTime {
    // Beyond the year 9999 there is no date: never.
    i64::try_from(unix)
        .ok()
        .and_then(|unix| time::OffsetDateTime::from_unix_timestamp(unix).ok())
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

fn check_names(names: &[String]) -> Result<(), AuthorityError> {
    if names.len() > MAX_NAMES {
        return Err(AuthorityError::Name(format!("{} names", names.len())));
    }
    for name in names {
        let dns = rustls::pki_types::ServerName::try_from(name.as_str());
        if dns.is_err() || name.contains('\n') {
            return Err(AuthorityError::Name(name.clone()));
        }
    }
    Ok(())
}
