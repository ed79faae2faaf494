//! Endpoints, images, hosts and places.

use std::sync::Arc;

use treeboot_types::{
    AttachState, Attachment, BadParent, Child, Digest, Endpoint, Fault, HostInfo, HostName, Image, ImageId,
    Iqn, Labels, Origin, Parent, PathPolicy, Placement, PlaneKind, Portal, StripeIndex, StripePlacement,
};

use super::{InvalidMessage, image_id};
use crate::v1;

/// More labels a host or origin than anybody needs; bounds what one message can make the coordinator keep.
pub const MAX_LABELS: usize = 32;
/// Longest key or value of a label in bytes.
pub const MAX_LABEL_BYTES: usize = 255;
/// More stripes than a host has parents to read from.
pub const MAX_STRIPES: u16 = 16;
/// More origins, parents or fallbacks than one list can sensibly hold.
pub const MAX_PARENTS: usize = 64;

fn value(field: &'static str, why: impl ToString) -> InvalidMessage {
    InvalidMessage::Value {
        field,
        why: why.to_string(),
    }
}

fn lun(field: &'static str, lun: u32) -> Result<u16, InvalidMessage> {
    // RFC 7143 leaves 14 bits to a LUN of flat addressing (SAM-5 §4.7.7.2).
    u16::try_from(lun)
        .ok()
        .filter(|&lun| lun < 1 << 14)
        .ok_or_else(|| value(field, format_args!("LUN {lun} is above 16383")))
}

fn stripe(index: u32) -> Result<StripeIndex, InvalidMessage> {
    u16::try_from(index)
        .ok()
        .filter(|&index| index < MAX_STRIPES)
        .map(StripeIndex)
        .ok_or_else(|| value("stripe", format_args!("{index} is not below {MAX_STRIPES}")))
}

/// Labels within their bounds and without control characters.
///
/// # Errors
/// Too many, too long, or with a character that would not print; names the label.
pub fn labels(labels: &std::collections::HashMap<String, String>) -> Result<Labels, InvalidMessage> {
    if labels.len() > MAX_LABELS {
        return Err(value(
            "labels",
            format_args!("{} labels; the limit is {MAX_LABELS}", labels.len()),
        ));
    }
    for (key, text) in labels {
        let printable = |t: &str| t.len() <= MAX_LABEL_BYTES && !t.chars().any(char::is_control);
        if key.is_empty() || !printable(key) || !printable(text) {
            return Err(value(
                "labels",
                format_args!(
                    "the label {key:?}={text:?}; a key needs 1 to {MAX_LABEL_BYTES} bytes, a value at most as many, \
                     neither with control characters"
                ),
            ));
        }
    }
    Ok(labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
}

impl TryFrom<&v1::Endpoint> for Endpoint {
    type Error = InvalidMessage;
    fn try_from(message: &v1::Endpoint) -> Result<Self, InvalidMessage> {
        Ok(Self {
            portal: Portal::new(&message.portal).map_err(|e| value("endpoint.portal", e))?,
            target: Iqn::new(&message.target).map_err(|e| value("endpoint.target", e))?,
            data_lun: lun("endpoint.data_lun", message.data_lun)?,
            hash_lun: message
                .hash_lun
                .map(|n| lun("endpoint.hash_lun", n))
                .transpose()?,
        })
    }
}

impl From<&Endpoint> for v1::Endpoint {
    fn from(endpoint: &Endpoint) -> Self {
        Self {
            portal: endpoint.portal.to_string(),
            target: endpoint.target.to_string(),
            data_lun: endpoint.data_lun.into(),
            hash_lun: endpoint.hash_lun.map(Into::into),
        }
    }
}

/// A message's endpoint, which must be there.
///
/// # Errors
/// Missing, or not valid.
pub fn endpoint(message: Option<&v1::Endpoint>) -> Result<Endpoint, InvalidMessage> {
    message.ok_or(InvalidMessage::Missing("endpoint"))?.try_into()
}

fn host_or_none(host: &str) -> Result<Option<HostName>, InvalidMessage> {
    Ok(if host.is_empty() {
        None
    } else {
        Some(HostName::new(host)?)
    })
}

impl TryFrom<&v1::Origin> for Origin {
    type Error = InvalidMessage;
    fn try_from(message: &v1::Origin) -> Result<Self, InvalidMessage> {
        Ok(Self {
            endpoint: endpoint(message.endpoint.as_ref())?,
            host: host_or_none(&message.host)?,
            labels: labels(&message.labels)?,
        })
    }
}

impl From<&Origin> for v1::Origin {
    fn from(origin: &Origin) -> Self {
        Self {
            endpoint: Some((&origin.endpoint).into()),
            host: origin.host.as_ref().map(ToString::to_string).unwrap_or_default(),
            labels: origin.labels.clone().into_iter().collect(),
        }
    }
}

/// An image whose version may be 0, which stands for the next free one: the id's version is then 0.
///
/// # Errors
/// Names the field that is missing or not valid.
pub fn new_image(message: Option<&v1::Image>) -> Result<Image, InvalidMessage> {
    let message = message.ok_or(InvalidMessage::Missing("image"))?;
    let reference = super::image_id_or_newest(message.id.as_ref())?;
    let digest: Digest = message.parsed_digest()?;
    if message.bytes == 0 || message.bytes % 512 != 0 {
        return Err(value(
            "bytes",
            format_args!("{} is not a positive multiple of 512", message.bytes),
        ));
    }
    let chunk_bytes = match message.chunk_bytes {
        0 => treeboot_types::DEFAULT_CHUNK_BYTES,
        bytes => bytes,
    };
    if !chunk_bytes.is_power_of_two() || chunk_bytes < treeboot_types::VERITY_BLOCK_BYTES {
        return Err(value(
            "chunk_bytes",
            format_args!("{chunk_bytes} is not a power of two of at least 4096"),
        ));
    }
    let stripes = stripe(message.stripes.max(1) - 1)?.0 + 1;
    let stripe_unit_bytes = match message.stripe_unit_bytes {
        0 => u64::from(chunk_bytes),
        bytes => bytes,
    };
    if stripe_unit_bytes % u64::from(chunk_bytes) != 0 {
        return Err(value(
            "stripe_unit_bytes",
            format_args!("{stripe_unit_bytes} is not a multiple of chunk_bytes {chunk_bytes}"),
        ));
    }
    if message.origins.is_empty() {
        return Err(InvalidMessage::Missing("origins"));
    }
    if message.origins.len() > MAX_PARENTS {
        return Err(value(
            "origins",
            format_args!("{} origins; the limit is {MAX_PARENTS}", message.origins.len()),
        ));
    }
    Ok(Image {
        id: ImageId {
            name: reference.name,
            version: reference.version.unwrap_or(0),
        },
        digest,
        bytes: message.bytes,
        chunk_bytes,
        stripes,
        stripe_unit_bytes,
        origins: message
            .origins
            .iter()
            .map(TryInto::try_into)
            .collect::<Result<_, _>>()?,
        created_unix_ms: message.created_unix_ms,
        allocated_bytes: message.allocated_bytes,
    })
}

impl TryFrom<&v1::Image> for Image {
    type Error = InvalidMessage;
    fn try_from(message: &v1::Image) -> Result<Self, InvalidMessage> {
        let image = new_image(Some(message))?;
        if image.id.version == 0 {
            return Err(InvalidMessage::Missing("image.version"));
        }
        Ok(image)
    }
}

impl From<&Image> for v1::Image {
    fn from(image: &Image) -> Self {
        Self {
            id: Some((&image.id).into()),
            digest: image.digest.0.to_vec(),
            bytes: image.bytes,
            chunk_bytes: image.chunk_bytes,
            stripes: image.stripes.into(),
            stripe_unit_bytes: image.stripe_unit_bytes,
            origins: image.origins.iter().map(Into::into).collect(),
            created_unix_ms: image.created_unix_ms,
            allocated_bytes: image.allocated_bytes,
        }
    }
}

impl TryFrom<&v1::HostInfo> for HostInfo {
    type Error = InvalidMessage;
    fn try_from(message: &v1::HostInfo) -> Result<Self, InvalidMessage> {
        let address = |field, text: &str| match text {
            "" => Ok(String::new()),
            text => Portal::new(text).map(Into::into).map_err(|e| value(field, e)),
        };
        Ok(Self {
            name: HostName::new(&message.name)?,
            instance: instance(&message.instance)?,
            agent_address: address("info.agent_address", &message.agent_address)?,
            portal: address("info.portal", &message.portal)?,
            plane: match message.plane() {
                v1::PlaneKind::Kernel => PlaneKind::Kernel,
                v1::PlaneKind::User | v1::PlaneKind::Unspecified => PlaneKind::User,
            },
            max_stripes: u16::try_from(message.max_stripes.clamp(1, MAX_STRIPES.into())).unwrap_or(1),
            labels: labels(&message.labels)?,
            version: text("info.version", &message.version)?,
            weight: message.weight.max(1),
            runs_vms: message.runs_vms,
            holds_store: message.holds_store,
        })
    }
}

fn text(field: &'static str, text: &str) -> Result<String, InvalidMessage> {
    if text.len() > MAX_LABEL_BYTES || text.chars().any(char::is_control) {
        return Err(value(
            field,
            format_args!("more than {MAX_LABEL_BYTES} bytes, or a control character"),
        ));
    }
    Ok(text.into())
}

/// An agent's instance: random text that is never compared but for equality.
///
/// # Errors
/// Empty, too long, or with a control character.
pub fn instance(message: &str) -> Result<String, InvalidMessage> {
    if message.is_empty() {
        return Err(InvalidMessage::Missing("instance"));
    }
    text("instance", message)
}

impl From<&HostInfo> for v1::HostInfo {
    fn from(info: &HostInfo) -> Self {
        Self {
            name: info.name.to_string(),
            instance: info.instance.clone(),
            agent_address: info.agent_address.clone(),
            portal: info.portal.clone(),
            plane: match info.plane {
                PlaneKind::User => v1::PlaneKind::User,
                PlaneKind::Kernel => v1::PlaneKind::Kernel,
            }
            .into(),
            max_stripes: info.max_stripes.into(),
            labels: info.labels.clone().into_iter().collect(),
            version: info.version.clone(),
            weight: info.weight,
            runs_vms: info.runs_vms,
            holds_store: info.holds_store,
        }
    }
}

impl From<PathPolicy> for v1::PathPolicy {
    fn from(policy: PathPolicy) -> Self {
        match policy {
            PathPolicy::RoundRobin => Self::RoundRobin,
            PathPolicy::ServiceTime => Self::ServiceTime,
            PathPolicy::QueueLength => Self::QueueLength,
        }
    }
}

impl From<v1::PathPolicy> for PathPolicy {
    fn from(policy: v1::PathPolicy) -> Self {
        match policy {
            v1::PathPolicy::Unspecified | v1::PathPolicy::RoundRobin => Self::RoundRobin,
            v1::PathPolicy::ServiceTime => Self::ServiceTime,
            v1::PathPolicy::QueueLength => Self::QueueLength,
        }
    }
}

impl TryFrom<&v1::Parent> for Parent {
    type Error = InvalidMessage;
    fn try_from(message: &v1::Parent) -> Result<Self, InvalidMessage> {
        Ok(Self {
            host: message.parsed_host()?,
            endpoint: Arc::new(endpoint(message.endpoint.as_ref())?),
            origin: message.origin,
            depth: message.depth,
        })
    }
}

impl From<&Parent> for v1::Parent {
    fn from(parent: &Parent) -> Self {
        Self {
            host: parent.host.as_ref().map(ToString::to_string).unwrap_or_default(),
            endpoint: Some(parent.endpoint.as_ref().into()),
            origin: parent.origin,
            depth: parent.depth,
        }
    }
}

fn parents(messages: &[v1::Parent]) -> Result<Vec<Parent>, InvalidMessage> {
    if messages.len() > MAX_PARENTS {
        return Err(value(
            "parents",
            format_args!("{} parents; the limit is {MAX_PARENTS}", messages.len()),
        ));
    }
    messages.iter().map(TryInto::try_into).collect()
}

impl TryFrom<&v1::StripePlacement> for StripePlacement {
    type Error = InvalidMessage;
    fn try_from(message: &v1::StripePlacement) -> Result<Self, InvalidMessage> {
        Ok(Self {
            stripe: stripe(message.stripe)?,
            active: parents(&message.active)?,
            fallbacks: parents(&message.fallbacks)?,
            policy: message.policy().into(),
            depth: message.depth,
        })
    }
}

impl From<&StripePlacement> for v1::StripePlacement {
    fn from(placement: &StripePlacement) -> Self {
        Self {
            stripe: placement.stripe.0.into(),
            active: placement.active.iter().map(Into::into).collect(),
            fallbacks: placement.fallbacks.iter().map(Into::into).collect(),
            policy: v1::PathPolicy::from(placement.policy).into(),
            depth: placement.depth,
        }
    }
}

impl TryFrom<&v1::Child> for Child {
    type Error = InvalidMessage;
    fn try_from(message: &v1::Child) -> Result<Self, InvalidMessage> {
        Ok(Self {
            host: HostName::new(&message.host)?,
            stripe: stripe(message.stripe)?,
            fallback: message.fallback,
        })
    }
}

impl From<&Child> for v1::Child {
    fn from(child: &Child) -> Self {
        Self {
            host: child.host.to_string(),
            stripe: child.stripe.0.into(),
            fallback: child.fallback,
        }
    }
}

fn stripes(messages: &[v1::StripePlacement]) -> Result<Vec<StripePlacement>, InvalidMessage> {
    if messages.len() > usize::from(MAX_STRIPES) {
        return Err(value(
            "stripes",
            format_args!("{} stripes; the limit is {MAX_STRIPES}", messages.len()),
        ));
    }
    messages.iter().map(TryInto::try_into).collect()
}

impl TryFrom<&v1::Placement> for Placement {
    type Error = InvalidMessage;
    fn try_from(message: &v1::Placement) -> Result<Self, InvalidMessage> {
        let image = message.image.as_ref().ok_or(InvalidMessage::Missing("image"))?;
        Ok(Self {
            image: Arc::new(image.try_into()?),
            epoch: message.epoch.ok_or(InvalidMessage::Missing("epoch"))?.into(),
            stripes: stripes(&message.stripes)?,
            children: message
                .children
                .iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl From<&Placement> for v1::Placement {
    fn from(placement: &Placement) -> Self {
        Self {
            image: Some(placement.image.as_ref().into()),
            epoch: Some(placement.epoch.into()),
            stripes: placement.stripes.iter().map(Into::into).collect(),
            children: placement.children.iter().map(Into::into).collect(),
            // Whoever tells a host of its place adds them.
            secrets: Vec::new(),
        }
    }
}

impl From<AttachState> for v1::AttachState {
    fn from(state: AttachState) -> Self {
        match state {
            AttachState::Pending => Self::Pending,
            AttachState::Ready => Self::Ready,
        }
    }
}

impl TryFrom<&v1::Attachment> for Attachment {
    type Error = InvalidMessage;
    fn try_from(message: &v1::Attachment) -> Result<Self, InvalidMessage> {
        Ok(Self {
            image: image_id(message.image.as_ref())?,
            digest: Digest::from_slice(&message.digest).map_err(|e| value("digest", e))?,
            epoch: message.epoch.unwrap_or_default().into(),
            endpoint: message.endpoint.as_ref().map(TryInto::try_into).transpose()?,
            state: match message.state() {
                v1::AttachState::Ready => AttachState::Ready,
                v1::AttachState::Pending | v1::AttachState::Unspecified => AttachState::Pending,
            },
            stripes: stripes(&message.stripes)?,
        })
    }
}

impl From<&Attachment> for v1::Attachment {
    fn from(attachment: &Attachment) -> Self {
        Self {
            image: Some((&attachment.image).into()),
            digest: attachment.digest.0.to_vec(),
            epoch: Some(attachment.epoch.into()),
            endpoint: attachment.endpoint.as_ref().map(Into::into),
            state: v1::AttachState::from(attachment.state).into(),
            stripes: attachment.stripes.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<&v1::BadParent> for BadParent {
    type Error = InvalidMessage;
    fn try_from(message: &v1::BadParent) -> Result<Self, InvalidMessage> {
        Ok(Self {
            image: image_id(message.image.as_ref())?,
            stripe: stripe(message.stripe)?,
            host: host_or_none(&message.host)?,
            portal: text("bad_parents.portal", &message.portal)?,
            fault: match message.fault() {
                v1::bad_parent::Fault::WrongBytes => Fault::WrongBytes,
                v1::bad_parent::Fault::Unreachable => Fault::Unreachable,
                v1::bad_parent::Fault::Slow => Fault::Slow,
                v1::bad_parent::Fault::Unspecified => {
                    return Err(InvalidMessage::Missing("bad_parents.fault"));
                }
            },
            count: message.count.max(1),
        })
    }
}

impl From<&BadParent> for v1::BadParent {
    fn from(bad: &BadParent) -> Self {
        Self {
            image: Some((&bad.image).into()),
            stripe: bad.stripe.0.into(),
            host: bad.host.as_ref().map(ToString::to_string).unwrap_or_default(),
            portal: bad.portal.clone(),
            fault: match bad.fault {
                Fault::WrongBytes => v1::bad_parent::Fault::WrongBytes,
                Fault::Unreachable => v1::bad_parent::Fault::Unreachable,
                Fault::Slow => v1::bad_parent::Fault::Slow,
            }
            .into(),
            count: bad.count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> v1::Image {
        v1::Image {
            id: Some(v1::ImageId {
                name: "debian".into(),
                version: 2,
            }),
            digest: vec![7; 32],
            bytes: 1 << 20,
            chunk_bytes: 65536,
            stripes: 1,
            stripe_unit_bytes: 65536,
            origins: vec![v1::Origin {
                endpoint: Some(v1::Endpoint {
                    portal: "[::1]:3260".into(),
                    target: "iqn.2026-11.dev.treeboot:image:debian:2".into(),
                    data_lun: 0,
                    hash_lun: Some(1),
                }),
                host: "origin".into(),
                labels: [("rack".to_owned(), "r 1/ü".to_owned())].into(),
            }],
            created_unix_ms: 5,
            allocated_bytes: 4096,
        }
    }

    #[test]
    fn an_image_converts_there_and_back() {
        let message = image();
        let parsed = Image::try_from(&message).unwrap();
        assert_eq!(v1::Image::from(&parsed), message);
    }

    #[test]
    fn what_is_wrong_with_an_image_is_named() {
        type Spoil = fn(&mut v1::Image);
        let cases: [(Spoil, &str); 8] = [
            (|i| i.digest.clear(), "digest"),
            (|i| i.bytes = 0, "bytes"),
            (|i| i.bytes = 513, "bytes"),
            (|i| i.chunk_bytes = 65537, "chunk_bytes"),
            (|i| i.stripe_unit_bytes = 1000, "stripe_unit_bytes"),
            (|i| i.stripes = 17, "stripe"),
            (|i| i.origins.clear(), "origins"),
            (
                |i| i.origins[0].endpoint.as_mut().unwrap().portal = "::1".into(),
                "endpoint.portal",
            ),
        ];
        for (spoil, field) in cases {
            let mut message = image();
            spoil(&mut message);
            let error = new_image(Some(&message)).unwrap_err().to_string();
            assert!(error.contains(field), "{error} should name {field}");
        }
    }

    #[test]
    fn labels_are_bounded_and_print() {
        let odd = |k: &str, v: &str| labels(&[(k.to_owned(), v.to_owned())].into());
        assert!(odd("zone", "a=b, c/ü ☃").is_ok());
        for (key, text) in [
            ("", "x"),
            ("a\n", "x"),
            ("a", "\u{1b}[2J"),
            ("a", &"x".repeat(256)),
        ] {
            assert!(odd(key, text).is_err(), "{key:?}={text:?}");
        }
    }
}
