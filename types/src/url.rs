//! `iscsi://host[:port]/target/lun`, as QEMU and libiscsi write it; the CHAP part (`user%secret@`) is refused.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ISCSI_PORT, Iqn, IqnError};

/// Where a LUN is served: portal, target and LUN.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IscsiUrl {
    /// A host name or an address; IPv6 without brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
    /// The target's name.
    pub target: Iqn,
    /// The LUN.
    pub lun: u16,
}

/// Why a text is not an iSCSI URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IscsiUrlError {
    /// Not of the form at all.
    #[error("'{0}' is not an iSCSI URL; write iscsi://HOST[:PORT]/TARGET-IQN/LUN")]
    Form(String),
    /// A user or a secret inside.
    #[error("the iSCSI URL of '{0}' holds a user name or secret, which would end up in logs; leave it out")]
    Credentials(String),
    /// The target's name.
    #[error("the target's name in the iSCSI URL '{url}' is not valid")]
    Target {
        /// The text.
        url: String,
        /// What is wrong with the name.
        #[source]
        source: IqnError,
    },
}

impl IscsiUrl {
    /// `host:port`, an IPv6 address in brackets, ready for a resolver.
    pub fn portal(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for IscsiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iscsi://{}/{}/{}", self.portal(), self.target, self.lun)
    }
}

impl FromStr for IscsiUrl {
    type Err = IscsiUrlError;
    fn from_str(text: &str) -> Result<Self, IscsiUrlError> {
        let form = || IscsiUrlError::Form(text.into());
        let rest = text.strip_prefix("iscsi://").ok_or_else(form)?;
        let (portal, rest) = rest.split_once('/').ok_or_else(form)?;
        if let Some((_, host)) = portal.rsplit_once('@') {
            return Err(IscsiUrlError::Credentials(host.into()));
        }
        let (target, lun) = rest.split_once('/').ok_or_else(form)?;
        let target = Iqn::new(target).map_err(|source| IscsiUrlError::Target {
            url: text.into(),
            source,
        })?;
        let lun = lun.parse().map_err(|_| form())?;
        let (host, port) = match portal.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or_else(form)?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| form())?;
                (
                    host,
                    if rest.is_empty() {
                        None
                    } else {
                        Some(rest.strip_prefix(':').ok_or_else(form)?)
                    },
                )
            }
            None => match portal.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (portal, None),
            },
        };
        let port = port.map_or(Ok(ISCSI_PORT), |port| port.parse().map_err(|_| form()))?;
        if host.is_empty() || port == 0 || host.contains(|c: char| c.is_whitespace()) {
            return Err(form());
        }
        Ok(Self {
            host: host.into(),
            port,
            target,
            lun,
        })
    }
}

impl TryFrom<String> for IscsiUrl {
    type Error = IscsiUrlError;
    fn try_from(text: String) -> Result<Self, IscsiUrlError> {
        text.parse()
    }
}

impl From<IscsiUrl> for String {
    fn from(url: IscsiUrl) -> String {
        url.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_prints_as_it_parses_with_the_port_filled_in() {
        for (text, printed) in [
            (
                "iscsi://10.0.0.1/iqn.2026-11.a:b/0",
                "iscsi://10.0.0.1:3260/iqn.2026-11.a:b/0",
            ),
            (
                "iscsi://[::1]:3261/iqn.2026-11.a:b/7",
                "iscsi://[::1]:3261/iqn.2026-11.a:b/7",
            ),
            (
                "iscsi://san.example/iqn.2026-11.a/1",
                "iscsi://san.example:3260/iqn.2026-11.a/1",
            ),
        ] {
            let url: IscsiUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), printed);
            assert_eq!(printed.parse::<IscsiUrl>().unwrap(), url);
        }
    }

    #[test]
    fn what_is_no_url_is_refused_and_a_secret_is_not_repeated() {
        for bad in [
            "",
            "http://a/iqn.a/0",
            "iscsi://a/iqn.a",
            "iscsi:///iqn.a/0",
            "iscsi://a:0/iqn.a/0",
            "iscsi://a:x/iqn.a/0",
            "iscsi://[::1/iqn.a/0",
            "iscsi://[zz]/iqn.a/0",
            "iscsi://a/iqn.a/x",
            "iscsi://a/b/0",
        ] {
            assert!(bad.parse::<IscsiUrl>().is_err(), "{bad}");
        }
        let error = "iscsi://me%pass@a/iqn.a/0".parse::<IscsiUrl>().unwrap_err();
        assert!(!error.to_string().contains("pass"));
    }
}
