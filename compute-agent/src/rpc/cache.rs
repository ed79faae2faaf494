//! The cache group in messages.

use std::path::PathBuf;

use tonic::Status;
use treeboot_block::{MemberReport, MemberSpec, MemberState};
use treeboot_proto::{image_id_or_newest, v1};

use super::invalid;
use crate::host::{CacheChange, CacheView, CachedImage};

/// The least of a digest that names an image.
const MIN_DIGEST_DIGITS: usize = 8;

pub(super) fn report(view: CacheView) -> v1::CacheReport {
    let CacheView { group, names } = view;
    let images = group
        .images
        .iter()
        .zip(names)
        .map(|(image, names)| v1::CachedImage {
            digest: image.digest.0.to_vec(),
            images: names.iter().map(Into::into).collect(),
            bytes: image.bytes,
            cached_bytes: image.cached_bytes,
            pinned: image.pinned,
            used: image.used,
            last_use_unix_ms: image.last_use_unix_ms,
        });
    v1::CacheReport {
        images: images.collect(),
        members: group.members.iter().map(member).collect(),
        hits: group.hits,
        misses: group.misses,
        evictions: group.evictions,
        evicted_bytes: group.evicted_bytes,
    }
}

pub(super) fn member(member: &MemberReport) -> v1::CacheMember {
    let (state, why) = match &member.state {
        MemberState::Working => (v1::CacheMemberState::Working, ""),
        MemberState::Full => (v1::CacheMemberState::Full, ""),
        MemberState::Failed(why) => (v1::CacheMemberState::Failed, why.as_str()),
    };
    v1::CacheMember {
        directory: member.path.display().to_string(),
        budget_bytes: member.budget.unwrap_or(0),
        used_bytes: member.used_bytes,
        state: state.into(),
        why: why.into(),
        hits: member.hits,
    }
}

fn directory(path: &str) -> Result<PathBuf, Status> {
    let path = PathBuf::from(path);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(invalid(format_args!(
            "'{}' is no absolute path of a directory of the host",
            path.display()
        ))),
    }
}

pub(super) fn change(request: v1::ChangeCacheRequest) -> Result<CacheChange, Status> {
    use v1::change_cache_request::Change;
    match request.change {
        Some(Change::Add(add)) => Ok(CacheChange::Add(MemberSpec {
            path: directory(&add.directory)?,
            budget: (add.budget_bytes > 0).then_some(add.budget_bytes),
        })),
        Some(Change::Remove(remove)) => Ok(CacheChange::Remove {
            path: directory(&remove.directory)?,
            keep_files: remove.keep_files,
        }),
        None => Err(invalid("nothing is to be added or removed")),
    }
}

pub(super) fn image(image: Option<v1::ImageId>, digest: String) -> Result<CachedImage, Status> {
    if digest.is_empty() {
        return Ok(CachedImage::Named(
            image_id_or_newest(image.as_ref()).map_err(invalid)?,
        ));
    }
    let sound = digest.len() >= MIN_DIGEST_DIGITS && digest.chars().all(|digit| digit.is_ascii_hexdigit());
    match sound {
        true => Ok(CachedImage::Digest(digest.to_ascii_lowercase())),
        false => Err(invalid(format_args!(
            "a digest is named by {MIN_DIGEST_DIGITS} or more hexadecimal digits"
        ))),
    }
}
