//! What the trees want said, as lines of the log with fixed field names.

use treeboot_types::Fault;

use crate::tree::{Note, Refusal};

pub(crate) fn log(note: &Note) {
    match note {
        Note::HostCame(host) => tracing::info!(%host, "host came"),
        Note::HostLost { host, silent_ms } => tracing::warn!(%host, silent_ms, "host lost: its lease ended"),
        Note::HostLeft(host) => tracing::info!(%host, "host left"),
        Note::Attached { host, image, adopted } => tracing::info!(%host, %image, adopted, "host attached"),
        Note::LeaseEnded { host, image } => tracing::warn!(%host, %image, "lease of a slot ended"),
        Note::Moved { image, hosts } => tracing::info!(%image, hosts, "hosts got other parents"),
        Note::Complaint { by, of } => {
            let parent = of.host.as_ref().map_or(of.portal.as_str(), |h| h.as_str());
            let fault = match of.fault {
                Fault::WrongBytes => "wrong bytes",
                Fault::Unreachable => "unreachable",
                Fault::Slow => "slow",
            };
            tracing::warn!(host = %by, image = %of.image, parent, fault, count = of.count, "parent reported");
        }
        Note::StateLost { host, seen, now } => tracing::warn!(
            %host, %seen, epoch = %now,
            "a host knows a later epoch than the record: part of the record was lost; a new incarnation begins"
        ),
        Note::UnknownAttachment { host, image } => {
            tracing::warn!(%host, %image, "a host is attached to an image that the record lacks; it is left alone");
        }
        Note::Refused { refusal } => match refusal {
            Refusal::UnknownHost { .. } | Refusal::NotAttached { .. } => {
                tracing::debug!("refused: {refusal}")
            }
            _ => tracing::warn!("refused: {refusal}"),
        },
        Note::Deaf { at, ms } => tracing::warn!(
            tick_ms = at.0,
            ms,
            "the coordinator did not run for a while; leases do not count that time"
        ),
    }
}
