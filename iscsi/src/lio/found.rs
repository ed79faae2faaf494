//! What of ours LIO holds, read from configfs.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use treeboot_types::Iqn;

use super::backstore::Kind;
use super::target::parse_lun;
use super::{Backing, BackstoreName, Lio, LioError, is_ours};

/// All of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Targets, by name.
    pub targets: Vec<FoundTarget>,
    /// Backstores, by name.
    pub backstores: Vec<FoundBackstore>,
}

/// A target, whole or half-made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundTarget {
    /// Its name.
    pub name: Iqn,
    /// Does it take logins?
    pub enabled: bool,
    /// Where it listens.
    pub portals: Vec<SocketAddr>,
    /// Its LUNs, ascending.
    pub luns: Vec<FoundLun>,
    /// Who is on its list.
    pub initiators: BTreeSet<Iqn>,
    /// May others log in too?
    pub anyone: bool,
    /// Who has a session, by name; once for each session where everybody is let in, once for all where there is a list.
    pub sessions: Vec<Iqn>,
}

/// A LUN of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundLun {
    /// Its number.
    pub lun: u16,
    /// What it shows; `None`: it is half-made.
    pub backstore: Option<BackstoreName>,
}

/// A backstore, whole or half-made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundBackstore {
    /// Its name.
    pub name: BackstoreName,
    /// What it has opened; `None`: nothing yet.
    pub backing: Option<Backing>,
    /// May the device be written? A file always may, by LIO.
    pub writable: bool,
}

/// The backstore of ours that a LUN's link leads to: `…/core/HBA/NAME`. `None`: it is somebody else's.
pub(super) fn backstore_of_link(to: &Path) -> Option<BackstoreName> {
    let mut parts = to.components().rev().map(|part| part.as_os_str().to_str());
    let name = parts.next()??;
    let hba = parts.next()??;
    if parts.next()?? != "core" || !Kind::ALL.iter().any(|kind| kind.hba() == hba) {
        return None;
    }
    BackstoreName::parse(name).ok()
}

impl Lio {
    /// Everything that bears all of our marks. Where LIO is not even loaded there is nothing.
    ///
    /// # Errors
    /// [`LioError`] where configfs cannot be read, or an attribute is not understood.
    pub fn found(&self) -> Result<Found, LioError> {
        Ok(Found {
            targets: self.found_targets()?,
            backstores: self.found_backstores()?,
        })
    }

    fn found_targets(&self) -> Result<Vec<FoundTarget>, LioError> {
        let mut targets = Vec::new();
        for name in self.tree.folders(&self.fabric())? {
            let Some(name) = Iqn::new(&name)
                .ok()
                .filter(|iqn| iqn.as_str() == name && is_ours(iqn))
            else {
                continue;
            };
            if let Some(target) = self.found_target(name)? {
                targets.push(target);
            }
        }
        Ok(targets)
    }

    /// `None`: it is somebody else's.
    fn found_target(&self, name: Iqn) -> Result<Option<FoundTarget>, LioError> {
        let target = self.target_path(&name);
        let groups = self.tree.folders(&target)?;
        if groups
            .iter()
            .any(|name| name.starts_with("tpgt_") && name != "tpgt_1")
        {
            return Ok(None);
        }
        let group = target.join("tpgt_1");
        let is_set = |attribute: &str| -> Result<bool, LioError> {
            Ok(self.tree.read(&group.join(attribute))?.as_deref() == Some("1"))
        };
        let mut luns = Vec::new();
        for folder in self.tree.folders(&group.join("lun"))? {
            let Some(lun) = parse_lun(&folder) else {
                continue;
            };
            let links = self.tree.links(&group.join("lun").join(&folder))?;
            let backstore = match links.first() {
                None => None,
                Some((_, to)) => match backstore_of_link(to) {
                    None => return Ok(None),
                    ours => ours,
                },
            };
            luns.push(FoundLun { lun, backstore });
        }
        luns.sort_by_key(|lun| lun.lun);
        let portals = self.tree.folders(&group.join("np"))?;
        let list = self.tree.folders(&group.join("acls"))?;
        Ok(Some(FoundTarget {
            enabled: is_set("enable")?,
            portals: portals.iter().filter_map(|portal| portal.parse().ok()).collect(),
            luns,
            initiators: list.iter().filter_map(|name| Iqn::new(name).ok()).collect(),
            anyone: is_set("attrib/generate_node_acls")?,
            sessions: self.initiators_of(&group)?,
            name,
        }))
    }

    /// Who has a session.
    fn initiators_of(&self, group: &Path) -> Result<Vec<Iqn>, LioError> {
        let mut names = Vec::new();
        for initiator in self.tree.folders(&group.join("acls"))? {
            let info = group.join("acls").join(&initiator).join("info");
            let text = self.tree.read(&info)?.unwrap_or_default();
            // The first line is either the initiator's name or a sentence that there is no session.
            if text.starts_with("InitiatorName:") {
                names.extend(Iqn::new(&initiator));
            }
        }
        let dynamic = self
            .tree
            .read(&group.join("dynamic_sessions"))?
            .unwrap_or_default();
        let dynamic = dynamic.split(['\n', '\0']).map(str::trim);
        names.extend(dynamic.filter_map(|name| Iqn::new(name).ok()));
        names.sort();
        Ok(names)
    }

    fn found_backstores(&self) -> Result<Vec<FoundBackstore>, LioError> {
        let mut backstores = Vec::new();
        for kind in Kind::ALL {
            let hba = self.hba_path(kind);
            for name in self.tree.folders(&hba)? {
                let Ok(parsed) = BackstoreName::parse(&name) else {
                    continue;
                };
                let opened = self.opened(kind, &hba.join(&name))?;
                backstores.push(FoundBackstore {
                    name: parsed,
                    writable: opened
                        .as_ref()
                        .is_none_or(|opened| opened.writable.unwrap_or(true)),
                    backing: opened.map(|opened| opened.backing),
                });
            }
        }
        backstores.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(backstores)
    }

    /// The targets, anybody's, that export a backstore.
    pub(super) fn exporters(&self, name: &BackstoreName) -> Result<Vec<String>, LioError> {
        let mut exporters = Vec::new();
        for target in self.tree.folders(&self.fabric())? {
            let path = self.fabric().join(&target);
            for group in self.tree.folders(&path)? {
                let luns = path.join(group).join("lun");
                for lun in self.tree.folders(&luns)? {
                    let links = self.tree.links(&luns.join(lun))?;
                    let exports = links
                        .iter()
                        .any(|(_, to)| backstore_of_link(to).as_ref() == Some(name));
                    if exports && exporters.last() != Some(&target) {
                        exporters.push(target.clone());
                    }
                }
            }
        }
        Ok(exporters)
    }
}
