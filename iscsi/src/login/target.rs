//! The target's side of a login.

use treeboot_types::Iqn;

use super::chap::{self, Challenge, ChapError, Verifier};
use super::negotiation::{Negotiation, NegotiationError, Role, Terms};
use super::text::{PeerText, TextError, append_key, parse_keys};
use super::{
    Established, MAX_LOGIN_REQUESTS, MAX_REQUEST_TEXT_BYTES, PORTAL_GROUP_TAG, Security, stage, status,
};
use crate::pdu::{LoginRequest, LoginResponse};

/// What the login asks about targets and sessions.
pub trait Directory {
    /// May this initiator use this target, and how does it prove that it is the one it says?
    ///
    /// # Errors
    /// The [`Refusal`] to send.
    fn admit(&self, initiator: &Iqn, target: &Iqn) -> Result<Security, Refusal>;

    /// A challenge for one login, never the same twice; `None` where there is no random source, and then CHAP fails.
    fn challenge(&self) -> Option<Challenge> {
        None
    }

    /// Did we send this challenge to anybody who has not answered it yet?
    fn is_ours(&self, challenge: &[u8]) -> bool {
        let _ = challenge;
        false
    }

    /// Is there a session of this handle between the two?
    fn has_session(&self, initiator: &Iqn, tsih: u16) -> bool;

    /// A handle for a new session, never 0 and not in use.
    ///
    /// # Errors
    /// There are no more sessions to be had.
    fn new_tsih(&self) -> Result<u16, Refusal>;
}

/// Why a login fails, for the log and as the status that the initiator sees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The target is not served here.
    #[error("no target '{0}' here")]
    NotFound(Iqn),
    /// The initiator is not in the target's access list.
    #[error("the initiator '{initiator}' is not in the access list of '{target}'")]
    Forbidden {
        /// Who asked.
        initiator: Iqn,
        /// For what.
        target: Iqn,
    },
    /// The target is being removed or the server stops.
    #[error("the target '{0}' is being removed")]
    Unavailable(Iqn),
    /// The target is elsewhere.
    #[error("the target '{target}' has moved to {address}")]
    Moved {
        /// The target.
        target: Iqn,
        /// `host[:port]`, an IPv6 address in brackets.
        address: String,
        /// For good.
        permanently: bool,
    },
    /// No more sessions.
    #[error("the limit of {0} sessions is reached")]
    TooMany(usize),
    /// A key that the standard demands is absent.
    #[error("the login lacks the key {0}")]
    Missing(&'static str),
    /// A key with a value that cannot be.
    #[error("'{value}' is no value for {key}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it held.
        value: PeerText,
    },
    /// It insists on a proof, and there is nothing here to check it by.
    #[error("the initiator offers only '{0}' for authentication, and the target holds no secret for it")]
    Authentication(PeerText),
    /// The initiator did not prove who it is.
    #[error("'{initiator}' did not authenticate")]
    Chap {
        /// Who it says it is.
        initiator: Iqn,
        /// What was wrong.
        #[source]
        why: ChapError,
    },
    /// A connection for a session that exists.
    #[error("a second connection for a session; one is the limit")]
    SecondConnection,
    /// A connection for a session that does not exist.
    #[error("no session with the handle {0}")]
    NoSession(u16),
    /// Version 0 is not among those that the initiator speaks.
    #[error("the initiator speaks versions {min} to {max}; 0 is the only one here")]
    Version {
        /// Lowest.
        min: u8,
        /// Highest.
        max: u8,
    },
    /// A jump between stages that the standard does not have, or other wrong order.
    #[error("wrong order in the login: {0}")]
    Order(&'static str),
    /// More text or more requests than any honest login has.
    #[error(
        "the login goes on beyond {MAX_LOGIN_REQUESTS} requests or {MAX_REQUEST_TEXT_BYTES} bytes of text"
    )]
    TooLong,
    /// Not text.
    #[error("the login's text cannot be read")]
    Text(#[from] TextError),
    /// No agreement.
    #[error("the negotiation failed")]
    Negotiation(#[from] NegotiationError),
}

impl Refusal {
    /// Class and detail of the Login Response.
    pub fn status(&self) -> (u8, u8) {
        match self {
            Self::NotFound(_) => status::NOT_FOUND,
            Self::Forbidden { .. } => status::AUTHORIZATION_FAILURE,
            Self::Unavailable(_) => status::SERVICE_UNAVAILABLE,
            Self::Moved {
                permanently: false, ..
            } => status::MOVED_TEMPORARILY,
            Self::Moved { .. } => status::MOVED_PERMANENTLY,
            Self::TooMany(_) => status::OUT_OF_RESOURCES,
            Self::Missing(_) => status::MISSING_PARAMETER,
            Self::Authentication(_) => status::AUTHENTICATION_FAILURE,
            Self::Chap { why, .. } => why.status(),
            Self::SecondConnection => status::TOO_MANY_CONNECTIONS,
            Self::NoSession(_) => status::NO_SESSION,
            Self::Version { .. } => status::UNSUPPORTED_VERSION,
            Self::Value {
                key: "SessionType", ..
            } => status::SESSION_TYPE,
            Self::Value { .. } | Self::Order(_) | Self::TooLong | Self::Text(_) | Self::Negotiation(_) => {
                status::INITIATOR_ERROR
            }
        }
    }
}

/// What to send, and what follows.
#[derive(Debug)]
pub struct Reply {
    /// The header.
    pub response: LoginResponse,
    /// The text.
    pub text: Vec<u8>,
    /// What follows once it is sent.
    pub then: Then,
}

/// What follows a [`Reply`].
#[derive(Debug)]
pub enum Then {
    /// The next login request.
    GoOn,
    /// The full feature phase.
    FullFeature(Box<Established>),
    /// The end of the connection.
    Close(Refusal),
}

#[derive(Debug)]
struct Peer {
    initiator: Iqn,
    target: Option<Iqn>,
    security: Security,
    /// Under way, or ended well, where the target asks for CHAP.
    chap: Option<Verifier>,
}

impl Peer {
    fn failed(&self, why: ChapError) -> Refusal {
        Refusal::Chap {
            initiator: self.initiator.clone(),
            why,
        }
    }

    fn is_proven(&self) -> bool {
        match &self.security {
            Security::None => true,
            Security::Chap(_) => self.chap.as_ref().is_some_and(Verifier::is_proven),
        }
    }
}

/// One login, from its first request on.
#[derive(Debug)]
pub struct TargetLogin {
    terms: Terms,
    negotiation: Option<Negotiation>,
    peer: Option<Peer>,
    stage: Option<u8>,
    first: Option<LoginRequest>,
    text: Vec<u8>,
    stat_sn: u32,
    requests: u32,
    declared: bool,
    group_told: bool,
}

impl TargetLogin {
    /// A login that has not begun.
    pub fn new(terms: Terms) -> Self {
        Self {
            terms,
            negotiation: None,
            peer: None,
            stage: None,
            first: None,
            text: Vec::new(),
            stat_sn: 0,
            requests: 0,
            declared: false,
            group_told: false,
        }
    }

    /// The names that are known so far, for the log.
    pub fn initiator(&self) -> Option<&Iqn> {
        self.peer.as_ref().map(|peer| &peer.initiator)
    }

    /// Takes a request and gives the reply; a failed login is answered too.
    pub fn take(&mut self, request: &LoginRequest, data: &[u8], directory: &dyn Directory) -> Reply {
        let mut response = LoginResponse {
            transit: false,
            continues: false,
            current_stage: request.current_stage,
            next_stage: 0,
            version_max: 0,
            version_active: 0,
            isid: request.isid,
            tsih: request.tsih,
            itt: request.itt,
            stat_sn: self.stat_sn,
            exp_cmd_sn: request.cmd_sn,
            max_cmd_sn: request.cmd_sn,
            status_class: 0,
            status_detail: 0,
        };
        if self.first.is_none() {
            self.stat_sn = request.exp_stat_sn;
            response.stat_sn = self.stat_sn;
        }
        let mut text = Vec::new();
        match self.step(request, data, directory, &mut response, &mut text) {
            Ok(then) => {
                self.stat_sn = self.stat_sn.wrapping_add(1);
                Reply { response, text, then }
            }
            Err(refusal) => {
                (response.status_class, response.status_detail) = refusal.status();
                response.transit = false;
                response.next_stage = 0;
                let mut text = Vec::new();
                if let Refusal::Moved { address, .. } = &refusal {
                    append_key(&mut text, "TargetAddress", address);
                }
                Reply {
                    response,
                    text,
                    then: Then::Close(refusal),
                }
            }
        }
    }

    fn step(
        &mut self,
        request: &LoginRequest,
        data: &[u8],
        directory: &dyn Directory,
        response: &mut LoginResponse,
        text: &mut Vec<u8>,
    ) -> Result<Then, Refusal> {
        self.check_order(request)?;
        self.requests += 1;
        if self.requests > MAX_LOGIN_REQUESTS || self.text.len() + data.len() > MAX_REQUEST_TEXT_BYTES {
            return Err(Refusal::TooLong);
        }
        self.text.extend_from_slice(data);
        if request.continues {
            return Ok(Then::GoOn);
        }
        let whole = std::mem::take(&mut self.text);
        let keys = parse_keys(&whole)?;
        if self.peer.is_none() {
            self.introduce(request, &keys, directory)?;
        }
        self.authenticate(request.current_stage, &keys, directory, text)?;
        self.answer(request.current_stage, &keys, text)?;
        if self.peer.as_ref().is_some_and(|peer| peer.target.is_some()) && !self.group_told {
            self.group_told = true;
            append_key(text, "TargetPortalGroupTag", &PORTAL_GROUP_TAG.to_string());
        }
        if !request.transit || !self.may_leave()? {
            return Ok(Then::GoOn);
        }
        response.transit = true;
        response.next_stage = request.next_stage;
        self.stage = Some(request.next_stage);
        if request.next_stage != stage::FULL_FEATURE {
            return Ok(Then::GoOn);
        }
        let (Some(peer), Some(negotiation)) = (self.peer.take(), self.negotiation.take()) else {
            return Err(Refusal::Order("a login that has ended already"));
        };
        match directory.new_tsih() {
            Ok(tsih) => response.tsih = tsih,
            Err(refusal) => return Err(refusal),
        }
        Ok(Then::FullFeature(Box::new(Established {
            initiator: peer.initiator,
            target: peer.target,
            security: peer.security,
            isid: request.isid,
            tsih: response.tsih,
            cid: request.cid,
            parameters: negotiation.finish(),
            cmd_sn: request.cmd_sn,
            stat_sn: self.stat_sn.wrapping_add(1),
        })))
    }

    fn check_order(&mut self, request: &LoginRequest) -> Result<(), Refusal> {
        if request.version_min > 0 {
            return Err(Refusal::Version {
                min: request.version_min,
                max: request.version_max,
            });
        }
        match &self.first {
            None => self.first = Some(*request),
            Some(first)
                if (first.isid, first.tsih, first.cid) != (request.isid, request.tsih, request.cid) =>
            {
                return Err(Refusal::Order("the session's name changed"));
            }
            Some(_) => {}
        }
        let current = request.current_stage;
        if !matches!(current, stage::SECURITY | stage::OPERATIONAL) {
            return Err(Refusal::Order("a stage that is none"));
        }
        if self.stage.is_some_and(|stage| stage != current) {
            return Err(Refusal::Order("not the stage that was agreed on"));
        }
        self.stage = Some(current);
        let forward = matches!(
            (current, request.next_stage),
            (stage::SECURITY, stage::OPERATIONAL | stage::FULL_FEATURE)
                | (stage::OPERATIONAL, stage::FULL_FEATURE)
        );
        if request.transit && (!forward || request.continues) {
            return Err(Refusal::Order("a transit to a stage that does not follow"));
        }
        Ok(())
    }

    /// The first request says who wants what (RFC 7143 §6.3.1).
    fn introduce(
        &mut self,
        request: &LoginRequest,
        keys: &[(&str, &str)],
        directory: &dyn Directory,
    ) -> Result<(), Refusal> {
        let find = |name: &str| keys.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
        let name = |key: &'static str| -> Result<Iqn, Refusal> {
            let value = find(key).ok_or(Refusal::Missing(key))?;
            Iqn::new(value).map_err(|_| Refusal::Value {
                key,
                value: value.into(),
            })
        };
        let initiator = name("InitiatorName")?;
        let target = match find("SessionType") {
            Some("Discovery") => None,
            None | Some("Normal") => Some(name("TargetName")?),
            Some(other) => {
                return Err(Refusal::Value {
                    key: "SessionType",
                    value: other.into(),
                });
            }
        };
        if request.tsih != 0 {
            return Err(if directory.has_session(&initiator, request.tsih) {
                Refusal::SecondConnection
            } else {
                Refusal::NoSession(request.tsih)
            });
        }
        let security = match &target {
            Some(target) => directory.admit(&initiator, target)?,
            None => Security::None,
        };
        self.negotiation = Some(Negotiation::new(Role::Target, self.terms, target.is_none()));
        self.peer = Some(Peer {
            initiator,
            target,
            security,
            chap: None,
        });
        Ok(())
    }

    /// Agrees on the method and carries it on (RFC 7143 §12).
    fn authenticate(
        &mut self,
        current: u8,
        keys: &[(&str, &str)],
        directory: &dyn Directory,
        text: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let Some(peer) = &mut self.peer else {
            return Err(Refusal::Order("keys before a name"));
        };
        let mut of_chap = chap::Keys::default();
        let mut methods = None;
        for &(key, value) in keys {
            if key == "AuthMethod" {
                if methods.replace(value).is_some() {
                    return Err(peer.failed(ChapError::Order("AuthMethod")));
                }
            } else {
                of_chap.take(key, value).map_err(|why| peer.failed(why))?;
            }
        }
        if let Some(methods) = methods {
            let offered = |method: &str| methods.split(',').any(|offer| offer == method);
            let agreed = match &peer.security {
                Security::None if offered("None") => "None",
                Security::Chap(chap) if offered("CHAP") => {
                    if peer.chap.is_some() {
                        return Err(peer.failed(ChapError::Order("AuthMethod")));
                    }
                    peer.chap = Some(Verifier::new(chap.clone()));
                    "CHAP"
                }
                Security::Chap(_) => return Err(peer.failed(ChapError::Required)),
                Security::None => return Err(Refusal::Authentication(methods.into())),
            };
            append_key(text, "AuthMethod", agreed);
            // Its steps come after the agreement.
            return of_chap.none().map_err(|why| peer.failed(why));
        }
        if current != stage::SECURITY {
            of_chap.none().map_err(|why| peer.failed(why))?;
            if !peer.is_proven() {
                return Err(peer.failed(ChapError::Required));
            }
            return Ok(());
        }
        let step = match &mut peer.chap {
            Some(chap) => chap.take(
                of_chap,
                || directory.challenge(),
                |challenge| directory.is_ours(challenge),
                text,
            ),
            None => of_chap.none(),
        };
        step.map_err(|why| peer.failed(why))
    }

    /// May the login go on to the next stage? `false` while an authentication is under way.
    fn may_leave(&self) -> Result<bool, Refusal> {
        match &self.peer {
            Some(peer) if !peer.is_proven() && peer.chap.is_none() => Err(peer.failed(ChapError::Required)),
            Some(peer) => Ok(peer.is_proven()),
            None => Ok(true),
        }
    }

    fn answer(&mut self, current: u8, keys: &[(&str, &str)], text: &mut Vec<u8>) -> Result<(), Refusal> {
        let Some(negotiation) = &mut self.negotiation else {
            return Err(Refusal::Order("keys before a name"));
        };
        for &(key, value) in keys {
            match key {
                "InitiatorName" | "TargetName" | "SessionType" | "InitiatorAlias" => {}
                // [`Self::authenticate`] had them.
                "AuthMethod" | "CHAP_A" | "CHAP_I" | "CHAP_C" | "CHAP_N" | "CHAP_R" => {}
                _ => {
                    if let Some(answer) = negotiation.take(key, value)? {
                        append_key(text, key, &answer);
                    }
                }
            }
        }
        if current == stage::OPERATIONAL && !self.declared {
            self.declared = true;
            for (key, value) in negotiation.offers() {
                append_key(text, key, &value);
            }
        }
        Ok(())
    }
}
