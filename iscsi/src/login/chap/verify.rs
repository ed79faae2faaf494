//! The target's side: it asks, and answers when it is asked in return.

use super::{Algorithm, Challenge, Chap, ChapError, Keys, proves};
use crate::login::text::append_key;

/// One authentication at a target.
#[derive(Debug)]
pub(in crate::login) struct Verifier {
    chap: Chap,
    step: Step,
}

#[derive(Debug)]
enum Step {
    /// The initiator names its algorithms.
    Algorithms,
    /// It was asked.
    Answer {
        algorithm: Algorithm,
        challenge: Challenge,
    },
    Proven,
}

impl Verifier {
    pub(in crate::login) fn new(chap: Chap) -> Self {
        Self {
            chap,
            step: Step::Algorithms,
        }
    }

    pub(in crate::login) fn is_proven(&self) -> bool {
        matches!(self.step, Step::Proven)
    }

    /// Takes the CHAP keys of a request, of which there may be none, and appends the answer. `challenge` makes a new
    /// challenge, `is_ours` knows those under way.
    pub(in crate::login) fn take(
        &mut self,
        keys: Keys<'_>,
        challenge: impl FnOnce() -> Option<Challenge>,
        is_ours: impl FnOnce(&[u8]) -> bool,
        text: &mut Vec<u8>,
    ) -> Result<(), ChapError> {
        if keys == Keys::default() {
            return Ok(());
        }
        match &self.step {
            Step::Algorithms => {
                let list = keys.algorithm.ok_or(ChapError::Missing("CHAP_A"))?;
                let others = Keys {
                    algorithm: None,
                    ..keys
                };
                others.none()?;
                // The initiator's order counts (RFC 7143 §6.2.1).
                let algorithm = list
                    .split(',')
                    .find_map(Algorithm::from_code)
                    .ok_or(ChapError::Algorithm)?;
                let challenge = challenge().ok_or(ChapError::NoRandom)?;
                append_key(text, "CHAP_A", algorithm.code());
                append_key(text, "CHAP_I", &challenge.id.to_string());
                append_key(text, "CHAP_C", &super::Encoding::Hex.print(challenge.bytes()));
                self.step = Step::Answer { algorithm, challenge };
            }
            Step::Answer { algorithm, challenge } => {
                if keys.algorithm.is_some() {
                    return Err(ChapError::Order("CHAP_A"));
                }
                let (user, answer) = keys.proof()?;
                let asked = keys.id.is_some() || keys.challenge.is_some();
                let question = asked.then(|| keys.question()).transpose()?;
                if let Some(question) = &question
                    && (question.bytes == challenge.bytes() || is_ours(&question.bytes))
                {
                    return Err(ChapError::Reflected);
                }
                // Nothing is answered to whoever has not proven itself (RFC 7143 §12.1.3).
                if !proves(self.chap.initiator(), *algorithm, challenge, user, &answer) {
                    return Err(ChapError::Unproven);
                }
                if let Some(question) = question {
                    let own = self.chap.target().ok_or(ChapError::OneWay)?;
                    let answer = algorithm.answer(question.id, own.secret(), &question.bytes);
                    append_key(text, "CHAP_N", own.user());
                    append_key(text, "CHAP_R", &question.encoding.print(&answer));
                }
                self.step = Step::Proven;
            }
            Step::Proven => keys.none()?,
        }
        Ok(())
    }
}
