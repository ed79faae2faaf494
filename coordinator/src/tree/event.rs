//! What reaches the trees and what they want done.

use treeboot_types::{
    Attachment, BadParent, Endpoint, Epoch, HostInfo, HostName, Image, ImageId, ImageRef, Placement, Tick,
};

use super::record::Change;

/// One heartbeat stream; never used again after it closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// One unary call that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// Who speaks: a host's name and the instance of its agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Speaker {
    /// The host.
    pub host: HostName,
    /// Random, kept in the agent's state directory.
    pub instance: String,
}

/// The whole state of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostState {
    /// What it is.
    pub info: HostInfo,
    /// What it is attached to.
    pub attachments: Vec<Attachment>,
    /// How many VMs it runs.
    pub vms: u32,
}

/// One sign of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// Repeated in the acknowledgement.
    pub sequence: u64,
    /// Whose.
    pub speaker: Speaker,
    /// Of the state that the host is in; opaque here, compared for equality only.
    pub digest: Vec<u8>,
    /// On the first beat of a stream, on a change, and when asked for.
    pub state: Option<HostState>,
    /// Since the last beat.
    pub bad_parents: Vec<BadParent>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Time passed; comes at least every beat.
    Clock,
    /// A beat came through a stream.
    Beat(StreamId, Box<Beat>),
    /// A stream broke or ended. The host is not dead for that: its lease decides.
    StreamClosed(StreamId),
    /// A call that changes something.
    Call(CallId, Box<Call>),
}

/// A call that changes something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// A host takes a place.
    Join {
        /// Who.
        speaker: Speaker,
        /// Which image.
        image: ImageRef,
        /// Under which it will export.
        endpoint: Endpoint,
    },
    /// A host's export is up.
    Register {
        /// Who.
        speaker: Speaker,
        /// Which image.
        image: ImageRef,
        /// Of the placement it acts on.
        epoch: Epoch,
    },
    /// A host's export of one image ends.
    Remove {
        /// Who.
        speaker: Speaker,
        /// Which image.
        image: ImageRef,
        /// Of the placement it acts on.
        epoch: Epoch,
    },
    /// A host ends.
    Leave {
        /// Who.
        speaker: Speaker,
    },
    /// An image is recorded, or gets another origin; version 0 asks for the next free one.
    AddImage {
        /// The record.
        image: Image,
    },
    /// An image's record goes.
    RemoveImage {
        /// Which.
        image: ImageRef,
        /// Although hosts are attached.
        force: bool,
    },
}

/// What a call brought about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A place.
    Joined(Placement),
    /// The epoch of the placement that is in force.
    Registered(Epoch),
    /// Nothing of it is left.
    Removed,
    /// Nothing of the host is left.
    Left,
    /// The record, and whether it is new.
    Image {
        /// As it is now; as it was, after a removal.
        image: Image,
        /// False where only an origin was added.
        created: bool,
    },
}

/// What is sent down a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Push {
    /// The host is known.
    Welcome {
        /// The last decision.
        epoch: Epoch,
        /// How often to beat.
        beat_ms: u64,
        /// How long a silence may last.
        lease_ms: u64,
    },
    /// A beat was taken in.
    Ack {
        /// Which.
        sequence: u64,
    },
    /// A new place.
    Placement(Box<Placement>),
    /// The next beat is to carry the whole state.
    SendState,
    /// An attachment is no longer wanted.
    Detach {
        /// Of which image.
        image: ImageId,
        /// When this was decided.
        epoch: Epoch,
        /// Why.
        why: Unwanted,
    },
    /// The host is not let in; the stream ends.
    Refused(Refusal),
}

/// Why an attachment is no longer wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unwanted {
    /// For people.
    pub reason: String,
    /// Its content is of no use any more, so that what the host has cached of it goes, too.
    pub drop_cache: bool,
}

impl Unwanted {
    pub(super) fn image_removed() -> Self {
        Self {
            reason: "the image was removed".into(),
            drop_cache: true,
        }
    }

    pub(super) fn other_content() -> Self {
        Self {
            reason: "the image of this name has another content now".into(),
            drop_cache: true,
        }
    }

    /// The host may join again, and finds what it has cached.
    pub(super) fn place(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            drop_cache: false,
        }
    }

    pub(super) fn place_removed() -> Self {
        Self::place("it was removed; join again if it is wanted")
    }
}

/// What is to be done, in this order, and nothing sent before what was saved is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Changes the record.
    Save(Change),
    /// Sends to a host.
    Push(StreamId, Push),
    /// Ends a stream after what was pushed.
    Close(StreamId),
    /// Answers a call.
    Answer(CallId, Result<Answer, Refusal>),
    /// Worth a line in the log.
    Note(Note),
}

/// Why a call or a stream is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No beat of that host came yet.
    #[error(
        "the coordinator does not know host '{host}'; open a heartbeat stream whose first beat carries the host's \
         whole state, then try again"
    )]
    UnknownHost {
        /// Who.
        host: HostName,
    },
    /// Another agent has the name.
    #[error(
        "another agent already serves as host '{host}' (instance {holder}, its lease lasts {lease_left_ms} ms more); \
         give this agent (instance {asker}) a --name of its own, or stop the other one and wait for its lease to end"
    )]
    OtherInstance {
        /// The name.
        host: HostName,
        /// Who has it.
        holder: String,
        /// Who wants it.
        asker: String,
        /// How long it is held without a sign of life.
        lease_left_ms: u64,
    },
    /// A stream speaks for two hosts.
    #[error("this stream belongs to host '{bound}' and cannot speak for host '{host}'; open another stream")]
    OtherHost {
        /// Whose stream it is.
        bound: HostName,
        /// Who spoke.
        host: HostName,
    },
    /// No such image.
    #[error("there is no image '{image}'; `treeboot image list` shows which there are")]
    UnknownImage {
        /// Which.
        image: String,
    },
    /// The version has another content.
    #[error(
        "image '{image}' exists with another content (digest {have}, not {given}); a version never changes: add this \
         one as a new version"
    )]
    ImageExists {
        /// Which.
        image: ImageId,
        /// First digits of its digest.
        have: String,
        /// First digits of the digest asked for.
        given: String,
    },
    /// The same content cut differently.
    #[error(
        "image '{image}' exists with the same content but another {what}; register this origin with the same {what}"
    )]
    ImageDiffers {
        /// Which.
        image: ImageId,
        /// What differs.
        what: &'static str,
    },
    /// Decided on stale knowledge.
    #[error(
        "host '{host}' acts on epoch {given} of image '{image}', but epoch {current} is in force; take the newest \
         placement, then try again"
    )]
    OtherEpoch {
        /// Who.
        host: HostName,
        /// Which image.
        image: ImageId,
        /// What it acts on.
        given: Epoch,
        /// What is in force.
        current: Epoch,
    },
    /// No place in the image's trees.
    #[error("host '{host}' has no place in the trees of image '{image}'; join it first")]
    NotAttached {
        /// Who.
        host: HostName,
        /// Which image.
        image: ImageId,
    },
    /// Somebody else's export.
    #[error(
        "portal {portal} already exports image '{image}' for {holder}; only its holder may register it: choose another \
         --portal, or stop the other agent and wait for its lease to end"
    )]
    EndpointTaken {
        /// Where.
        portal: String,
        /// Which image.
        image: ImageId,
        /// Whose it is.
        holder: String,
    },
    /// Hosts read it.
    #[error(
        "image '{image}' is in use by {count} host(s), {some}; stop their VMs and detach it there, or remove it with \
         force, which tells them to detach"
    )]
    ImageInUse {
        /// Which.
        image: ImageId,
        /// How many.
        count: usize,
        /// The first few names.
        some: String,
    },
    /// A bound was reached.
    #[error("there are {limit} {what} already, which is the limit; {way_out}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
        /// What to do.
        way_out: &'static str,
    },
}

/// What the log should say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// A host's first beat.
    HostCame(HostName),
    /// A host's lease ended.
    HostLost {
        /// Who.
        host: HostName,
        /// Since its last beat.
        silent_ms: u64,
    },
    /// A host left by itself.
    HostLeft(HostName),
    /// A host took a place.
    Attached {
        /// Who.
        host: HostName,
        /// Which image.
        image: ImageId,
        /// True where the host told the coordinator of its place rather than the reverse.
        adopted: bool,
    },
    /// An attachment ended because nobody kept its lease.
    LeaseEnded {
        /// Who.
        host: HostName,
        /// Which image.
        image: ImageId,
    },
    /// Hosts got other parents.
    Moved {
        /// Which image.
        image: ImageId,
        /// How many.
        hosts: usize,
    },
    /// A host complained.
    Complaint {
        /// Who.
        by: HostName,
        /// Of what.
        of: BadParent,
    },
    /// A host knows a later epoch than the coordinator: part of the record was lost.
    StateLost {
        /// Who knows it.
        host: HostName,
        /// What it knows.
        seen: Epoch,
        /// What counts from now on.
        now: Epoch,
    },
    /// A host is attached to an image that is not in the record.
    UnknownAttachment {
        /// Who.
        host: HostName,
        /// Which image.
        image: ImageId,
    },
    /// A host was not let in.
    Refused {
        /// Why.
        refusal: Refusal,
    },
    /// The clock stood still or jumped; leases count only the time in which the coordinator listened.
    Deaf {
        /// When.
        at: Tick,
        /// For how long.
        ms: u64,
    },
}
