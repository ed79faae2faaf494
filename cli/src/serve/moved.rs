//! Targets that are elsewhere: `--redirect IQN=HOST[:PORT]` and `--redirect-for-good`.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use treeboot_iscsi::target::{Access, Server};
use treeboot_types::{ISCSI_PORT, Iqn, IscsiUrl};

use crate::failure::{Exit, Failure, chain};

/// Where initiators of targets that are not served here are sent.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct MovedArgs {
    /// Send initiators that log in to this target to another portal, for now; may be given several times
    #[arg(long = "redirect", value_name = "IQN=HOST[:PORT]")]
    for_now: Vec<Moved>,
    /// The same for good; QEMU and libiscsi do not understand that
    #[arg(long = "redirect-for-good", value_name = "IQN=HOST[:PORT]")]
    for_good: Vec<Moved>,
}

/// A target, and the portal that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Moved {
    target: Iqn,
    /// A name or an address, an IPv6 one without brackets.
    host: String,
    port: u16,
}

impl Moved {
    /// As a TargetAddress (RFC 7143 §13.8).
    fn address(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

impl FromStr for Moved {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: String| {
            format!("{why}; write for instance iqn.2026-11.org.example:disk=192.0.2.7:{ISCSI_PORT}")
        };
        let (target, place) = text
            .split_once('=')
            .ok_or_else(|| wrong("there is no '=' between the target's name and its new portal".into()))?;
        let target = Iqn::new(target).map_err(|error| wrong(chain(&error)))?;
        let no_portal = || {
            wrong(format!(
                "'{place}' is not HOST[:PORT], an IPv6 address in brackets"
            ))
        };
        let url: IscsiUrl = format!("iscsi://{place}/{target}/0")
            .parse()
            .map_err(|_| no_portal())?;
        if !is_host(&url.host) {
            return Err(no_portal());
        }
        Ok(Self {
            target,
            host: url.host,
            port: url.port,
        })
    }
}

/// An address, or what can be a name in the DNS.
fn is_host(host: &str) -> bool {
    if host.parse::<IpAddr>().is_ok() {
        return true;
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A last label of digits is an address that is none (RFC 3696 §2).
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    host.len() <= 253 && host.split('.').all(is_label) && !host.rsplit('.').next().is_some_and(is_number)
}

impl MovedArgs {
    fn all(&self) -> impl Iterator<Item = (&Moved, bool)> {
        let for_now = self.for_now.iter().map(|moved| (moved, false));
        for_now.chain(self.for_good.iter().map(|moved| (moved, true)))
    }

    /// Nothing is moved twice, or to here, or away from here.
    ///
    /// # Errors
    /// The target that is, as a [`Failure`] of the command line.
    pub(super) fn check(&self, served: Option<&Iqn>, portals: &[SocketAddr]) -> Result<(), Failure> {
        let usage = |what: String| Failure::new(Exit::Usage, what);
        let mut seen = BTreeSet::new();
        for (moved, _) in self.all() {
            let target = &moved.target;
            if served == Some(target) {
                return Err(usage(format!(
                    "'{target}' is served here, so its initiators cannot be sent away"
                ))
                .advice("give the image another name with --name, or leave the redirection out"));
            }
            if !seen.insert(target) {
                return Err(usage(format!("'{target}' is redirected twice")).advice("give it one new portal"));
            }
            if portals.iter().any(|portal| leads_to(moved, *portal)) {
                return Err(usage(format!(
                    "'{}' is a portal of this server: initiators of '{target}' would come back for ever",
                    moved.address()
                ))
                .advice("give the portal that serves the target now"));
            }
        }
        Ok(())
    }

    /// Has the server send the initiators that `access` admits away.
    ///
    /// # Errors
    /// The target that cannot be added.
    pub(super) fn add(&self, server: &Server, access: &Access) -> Result<(), Failure> {
        for (moved, for_good) in self.all() {
            server
                .add_moved_target(moved.target.clone(), &moved.address(), for_good, access.clone())
                .map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
        }
        Ok(())
    }

    /// What to say of it.
    pub(super) fn announcement(&self) -> String {
        let line = |(moved, for_good): (&Moved, bool)| {
            let how_long = if for_good { "for good" } else { "for now" };
            format!(
                "initiators of {} are sent to {}, {how_long}\n",
                moved.target,
                moved.address()
            )
        };
        self.all().map(line).collect()
    }
}

/// Is this new place the portal itself, as far as addresses tell?
fn leads_to(moved: &Moved, portal: SocketAddr) -> bool {
    let Ok(address) = moved.host.parse::<IpAddr>() else {
        return moved.host == "localhost"
            && moved.port == portal.port()
            && [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED].contains(&match portal.ip() {
                IpAddr::V4(address) => address,
                IpAddr::V6(_) => Ipv4Addr::LOCALHOST,
            });
    };
    let on_all = portal.ip().is_unspecified() && address.is_ipv4() == portal.is_ipv4();
    moved.port == portal.port() && (address == portal.ip() || on_all && address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(for_now: &[&str], for_good: &[&str]) -> MovedArgs {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        MovedArgs {
            for_now: parse(for_now),
            for_good: parse(for_good),
        }
    }

    #[test]
    fn a_redirection_is_a_name_and_a_portal() {
        for (text, address) in [
            ("iqn.2026-11.a:b=192.0.2.7", "192.0.2.7:3260"),
            ("iqn.2026-11.a:b=192.0.2.7:3261", "192.0.2.7:3261"),
            ("iqn.2026-11.a:b=[2001:db8::1]", "[2001:db8::1]:3260"),
            ("iqn.2026-11.a:b=[2001:db8::1]:1", "[2001:db8::1]:1"),
            ("iqn.2026-11.a:b=san-2.example:860", "san-2.example:860"),
        ] {
            let moved: Moved = text.parse().unwrap();
            assert_eq!(moved.address(), address);
            assert_eq!(moved.target.as_str(), "iqn.2026-11.a:b");
        }
        for (bad, why) in [
            ("iqn.2026-11.a:b", "no '='"),
            ("disk=192.0.2.7", "disk"),
            ("=192.0.2.7", "''"),
            ("iqn.2026-11.a:b=", "'' is not HOST"),
            ("iqn.2026-11.a:b=:3260", "':3260' is not HOST"),
            ("iqn.2026-11.a:b=2001:db8::1", "is not HOST"),
            ("iqn.2026-11.a:b=192.0.2.7:0", "is not HOST"),
            ("iqn.2026-11.a:b=192.0.2.7:65536", "is not HOST"),
            ("iqn.2026-11.a:b=192.0.2.700", "is not HOST"),
            ("iqn.2026-11.a:b=san_2.example", "is not HOST"),
            ("iqn.2026-11.a:b=san.example,1", "is not HOST"),
            ("iqn.2026-11.a:b=me%secret@san.example", "is not HOST"),
            ("iqn.2026-11.a:b=san.example/x", "is not HOST"),
        ] {
            let error = bad.parse::<Moved>().unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn what_leads_nowhere_is_refused_by_name() {
        let served = Iqn::new("iqn.2026-11.a:served").unwrap();
        let portals = ["127.0.0.1:3260", "[::]:3261"].map(|portal| portal.parse().unwrap());
        for (args, why) in [
            (args(&["iqn.2026-11.a:served=192.0.2.7"], &[]), "served here"),
            (
                args(&["iqn.2026-11.a:b=192.0.2.7"], &["iqn.2026-11.a:b=192.0.2.8"]),
                "twice",
            ),
            (args(&["iqn.2026-11.a:b=127.0.0.1"], &[]), "for ever"),
            (args(&["iqn.2026-11.a:b=localhost"], &[]), "for ever"),
            (args(&[], &["iqn.2026-11.a:b=[::1]:3261"]), "for ever"),
        ] {
            let failure = args.check(Some(&served), &portals).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(
                failure.what.contains(why) && failure.advice.is_some(),
                "{}",
                failure.what
            );
        }
        let fine = args(
            &["iqn.2026-11.a:b=127.0.0.1:3261"],
            &["iqn.2026-11.a:c=[::1]:3260"],
        );
        assert!(fine.check(Some(&served), &portals).is_ok());
    }
}
