//! Which hosts and which people may use an image: labels of images, kept beside the record.
//!
//! Two labels say it, all others are for people: `hosts`, what a host must be (`tier=gold,zone=a|b`: each KEY one of its values; the
//! key `name` is the host's name, which its certificate proves, while other labels are the host's own word), and `role`, the least
//! role that sees it. They are of a name, for all its versions, and may be there before the image is. Deliberately absent: the trees,
//! which know nothing of it; a host that may not use an image does not get into them.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::RwLock;
use treeboot_identity::{Role, files};
use treeboot_types::{HostName, ImageName, Labels};

/// The file in the state directory.
const FILE: &str = "image-labels.json";
/// Which hosts.
pub const HOSTS: &str = "hosts";
/// The least role.
pub const ROLE: &str = "role";

/// Why labels are not taken.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The file.
    #[error("cannot read or write the labels of images in {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It holds something else. Nothing is guessed: a rule that is lost would let in whom it kept out.
    #[error("{} is damaged: {why}; mend it, or remove it to let everybody use every image", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The value of one of the two.
    #[error("'{label}={value}' is no rule: {why}")]
    Rule {
        /// Which.
        label: &'static str,
        /// As given.
        value: String,
        /// What would do.
        why: &'static str,
    },
}

/// Somebody may not use an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied(String);

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The labels of all images.
#[derive(Debug, Default)]
pub struct Rules {
    /// `None`: in memory only.
    path: Option<PathBuf>,
    images: RwLock<BTreeMap<ImageName, Labels>>,
}

/// A label's key, and the values that will do.
type Condition<'a> = (&'a str, Vec<&'a str>);

/// `KEY=VALUE|VALUE,...`
fn conditions(text: &str) -> Option<Vec<Condition<'_>>> {
    text.split(',').map(condition).collect()
}

fn condition(text: &str) -> Option<Condition<'_>> {
    let (key, values) = text.trim().split_once('=')?;
    let values: Vec<&str> = values.split('|').map(str::trim).collect();
    (!key.is_empty() && values.iter().all(|value| !value.is_empty())).then_some((key, values))
}

fn check(labels: &Labels) -> Result<(), RulesError> {
    let wrong = |label, value: &String, why| {
        Err(RulesError::Rule {
            label,
            value: value.clone(),
            why,
        })
    };
    match labels.get(HOSTS) {
        Some(value) if conditions(value).is_none() => {
            return wrong(
                HOSTS,
                value,
                "write KEY=VALUE|VALUE, several with commas, for instance tier=gold,zone=a|b",
            );
        }
        _ => {}
    }
    match labels.get(ROLE) {
        Some(value) if value.parse::<Role>().is_err() => {
            wrong(ROLE, value, "roles are viewer, operator and admin")
        }
        _ => Ok(()),
    }
}

impl Rules {
    /// The labels in the coordinator's state directory.
    ///
    /// # Errors
    /// [`RulesError`].
    pub fn open(state: &Path) -> Result<Self, RulesError> {
        let path = state.join(FILE);
        let text = match files::read_if_there(&path) {
            Ok(text) => text,
            Err(source) => return Err(RulesError::File { path, source }),
        };
        let damaged = |why: String| RulesError::Damaged {
            path: path.clone(),
            why,
        };
        let images: BTreeMap<ImageName, Labels> = match text {
            None => BTreeMap::new(),
            Some(text) => serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?,
        };
        for labels in images.values() {
            check(labels).map_err(|error| damaged(error.to_string()))?;
        }
        Ok(Self {
            path: Some(path),
            images: RwLock::new(images),
        })
    }

    /// The labels of an image.
    pub fn labels(&self, image: &ImageName) -> Labels {
        self.images.read().get(image).cloned().unwrap_or_default()
    }

    /// Sets and removes labels, and makes them durable. Blocks for a moment.
    ///
    /// # Errors
    /// [`RulesError`]; nothing changed then.
    pub fn change(&self, image: &ImageName, set: Labels, remove: &[String]) -> Result<Labels, RulesError> {
        let mut images = self.images.write();
        let mut labels = images.get(image).cloned().unwrap_or_default();
        labels.retain(|key, _| !remove.contains(key));
        labels.extend(set);
        check(&labels)?;
        let mut after = images.clone();
        if labels.is_empty() {
            after.remove(image);
        } else {
            after.insert(image.clone(), labels.clone());
        }
        if let Some(path) = &self.path {
            let text = serde_json::to_vec_pretty(&after).map_err(io::Error::other);
            let written = text.and_then(|text| files::write_private(path, &text));
            written.map_err(|source| RulesError::File {
                path: path.clone(),
                source,
            })?;
        }
        *images = after;
        Ok(labels)
    }

    /// Whether it matters which host asks.
    pub fn names_hosts(&self, image: &ImageName) -> bool {
        let images = self.images.read();
        images.get(image).is_some_and(|labels| labels.contains_key(HOSTS))
    }

    /// Whether a host of these labels may use an image.
    ///
    /// # Errors
    /// Why not.
    pub fn host(&self, image: &ImageName, host: &HostName, own: &Labels) -> Result<(), Denied> {
        let images = self.images.read();
        let Some(rule) = images.get(image).and_then(|labels| labels.get(HOSTS)) else {
            return Ok(());
        };
        let holds = |(key, values): Condition<'_>| match key {
            "name" => values.contains(&host.as_str()),
            key => own.get(key).is_some_and(|value| values.contains(&value.as_str())),
        };
        // What was taken can be read; were it not so, nobody would be let in.
        if conditions(rule).is_some_and(|all| all.into_iter().all(holds)) {
            return Ok(());
        }
        Err(Denied(format!(
            "the image '{image}' is for hosts with {rule}, and host '{host}' is not one; see 'treeboot image show {image}'"
        )))
    }

    /// Whether a role may use an image.
    ///
    /// # Errors
    /// Why not.
    pub fn role(&self, image: &ImageName, role: Role) -> Result<(), Denied> {
        let images = self.images.read();
        let least = images.get(image).and_then(|labels| labels.get(ROLE));
        match least.and_then(|least| least.parse::<Role>().ok()) {
            Some(least) if role < least => Err(Denied(format!(
                "the image '{image}' is for the role {least}; this is the role {role}"
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    #[test]
    fn an_image_is_for_the_hosts_and_roles_that_its_labels_name() {
        let dir = tempfile::tempdir().unwrap();
        let image = ImageName::new("debian").unwrap();
        let host = HostName::new("h1").unwrap();
        let rules = Rules::open(dir.path()).unwrap();
        assert!(rules.host(&image, &host, &labels(&[])).is_ok());
        let set = labels(&[
            ("hosts", "tier=gold, zone=a|b"),
            ("role", "operator"),
            ("note", "x"),
        ]);
        rules.change(&image, set, &[]).unwrap();
        let rules = Rules::open(dir.path()).unwrap();
        for (own, may) in [
            (labels(&[]), false),
            (labels(&[("tier", "gold")]), false),
            (labels(&[("tier", "gold"), ("zone", "b")]), true),
            (labels(&[("tier", "gold"), ("zone", "c")]), false),
        ] {
            assert_eq!(rules.host(&image, &host, &own).is_ok(), may, "{own:?}");
        }
        assert!(rules.role(&image, Role::Viewer).is_err());
        assert!(rules.role(&image, Role::Operator).is_ok());
        rules
            .change(&image, labels(&[("hosts", "name=h2|h1")]), &["role".into()])
            .unwrap();
        assert!(rules.host(&image, &host, &labels(&[])).is_ok());
        assert!(
            rules
                .host(&image, &HostName::new("h3").unwrap(), &labels(&[("name", "h1")]))
                .is_err()
        );
        assert!(rules.role(&image, Role::Viewer).is_ok());
    }

    #[test]
    fn what_is_no_rule_is_refused_and_a_damaged_file_lets_nobody_guess() {
        let dir = tempfile::tempdir().unwrap();
        let image = ImageName::new("debian").unwrap();
        let rules = Rules::open(dir.path()).unwrap();
        for (key, value) in [
            ("hosts", ""),
            ("hosts", "gold"),
            ("hosts", "tier="),
            ("hosts", "a=b,,c=d"),
            ("role", "boss"),
        ] {
            assert!(
                rules.change(&image, labels(&[(key, value)]), &[]).is_err(),
                "{key}={value}"
            );
        }
        assert!(rules.labels(&image).is_empty());
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(matches!(Rules::open(dir.path()), Err(RulesError::Damaged { .. })));
    }
}
