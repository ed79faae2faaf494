//! The coordinator's own values to and from messages; what both daemons speak of is converted in `treeboot-proto`.

use treeboot_proto::{InvalidMessage, instance, v1};
use treeboot_types::{Epoch, HostName};

use crate::tree::{Beat, Candidate, HostState, HostView, Push, Speaker, TreeView, VertexView};

pub(super) fn speaker(host: &str, speaker: &str) -> Result<Speaker, InvalidMessage> {
    Ok(Speaker {
        host: HostName::new(host)?,
        instance: instance(speaker)?,
    })
}

pub(super) fn epoch(message: Option<v1::Epoch>) -> Result<Epoch, InvalidMessage> {
    Ok(message.ok_or(InvalidMessage::Missing("epoch"))?.into())
}

pub(super) fn beat(message: &v1::Beat) -> Result<Beat, InvalidMessage> {
    let speaker = speaker(&message.host, &message.instance)?;
    let state = message.state.as_ref().map(state).transpose()?;
    if let Some(state) = &state
        && (state.info.name != speaker.host || state.info.instance != speaker.instance)
    {
        return Err(InvalidMessage::Value {
            field: "state.info",
            why: format!(
                "it is of host '{}' (instance {}), the beat of host '{}' (instance {})",
                state.info.name, state.info.instance, speaker.host, speaker.instance
            ),
        });
    }
    Ok(Beat {
        sequence: message.sequence,
        speaker,
        digest: message.state_digest.clone(),
        state,
        bad_parents: message
            .bad_parents
            .iter()
            .map(TryInto::try_into)
            .collect::<Result<_, _>>()?,
    })
}

fn state(message: &v1::HostState) -> Result<HostState, InvalidMessage> {
    let info = message
        .info
        .as_ref()
        .ok_or(InvalidMessage::Missing("state.info"))?;
    Ok(HostState {
        info: info.try_into()?,
        attachments: message
            .attachments
            .iter()
            .map(TryInto::try_into)
            .collect::<Result<_, _>>()?,
        vms: message.vms,
    })
}

pub(super) fn push(push: &Push) -> v1::Push {
    use v1::push::Push as Message;
    let message = match push {
        Push::Welcome {
            epoch,
            beat_ms,
            lease_ms,
        } => Message::Welcome(v1::Welcome {
            epoch: Some((*epoch).into()),
            beat_ms: *beat_ms,
            lease_ms: *lease_ms,
            export_key: None,
            secrets: Vec::new(),
        }),
        Push::Ack { sequence } => Message::Ack(v1::Ack { sequence: *sequence }),
        Push::Placement(placement) => Message::Placement(placement.as_ref().into()),
        Push::SendState => Message::SendState(v1::SendState {}),
        Push::Detach { image, epoch, why } => Message::Detach(v1::Detach {
            image: Some(image.into()),
            epoch: Some((*epoch).into()),
            reason: why.reason.clone(),
            drop_cache: why.drop_cache,
        }),
        Push::Refused(refusal) => refused(refusal.to_string()),
    };
    v1::Push { push: Some(message) }
}

pub(super) fn refused(reason: String) -> v1::push::Push {
    v1::push::Push::Refused(v1::Refused { reason })
}

pub(super) fn candidate(candidate: &Candidate) -> v1::Candidate {
    v1::Candidate {
        parent: Some((&candidate.parent).into()),
        state: v1::AttachState::from(candidate.state).into(),
        free_slots: candidate.free_slots,
        reason: candidate.reason.clone(),
        stripe: candidate.stripe.0.into(),
    }
}

pub(super) fn host(host: &HostView) -> v1::HostRecord {
    v1::HostRecord {
        info: Some((&host.info).into()),
        connected: host.connected,
        silent_ms: host.silent_ms,
        attachments: host.attachments,
        vms: host.vms,
        reported_by_it: host.reported_by_it.iter().map(Into::into).collect(),
        wrong_bytes_reports: host.wrong_bytes_reports,
    }
}

pub(super) fn tree(tree: &TreeView) -> v1::GetTreeResponse {
    let node = |vertex: &VertexView| v1::TreeNode {
        stripe: vertex.stripe.0.into(),
        host: vertex.host.as_ref().map(ToString::to_string).unwrap_or_default(),
        portal: vertex.portal.clone(),
        origin: vertex.origin,
        depth: vertex.depth,
        state: v1::AttachState::from(vertex.state).into(),
        connected: vertex.connected,
        parents: vertex.parents.clone(),
        children: vertex.children,
        lease_left_ms: vertex.lease_left_ms,
        zone: vertex.zone.clone(),
        rack: vertex.rack.clone(),
        weight: vertex.weight,
    };
    v1::GetTreeResponse {
        image: Some(tree.image.as_ref().into()),
        epoch: Some(tree.epoch.into()),
        fan_out: tree.fan_out,
        nodes: tree.vertices.iter().map(node).collect(),
    }
}
