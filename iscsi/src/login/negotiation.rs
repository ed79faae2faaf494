//! The rules by which each operational key is agreed on (RFC 7143 §6.2 and §13), the same for both roles.

use std::collections::BTreeSet;

use super::text::PeerText;

/// Which side of the login we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Proposes.
    Initiator,
    /// Answers.
    Target,
}

/// What one side wants of a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DigestTerms {
    /// Not at all.
    Never,
    /// Where the peer prefers it.
    #[default]
    IfAsked,
    /// Unless the peer cannot.
    Prefer,
    /// Or no session.
    Require,
}

impl DigestTerms {
    fn offer(self) -> &'static str {
        match self {
            Self::Never => "None",
            Self::IfAsked => "None,CRC32C",
            Self::Prefer => "CRC32C,None",
            Self::Require => "CRC32C",
        }
    }

    fn accepts(self, value: &str) -> Option<bool> {
        match (value, self) {
            ("None", Self::Require) | ("CRC32C", Self::Never) => None,
            ("None", _) => Some(false),
            ("CRC32C", _) => Some(true),
            _ => None,
        }
    }
}

/// What one side brings to a negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// CRC32C after headers.
    pub header_digest: DigestTerms,
    /// CRC32C after data.
    pub data_digest: DigestTerms,
    /// MaxRecvDataSegmentLength: the longest data segment in bytes that we accept.
    pub max_recv_bytes: u32,
    /// MaxBurstLength: the longest sequence of data in bytes.
    pub max_burst_bytes: u32,
    /// FirstBurstLength: the most unsolicited data in bytes of a command.
    pub first_burst_bytes: u32,
    /// InitialR2T: every burst must be asked for.
    pub initial_r2t: bool,
    /// ImmediateData: data may come with the command.
    pub immediate_data: bool,
    /// MaxOutstandingR2T of a command.
    pub max_outstanding_r2t: u16,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            header_digest: DigestTerms::default(),
            data_digest: DigestTerms::default(),
            max_recv_bytes: 256 * 1024,
            max_burst_bytes: 1024 * 1024,
            first_burst_bytes: 256 * 1024,
            initial_r2t: false,
            immediate_data: true,
            max_outstanding_r2t: 8,
        }
    }
}

/// What is in force on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// CRC32C after headers, both ways.
    pub header_digest: bool,
    /// CRC32C after data, both ways.
    pub data_digest: bool,
    /// The longest data segment in bytes that we accept.
    pub max_recv_bytes: u32,
    /// The longest data segment in bytes that the peer accepts.
    pub peer_max_recv_bytes: u32,
    /// The longest sequence of data in bytes.
    pub max_burst_bytes: u32,
    /// The most unsolicited data in bytes of a command, never more than `max_burst_bytes`.
    pub first_burst_bytes: u32,
    /// Every burst must be asked for.
    pub initial_r2t: bool,
    /// Data may come with the command.
    pub immediate_data: bool,
    /// R2Ts of a command that may be outstanding.
    pub max_outstanding_r2t: u16,
    /// DefaultTime2Wait in seconds.
    pub time2wait_s: u16,
    /// DefaultTime2Retain in seconds.
    pub time2retain_s: u16,
}

impl Parameters {
    /// What holds where nothing is said (RFC 7143 §13).
    fn standard(terms: &Terms) -> Self {
        Self {
            header_digest: false,
            data_digest: false,
            max_recv_bytes: terms.max_recv_bytes,
            peer_max_recv_bytes: 8192,
            max_burst_bytes: 262_144,
            first_burst_bytes: 65_536,
            initial_r2t: true,
            immediate_data: true,
            max_outstanding_r2t: 1,
            time2wait_s: 2,
            time2retain_s: 20,
        }
    }
}

/// Why no agreement was reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NegotiationError {
    /// A value outside what the standard allows for the key, or an answer that does not fit the offer.
    #[error("'{value}' is no value for the key {key}")]
    Value {
        /// The key.
        key: String,
        /// What the peer sent.
        value: PeerText,
    },
    /// The peer refused our offer.
    #[error("the peer answered {value} to our offer of {key}")]
    Refused {
        /// The key.
        key: String,
        /// `Reject` or `NotUnderstood`.
        value: PeerText,
    },
    /// The key was settled before.
    #[error("the key {key} came twice")]
    Twice {
        /// The key.
        key: String,
    },
    /// No digest that both sides accept.
    #[error("no common choice for the key {key}: the peer offers {offered}")]
    NoChoice {
        /// The key.
        key: String,
        /// The peer's list.
        offered: PeerText,
    },
}

/// The most keys that a peer may bring in one login: far more than exist.
const MAX_KEYS: usize = 64;

/// An agreement in the making. Feed it each operational key of the peer.
#[derive(Debug)]
pub struct Negotiation {
    role: Role,
    terms: Terms,
    discovery: bool,
    parameters: Parameters,
    /// Keys that we proposed and that wait for an answer.
    proposed: BTreeSet<&'static str>,
    /// Keys that are settled.
    settled: BTreeSet<String>,
}

/// Results of numbers and switches.
fn yes_no(value: bool) -> &'static str {
    if value { "Yes" } else { "No" }
}

impl Negotiation {
    /// Starts from the standard's defaults.
    pub fn new(role: Role, terms: Terms, discovery: bool) -> Self {
        Self {
            role,
            terms,
            discovery,
            parameters: Parameters::standard(&terms),
            proposed: BTreeSet::new(),
            settled: BTreeSet::new(),
        }
    }

    /// What to propose: everything for an initiator; a target only declares what it receives.
    pub fn offers(&mut self) -> Vec<(&'static str, String)> {
        let terms = self.terms;
        let declared = ("MaxRecvDataSegmentLength", terms.max_recv_bytes.to_string());
        if self.role == Role::Target {
            return vec![declared];
        }
        let mut offers = vec![
            ("HeaderDigest", terms.header_digest.offer().to_owned()),
            ("DataDigest", terms.data_digest.offer().to_owned()),
            ("DefaultTime2Wait", "2".to_owned()),
            ("DefaultTime2Retain", "0".to_owned()),
            ("ErrorRecoveryLevel", "0".to_owned()),
        ];
        if !self.discovery {
            offers.extend([
                ("MaxConnections", "1".to_owned()),
                ("InitialR2T", yes_no(terms.initial_r2t).to_owned()),
                ("ImmediateData", yes_no(terms.immediate_data).to_owned()),
                ("MaxBurstLength", terms.max_burst_bytes.to_string()),
                ("FirstBurstLength", terms.first_burst_bytes.to_string()),
                ("MaxOutstandingR2T", terms.max_outstanding_r2t.to_string()),
                ("DataPDUInOrder", "Yes".to_owned()),
                ("DataSequenceInOrder", "Yes".to_owned()),
            ]);
        }
        self.proposed.extend(offers.iter().map(|(key, _)| *key));
        offers.push(declared);
        offers
    }

    /// Takes a key of the peer, an offer or the answer to ours; gives what to answer, if anything.
    ///
    /// # Errors
    /// [`NegotiationError`]; the login has failed.
    pub fn take(&mut self, key: &str, value: &str) -> Result<Option<String>, NegotiationError> {
        let answers = self.proposed.remove(key);
        if !self.settled.insert(key.to_owned()) || self.settled.len() > MAX_KEYS {
            return Err(NegotiationError::Twice { key: key.to_owned() });
        }
        if answers {
            return match value {
                "Irrelevant" => Ok(None),
                "Reject" | "NotUnderstood" => Err(NegotiationError::Refused {
                    key: key.to_owned(),
                    value: value.into(),
                }),
                _ => self.settle(key, value).map(|_| None),
            };
        }
        if self.discovery && is_of_normal_sessions(key) {
            return Ok(Some("Irrelevant".to_owned()));
        }
        self.settle(key, value)
    }

    /// Ends the negotiation.
    pub fn finish(mut self) -> Parameters {
        let p = &mut self.parameters;
        p.first_burst_bytes = p.first_burst_bytes.min(p.max_burst_bytes);
        self.parameters
    }

    /// Applies a key's rule to the peer's value and our terms. Applied to an answer it is idempotent, because the
    /// result of each rule lies within both sides' values.
    fn settle(&mut self, key: &str, value: &str) -> Result<Option<String>, NegotiationError> {
        let terms = self.terms;
        let p = &mut self.parameters;
        let number = |low: u32, high: u32| number(key, value, low, high);
        let switch = || switch(key, value);
        let result = match key {
            "HeaderDigest" => {
                let (on, text) = choose(key, value, terms.header_digest)?;
                p.header_digest = on;
                text.to_owned()
            }
            "DataDigest" => {
                let (on, text) = choose(key, value, terms.data_digest)?;
                p.data_digest = on;
                text.to_owned()
            }
            "MaxRecvDataSegmentLength" => {
                p.peer_max_recv_bytes = max_recv_bytes(value)?;
                return Ok(None);
            }
            "MaxBurstLength" => {
                p.max_burst_bytes = number(512, 0x00ff_ffff)?.min(terms.max_burst_bytes);
                p.max_burst_bytes.to_string()
            }
            "FirstBurstLength" => {
                p.first_burst_bytes = number(512, 0x00ff_ffff)?.min(terms.first_burst_bytes);
                p.first_burst_bytes.to_string()
            }
            "InitialR2T" => {
                p.initial_r2t = switch()? || terms.initial_r2t;
                yes_no(p.initial_r2t).to_owned()
            }
            "ImmediateData" => {
                p.immediate_data = switch()? && terms.immediate_data;
                yes_no(p.immediate_data).to_owned()
            }
            "MaxOutstandingR2T" => {
                p.max_outstanding_r2t = (number(1, 65_535)? as u16).min(terms.max_outstanding_r2t);
                p.max_outstanding_r2t.to_string()
            }
            "DefaultTime2Wait" => {
                p.time2wait_s = (number(0, 3600)? as u16).max(2);
                p.time2wait_s.to_string()
            }
            "DefaultTime2Retain" => {
                // Nothing is retained: a lost connection ends its session (ErrorRecoveryLevel 0).
                number(0, 3600)?;
                p.time2retain_s = 0;
                "0".to_owned()
            }
            "MaxConnections" => {
                number(1, 65_535)?;
                "1".to_owned()
            }
            "ErrorRecoveryLevel" => {
                number(0, 2)?;
                "0".to_owned()
            }
            "DataPDUInOrder" | "DataSequenceInOrder" => {
                switch()?;
                "Yes".to_owned()
            }
            "iSCSIProtocolLevel" => {
                // 1 is RFC 7143 (RFC 7144 §7.1.1).
                number(0, 31)?.min(1).to_string()
            }
            "TaskReporting" => {
                if !value.split(',').any(|choice| choice == "RFC3720") {
                    return Ok(Some("Reject".to_owned()));
                }
                "RFC3720".to_owned()
            }
            // Markers were taken out of the standard; "No" is what RFC 3720 has for declining them.
            "IFMarker" | "OFMarker" => "No".to_owned(),
            "IFMarkInt" | "OFMarkInt" => "Irrelevant".to_owned(),
            // Declarations, which need no answer.
            "InitiatorAlias" | "TargetAlias" | "TargetAddress" | "TargetPortalGroupTag" => return Ok(None),
            _ => "NotUnderstood".to_owned(),
        };
        Ok(Some(result))
    }
}

/// Keys that mean nothing in a discovery session (RFC 7143 §13, "Irrelevant when").
fn is_of_normal_sessions(key: &str) -> bool {
    matches!(
        key,
        "MaxConnections"
            | "InitialR2T"
            | "ImmediateData"
            | "MaxBurstLength"
            | "FirstBurstLength"
            | "MaxOutstandingR2T"
            | "DataPDUInOrder"
            | "DataSequenceInOrder"
    )
}

/// Keys that are settled during the login and not later, where the rest of RFC 7143 §13 may come in a text request.
pub(crate) fn is_of_the_login(key: &str) -> bool {
    is_of_normal_sessions(key)
        || matches!(
            key,
            "HeaderDigest"
                | "DataDigest"
                | "DefaultTime2Wait"
                | "DefaultTime2Retain"
                | "ErrorRecoveryLevel"
                | "iSCSIProtocolLevel"
                | "TaskReporting"
                | "AuthMethod"
                | "SessionType"
                | "InitiatorName"
                | "TargetName"
        )
}

/// A value of MaxRecvDataSegmentLength, in bytes.
pub(crate) fn max_recv_bytes(value: &str) -> Result<u32, NegotiationError> {
    number("MaxRecvDataSegmentLength", value, 512, 0x00ff_ffff)
}

fn wrong(key: &str, value: &str) -> NegotiationError {
    NegotiationError::Value {
        key: key.to_owned(),
        value: value.into(),
    }
}

/// A number, decimal or hexadecimal (RFC 7143 §6.1), within bounds.
pub(super) fn number(key: &str, value: &str, low: u32, high: u32) -> Result<u32, NegotiationError> {
    let digits = value.strip_prefix("0x").or_else(|| value.strip_prefix("0X"));
    let parsed = match digits {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u32::from_str_radix(hex, 16).ok(),
        None if value.bytes().all(|b| b.is_ascii_digit()) => value.parse().ok(),
        _ => None,
    };
    parsed
        .filter(|n| (low..=high).contains(n))
        .ok_or_else(|| wrong(key, value))
}

fn switch(key: &str, value: &str) -> Result<bool, NegotiationError> {
    match value {
        "Yes" => Ok(true),
        "No" => Ok(false),
        _ => Err(wrong(key, value)),
    }
}

/// The first of the peer's choices that we accept; an answer is a list of one.
fn choose(key: &str, value: &str, terms: DigestTerms) -> Result<(bool, &'static str), NegotiationError> {
    let on = value.split(',').find_map(|choice| terms.accepts(choice));
    match on {
        Some(on) => Ok((on, if on { "CRC32C" } else { "None" })),
        None => Err(NegotiationError::NoChoice {
            key: key.to_owned(),
            offered: value.into(),
        }),
    }
}
