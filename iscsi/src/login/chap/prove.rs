//! The initiator's side: it answers, and asks in return where it holds the target's secret.

use super::{Algorithm, Challenge, Chap, ChapError, Keys, proves};
use crate::login::text::append_key;

/// One authentication by an initiator.
#[derive(Debug)]
pub(in crate::login) struct Prover {
    chap: Chap,
    /// For the target; unused in one-way CHAP.
    challenge: Challenge,
    offer: &'static [Algorithm],
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// CHAP was offered.
    Method,
    /// Algorithms were offered.
    Question,
    /// The target's challenge was answered with this algorithm, and ours sent along in mutual CHAP.
    Answered(Algorithm),
    /// The target has proven itself, or need not.
    Done,
}

impl Prover {
    pub(in crate::login) fn new(chap: Chap, challenge: Challenge) -> Self {
        Self {
            chap,
            challenge,
            offer: Algorithm::OFFER,
            step: Step::Method,
        }
    }

    /// Offers MD5 alone.
    pub(in crate::login) fn without_sha256(&mut self) {
        self.offer = &[Algorithm::Md5];
    }

    /// The target chose SHA-256 and has had an answer.
    pub(in crate::login) fn answered_by_sha256(&self) -> bool {
        self.step == Step::Answered(Algorithm::Sha256)
    }

    /// The next request may ask for the next stage: what is left to come is the target's word on our answer.
    pub(in crate::login) fn may_transit(&self) -> bool {
        matches!(self.step, Step::Answered(_) | Step::Done)
    }

    /// The target may let us into the next stage.
    pub(in crate::login) fn is_done(&self) -> bool {
        self.step == Step::Done
    }

    /// The target has agreed to CHAP.
    pub(in crate::login) fn agreed(&mut self, text: &mut Vec<u8>) -> Result<(), ChapError> {
        if self.step != Step::Method {
            return Err(ChapError::Order("AuthMethod"));
        }
        let codes: Vec<_> = self.offer.iter().map(|algorithm| algorithm.code()).collect();
        append_key(text, "CHAP_A", &codes.join(","));
        self.step = Step::Question;
        Ok(())
    }

    /// Takes the CHAP keys of a response, of which there may be none; appends what to send next.
    pub(in crate::login) fn take(&mut self, keys: Keys<'_>, text: &mut Vec<u8>) -> Result<(), ChapError> {
        match self.step {
            Step::Question if keys != Keys::default() => {
                let algorithm = keys.algorithm.ok_or(ChapError::Missing("CHAP_A"))?;
                let algorithm = Algorithm::from_code(algorithm)
                    .filter(|algorithm| self.offer.contains(algorithm))
                    .ok_or(ChapError::Algorithm)?;
                if keys.name.or(keys.response).is_some() {
                    return Err(ChapError::Order("CHAP_R"));
                }
                self.answer(algorithm, keys, text)
            }
            Step::Answered(algorithm) => self.check(algorithm, keys),
            _ => keys.none(),
        }
    }

    fn answer(&mut self, algorithm: Algorithm, keys: Keys<'_>, text: &mut Vec<u8>) -> Result<(), ChapError> {
        let question = keys.question()?;
        if question.bytes == self.challenge.bytes() {
            return Err(ChapError::Reflected);
        }
        let own = self.chap.initiator();
        let answer = algorithm.answer(question.id, own.secret(), &question.bytes);
        append_key(text, "CHAP_N", own.user());
        append_key(text, "CHAP_R", &question.encoding.print(&answer));
        if self.chap.target().is_some() {
            append_key(text, "CHAP_I", &self.challenge.id.to_string());
            append_key(text, "CHAP_C", &question.encoding.print(self.challenge.bytes()));
        }
        self.step = Step::Answered(algorithm);
        Ok(())
    }

    fn check(&mut self, algorithm: Algorithm, keys: Keys<'_>) -> Result<(), ChapError> {
        let Some(target) = self.chap.target() else {
            keys.none()?;
            self.step = Step::Done;
            return Ok(());
        };
        if keys.algorithm.or(keys.id).or(keys.challenge).is_some() {
            return Err(ChapError::Order("CHAP_C"));
        }
        let (user, answer) = keys.proof()?;
        if !proves(target, algorithm, &self.challenge, user, &answer) {
            return Err(ChapError::Unproven);
        }
        self.step = Step::Done;
        Ok(())
    }
}
