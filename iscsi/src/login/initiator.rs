//! The initiator's side of a login.

use treeboot_types::Iqn;

use super::chap::{self, Challenge, Chap, ChapError, Prover};
use super::negotiation::{Negotiation, NegotiationError, Role, Terms};
use super::text::{PeerText, TextError, append_key, is_address, parse_keys};
use super::{Established, MAX_LOGIN_REQUESTS, MAX_REQUEST_TEXT_BYTES, Security, stage, status};
use crate::pdu::{LoginRequest, LoginResponse};

/// Who logs in where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitiatorOptions {
    /// Our name.
    pub initiator: Iqn,
    /// The target; `None` for a discovery session.
    pub target: Option<Iqn>,
    /// Our part of the session's name: two sessions to one target at once need two.
    pub isid: [u8; 6],
    /// What we bring to the negotiation.
    pub terms: Terms,
}

/// Why a login failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// The target said no.
    #[error("the target refused the login: {} ({class:#04x}{detail:02x})", status::describe(*class, *detail))]
    Refused {
        /// Status class.
        class: u8,
        /// Status detail.
        detail: u8,
    },
    /// The target is elsewhere.
    #[error("the target has moved to {}", PeerText::new(address))]
    Moved {
        /// For good.
        permanently: bool,
        /// `host[:port][,group]`, as the target gave it.
        address: String,
    },
    /// The target breaks the order of a login.
    #[error("the target broke the login's order: {0}")]
    Order(&'static str),
    /// More requests or more text than any honest login has.
    #[error(
        "the login goes on beyond {MAX_LOGIN_REQUESTS} requests or {MAX_REQUEST_TEXT_BYTES} bytes of text"
    )]
    TooLong,
    /// The target insists on another method.
    #[error("the target wants authentication by '{0}', which is not what was offered")]
    Authentication(PeerText),
    /// The target did not prove itself, or breaks the order of CHAP.
    #[error("the authentication failed on the target's side")]
    Chap(#[from] ChapError),
    /// Not text.
    #[error("the target's text cannot be read")]
    Text(#[from] TextError),
    /// No agreement.
    #[error("the negotiation failed")]
    Negotiation(#[from] NegotiationError),
}

/// How far a login is.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Send [`InitiatorLogin::request`] again.
    GoOn,
    /// The full feature phase has begun.
    Done(Box<Established>),
}

/// One login.
#[derive(Debug)]
pub struct InitiatorLogin {
    options: InitiatorOptions,
    negotiation: Option<Negotiation>,
    security: Security,
    chap: Option<Prover>,
    stage: u8,
    introduced: bool,
    offered: bool,
    /// Keys that we still owe the target.
    answers: Vec<u8>,
    text: Vec<u8>,
    /// The response so far was a part: the next request is empty.
    continued: bool,
    exp_stat_sn: u32,
    tsih: u16,
    requests: u32,
}

/// The tag of every login request.
const LOGIN_ITT: u32 = 0;
/// CmdSN at the start; any value does.
const FIRST_CMD_SN: u32 = 1;

impl InitiatorLogin {
    /// A login that has not begun.
    pub fn new(options: InitiatorOptions) -> Self {
        let negotiation = Negotiation::new(Role::Initiator, options.terms, options.target.is_none());
        Self {
            options,
            negotiation: Some(negotiation),
            security: Security::None,
            chap: None,
            stage: stage::SECURITY,
            introduced: false,
            offered: false,
            answers: Vec::new(),
            text: Vec::new(),
            continued: false,
            exp_stat_sn: 0,
            tsih: 0,
            requests: 0,
        }
    }

    /// A login that offers nothing but CHAP; `challenge` is for the target to prove itself by, where `chap` is mutual.
    pub fn with_chap(options: InitiatorOptions, chap: Chap, challenge: Challenge) -> Self {
        Self {
            security: Security::Chap(chap.clone()),
            chap: Some(Prover::new(chap, challenge)),
            ..Self::new(options)
        }
    }

    /// Offers only MD5 for CHAP; to be called before the first request, after another login was
    /// [misread](Self::was_misread).
    #[must_use]
    pub fn without_sha256(mut self) -> Self {
        if let Some(chap) = &mut self.chap {
            chap.without_sha256();
        }
        self
    }

    /// Did the target ask for CHAP_A=7 and then call the answer malformed? To tgt, IET and their kin 7 is SHA-1, which
    /// the registry has as 6; they can be had with MD5. Nothing is lost by trying that: the choice of the algorithm was
    /// the target's before.
    pub fn was_misread(&self, refusal: &LoginError) -> bool {
        let (class, detail) = status::INITIATOR_ERROR;
        self.chap.as_ref().is_some_and(Prover::answered_by_sha256)
            && *refusal == LoginError::Refused { class, detail }
    }

    /// The next request and its text.
    pub fn request(&mut self) -> (LoginRequest, Vec<u8>) {
        let mut text = std::mem::take(&mut self.answers);
        if !self.introduced {
            self.introduced = true;
            append_key(&mut text, "InitiatorName", self.options.initiator.as_str());
            match &self.options.target {
                Some(target) => {
                    append_key(&mut text, "SessionType", "Normal");
                    append_key(&mut text, "TargetName", target.as_str());
                }
                None => append_key(&mut text, "SessionType", "Discovery"),
            }
            let method = if self.chap.is_some() { "CHAP" } else { "None" };
            append_key(&mut text, "AuthMethod", method);
        }
        if self.stage == stage::OPERATIONAL && !self.offered {
            self.offered = true;
            for (key, value) in self.negotiation.iter_mut().flat_map(Negotiation::offers) {
                append_key(&mut text, key, &value);
            }
        }
        let next_stage = match self.stage {
            stage::SECURITY => stage::OPERATIONAL,
            _ => stage::FULL_FEATURE,
        };
        let proven = self.chap.as_ref().is_none_or(Prover::may_transit);
        let transit = !self.continued && (proven || self.stage != stage::SECURITY);
        let request = LoginRequest {
            transit,
            continues: false,
            current_stage: self.stage,
            next_stage: if transit { next_stage } else { 0 },
            version_max: 0,
            version_min: 0,
            isid: self.options.isid,
            tsih: self.tsih,
            itt: LOGIN_ITT,
            cid: 0,
            cmd_sn: FIRST_CMD_SN,
            exp_stat_sn: self.exp_stat_sn,
        };
        (request, text)
    }

    /// Takes the target's response.
    ///
    /// # Errors
    /// [`LoginError`]; the connection is of no more use.
    pub fn response(&mut self, response: &LoginResponse, data: &[u8]) -> Result<Progress, LoginError> {
        self.requests += 1;
        if self.requests > MAX_LOGIN_REQUESTS || self.text.len() + data.len() > MAX_REQUEST_TEXT_BYTES {
            return Err(LoginError::TooLong);
        }
        if response.itt != LOGIN_ITT {
            return Err(LoginError::Order("a response with a tag of another request"));
        }
        self.text.extend_from_slice(data);
        self.continued = response.continues;
        self.exp_stat_sn = response.stat_sn.wrapping_add(1);
        if response.status_class != 0 {
            return Err(self.refused(response));
        }
        if response.current_stage != self.stage {
            return Err(LoginError::Order("a response for another stage"));
        }
        if response.continues {
            return Ok(Progress::GoOn);
        }
        self.keys()?;
        if !response.transit {
            return Ok(Progress::GoOn);
        }
        match (self.stage, response.next_stage) {
            (stage::SECURITY, _) if self.chap.as_ref().is_some_and(|chap| !chap.is_done()) => {
                Err(ChapError::Required.into())
            }
            (stage::SECURITY, stage::OPERATIONAL) => {
                self.stage = stage::OPERATIONAL;
                Ok(Progress::GoOn)
            }
            (stage::OPERATIONAL, stage::FULL_FEATURE) => self.done(response),
            _ => Err(LoginError::Order("a transit that was not asked for")),
        }
    }

    fn refused(&self, response: &LoginResponse) -> LoginError {
        let (class, detail) = (response.status_class, response.status_detail);
        let address = parse_keys(&self.text)
            .ok()
            .and_then(|keys| {
                keys.into_iter()
                    .find(|(key, value)| *key == "TargetAddress" && is_address(value))
            })
            .map(|(_, address)| address.to_owned());
        match address {
            Some(address) if class == 1 => LoginError::Moved {
                permanently: (class, detail) == status::MOVED_PERMANENTLY,
                address,
            },
            _ => LoginError::Refused { class, detail },
        }
    }

    fn keys(&mut self) -> Result<(), LoginError> {
        let whole = std::mem::take(&mut self.text);
        let Some(negotiation) = &mut self.negotiation else {
            return Err(LoginError::Order("a response after the end"));
        };
        let mut of_chap = chap::Keys::default();
        let mut others = Vec::new();
        for (key, value) in parse_keys(&whole)? {
            if !of_chap.take(key, value)? {
                others.push((key, value));
            }
        }
        match &mut self.chap {
            // A response after the security stage has nothing to say about it.
            Some(chap) if self.stage == stage::SECURITY => chap.take(of_chap, &mut self.answers)?,
            _ => of_chap.none()?,
        }
        for (key, value) in others {
            if key == "AuthMethod" {
                match (value, &mut self.chap) {
                    ("None", None) => {}
                    ("CHAP", Some(chap)) => chap.agreed(&mut self.answers)?,
                    _ => return Err(LoginError::Authentication(value.into())),
                }
            } else if let Some(answer) = negotiation.take(key, value)? {
                append_key(&mut self.answers, key, &answer);
            }
        }
        Ok(())
    }

    fn done(&mut self, response: &LoginResponse) -> Result<Progress, LoginError> {
        let Some(negotiation) = self.negotiation.take() else {
            return Err(LoginError::Order("a response after the end"));
        };
        self.tsih = response.tsih;
        Ok(Progress::Done(Box::new(Established {
            initiator: self.options.initiator.clone(),
            target: self.options.target.clone(),
            security: self.security.clone(),
            isid: self.options.isid,
            tsih: response.tsih,
            cid: 0,
            parameters: negotiation.finish(),
            cmd_sn: FIRST_CMD_SN,
            stat_sn: response.stat_sn.wrapping_add(1),
        })))
    }
}
