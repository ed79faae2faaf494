//! What one heartbeat stream has said and heard, without the stream: when the whole state is told, and which complaints wait to be
//! acknowledged. The simulation talks with it too.

use treeboot_proto::v1;

/// Complaints kept for a coordinator that is away; more of them say nothing new.
const COMPLAINTS: usize = 256;

/// One stream's talk. `C` is a complaint.
#[derive(Debug)]
pub struct Talk<C> {
    sequence: u64,
    told_digest: Vec<u8>,
    complaints: Vec<C>,
    /// Sequence of the beat that carried the first so many of `complaints`; they are said again on the next stream
    /// unless it is acknowledged.
    complained_in: Option<(u64, usize)>,
}

/// What a beat is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sign<C> {
    /// Its number.
    pub sequence: u64,
    /// Whether it carries the whole state.
    pub whole: bool,
    /// What parents did wrong.
    pub complaints: Vec<C>,
}

impl<C: Clone> Talk<C> {
    /// A new stream's, with what the last one could not get rid of.
    pub fn new(complaints: Vec<C>) -> Self {
        Self {
            sequence: 0,
            told_digest: Vec::new(),
            complaints,
            complained_in: None,
        }
    }

    /// The next beat of a host whose state has this digest. `asked` where the coordinator wants all of it.
    pub fn beat(&mut self, digest: &[u8], new_complaints: Vec<C>, asked: bool) -> Sign<C> {
        self.complaints.extend(new_complaints);
        self.complaints.truncate(COMPLAINTS);
        self.sequence += 1;
        let differs = digest != self.told_digest;
        let complain = !self.complaints.is_empty() && self.complained_in.is_none();
        if complain {
            self.complained_in = Some((self.sequence, self.complaints.len()));
        }
        self.told_digest = digest.to_vec();
        Sign {
            sequence: self.sequence,
            whole: asked || differs,
            complaints: if complain {
                self.complaints.clone()
            } else {
                Vec::new()
            },
        }
    }

    /// The coordinator took a beat in.
    pub fn acknowledged(&mut self, beat: u64) {
        if let Some((sequence, count)) = self.complained_in
            && beat >= sequence
        {
            self.complaints.drain(..count);
            self.complained_in = None;
        }
    }

    /// What is to be said again on the next stream.
    pub fn unheard(self) -> Vec<C> {
        self.complaints
    }
}

/// Equal states have equal digests. Labels are hashed in order, because the message holds them in none.
pub fn state_digest(state: &v1::HostState) -> Vec<u8> {
    use prost::Message as _;
    use sha2::Digest as _;
    let mut state = state.clone();
    let labels = state.info.as_mut().map(|info| std::mem::take(&mut info.labels));
    let labels: std::collections::BTreeMap<_, _> = labels.into_iter().flatten().collect();
    let mut hasher = sha2::Sha256::new();
    hasher.update(state.encode_to_vec());
    for (key, value) in labels {
        hasher.update((key.len() as u64).to_le_bytes());
        hasher.update(key);
        hasher.update((value.len() as u64).to_le_bytes());
        hasher.update(value);
    }
    hasher.finalize().to_vec()
}
