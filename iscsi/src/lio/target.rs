//! Targets: made, changed while in use, and removed in the one order that LIO takes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use treeboot_types::Iqn;

use super::configfs::wait_until;
use super::{Act, BackstoreName, Export, Lio, LioError, Outcome, chap, is_ours};
use crate::login::Chap;
use crate::target::Access;

/// Our targets have one portal group, as LIO's own tools make it.
const GROUP: &str = "tpgt_1";

/// Commands that a session may have outstanding; as many as our sessions to others ask for.
const SESSION_COMMANDS: &str = "128";

/// Seconds of silence after which LIO pings an initiator, and until it ends the session without an answer. A host that lost
/// its power is gone from the sessions after 15 s; LIO's own values would keep it for 45 s.
const PING_AFTER: &str = "5";
const PING_ANSWER_WITHIN: &str = "10";

/// How long sessions that were ended may take to be gone: their commands end within the limits of what lies below.
const SESSIONS_END_WITHIN: Duration = Duration::from_secs(10);

/// Who may log in, as LIO has it: everybody (its "demo mode"), or those with an access list of their own.
struct Admission<'a> {
    /// For everybody; `None`: only those on the list.
    anyone: Option<Option<&'a Chap>>,
    list: BTreeMap<&'a Iqn, Option<&'a Chap>>,
}

impl<'a> Admission<'a> {
    fn of(access: &'a Access) -> Self {
        let (anyone, list) = match access {
            Access::Anyone => (Some(None), BTreeMap::new()),
            Access::Secret(chap) => (Some(Some(chap)), BTreeMap::new()),
            Access::Initiators(names) => (None, names.iter().map(|name| (name, None)).collect()),
            Access::Each(names) => (None, names.iter().map(|(n, c)| (n, c.as_ref())).collect()),
            // The kernel asks nobody: it has to be told a list.
            Access::Book(_) => (None, BTreeMap::new()),
        };
        Self { anyone, list }
    }

    /// Does the portal group ask for CHAP where a list entry says nothing else?
    fn authenticates(&self) -> bool {
        match self.anyone {
            Some(chap) => chap.is_some(),
            None => self.list.values().any(Option::is_some),
        }
    }

    fn check(&self) -> Result<(), LioError> {
        if let Some(Some(chap)) = self.anyone {
            chap::check(chap, "everybody")?;
        }
        for (name, chap) in &self.list {
            if let Some(chap) = chap {
                chap::check(chap, name.as_str())?;
            }
        }
        Ok(())
    }
}

impl Lio {
    /// Makes a target be as wanted, creating or changing it. What differs is changed while sessions go on, except that a
    /// session ends when its initiator may no longer log in, or only with another secret, and all of them end when a target for
    /// everybody becomes one for a list (LIO would go on to admit whoever it once admitted).
    ///
    /// # Errors
    /// [`LioError::Stranger`] where the name is taken by somebody else's target, [`LioError::NoBackstore`], and what the
    /// kernel refuses. What was made until then stays, and is found, mended or removed by the next call.
    pub fn ensure_target(&self, wanted: &Export) -> Result<Outcome, LioError> {
        self.check()?;
        if !is_ours(&wanted.name) {
            return Err(LioError::NotOurs(wanted.name.clone()));
        }
        let admission = Admission::of(&wanted.access);
        admission.check()?;
        let mut backstores = BTreeMap::new();
        for (lun, name) in &wanted.luns {
            let (_, path) = self.backstore_path(name).ok_or_else(|| LioError::NoBackstore {
                name: name.clone(),
                target: wanted.name.clone(),
                lun: *lun,
            })?;
            backstores.insert(*lun, (name, path));
        }
        let target = self.target_path(&wanted.name);
        self.refuse_stranger(&target)?;
        let before = self.tree.steps();
        let existed = target.is_dir();
        let group = target.join(GROUP);
        self.rebuild_if_once_open(&wanted.name, &group, &admission)?;

        self.tree
            .make(&self.fabric())
            .map_err(|error| no_module("iscsi_target_mod", error))?;
        self.tree.make(&target)?;
        self.tree.make(&group)?;
        self.set_attributes(&group, wanted, &admission)?;
        self.set_luns(&group, &backstores)?;
        self.set_list(&group, wanted, &admission)?;
        self.set_portals(&group, &wanted.portals)?;
        // Last, so that nobody logs in to half a target: until now it says "service unavailable", which initiators repeat.
        self.tree.set(&group.join("enable"), "1")?;

        Ok(match (existed, self.tree.steps() == before) {
            (false, _) => Outcome::Created,
            (true, true) => Outcome::Identity,
            (true, false) => Outcome::Changed,
        })
    }

    /// Gives whoever is on a target's list the secret that `access` has for it, while its session goes on: the secret counts from
    /// its next login on. Who is not on the list yet is for [`ensure_target`](Self::ensure_target).
    ///
    /// # Errors
    /// [`LioError::Stranger`], and what the kernel refuses.
    pub fn change_secrets(&self, name: &Iqn, access: &Access) -> Result<(), LioError> {
        let admission = Admission::of(access);
        admission.check()?;
        let target = self.target_path(name);
        let group = target.join(GROUP);
        if !group.is_dir() {
            return Ok(());
        }
        self.refuse_stranger(&target)?;
        if let Some(shared) = admission.anyone {
            self.set_chap(&group.join("auth"), shared)?;
        }
        for (initiator, chap) in &admission.list {
            let entry = group.join("acls").join(initiator.as_str());
            if entry.is_dir() {
                self.set_chap(&entry.join("auth"), *chap)?;
            }
        }
        Ok(())
    }

    fn refuse_stranger(&self, target: &Path) -> Result<(), LioError> {
        let stranger = |why| LioError::Stranger {
            path: target.to_path_buf(),
            why,
        };
        for group in self.tree.folders(target)? {
            if group.starts_with("tpgt_") && group != GROUP {
                return Err(stranger("it has another portal group than tpgt_1"));
            }
        }
        let luns = target.join(GROUP).join("lun");
        for lun in self.tree.folders(&luns)? {
            for (_, to) in self.tree.links(&luns.join(lun))? {
                if super::found::backstore_of_link(&to).is_none() {
                    return Err(stranger("one of its LUNs is a backstore of somebody else"));
                }
            }
        }
        Ok(())
    }

    /// LIO keeps an entry for everybody whom a target for everybody ever admitted, and goes on to admit them.
    fn rebuild_if_once_open(
        &self,
        name: &Iqn,
        group: &Path,
        admission: &Admission<'_>,
    ) -> Result<(), LioError> {
        let open = self.tree.read(&group.join("attrib/generate_node_acls"))?;
        if open.as_deref() == Some("1") && admission.anyone.is_none() {
            self.remove_target(name, Duration::ZERO)?;
        }
        Ok(())
    }

    fn set_attributes(
        &self,
        group: &Path,
        wanted: &Export,
        admission: &Admission<'_>,
    ) -> Result<(), LioError> {
        let bit = |on: bool| if on { "1" } else { "0" };
        let attribute = |name: &str| group.join("attrib").join(name);
        let protect = bit(!wanted.writable);
        self.tree.set(&attribute("demo_mode_write_protect"), protect)?;
        self.tree.set(&attribute("prod_mode_write_protect"), protect)?;
        let cmdsn = attribute("default_cmdsn_depth");
        self.tree.set_where_possible(&cmdsn, SESSION_COMMANDS)?;
        // New secrets end the sessions that were made with the old ones.
        let auth = group.join("auth");
        let shared = admission.anyone.flatten();
        if admission.anyone.is_some() && !self.has_chap(&auth, shared)? {
            self.tree.set(&group.join("enable"), "0")?;
        }
        self.set_chap(&auth, shared)?;
        self.tree
            .set(&attribute("authentication"), bit(admission.authenticates()))?;
        let open = bit(admission.anyone.is_some());
        self.tree.set(&attribute("generate_node_acls"), open)?;
        // Writes come with their data and without a question before each, as far as the initiator agrees.
        let parameter = |name: &str| group.join("param").join(name);
        self.tree.set_where_possible(&parameter("InitialR2T"), "No")?;
        let segment = parameter("MaxRecvDataSegmentLength");
        self.tree.set_where_possible(&segment, "262144")?;
        Ok(())
    }

    fn set_luns(
        &self,
        group: &Path,
        wanted: &BTreeMap<u16, (&BackstoreName, PathBuf)>,
    ) -> Result<(), LioError> {
        let luns = group.join("lun");
        for name in self.tree.folders(&luns)? {
            let folder = luns.join(&name);
            let lun = parse_lun(&name).ok_or_else(|| unreadable(&folder, &name))?;
            let right = wanted.get(&lun).map(|(name, _)| name.as_str());
            let links = self.tree.links(&folder)?;
            let is_right = |to: &Path| {
                to.file_name()
                    .is_some_and(|name| Some(name) == right.map(str::as_ref))
            };
            if right.is_some() && links.iter().all(|(_, to)| is_right(to)) {
                continue;
            }
            self.unmap_everywhere(group, lun)?;
            for (link, _) in links {
                self.tree.unlink(&folder.join(link))?;
            }
            self.tree.remove(&folder)?;
        }
        for (lun, (name, backstore)) in wanted {
            let folder = luns.join(format!("lun_{lun}"));
            self.tree.make(&folder)?;
            if self.tree.links(&folder)?.is_empty() {
                self.tree.link(backstore, &folder.join(name.as_str()))?;
            }
        }
        Ok(())
    }

    /// Takes a LUN out of every list entry, without which it cannot be removed.
    fn unmap_everywhere(&self, group: &Path, lun: u16) -> Result<(), LioError> {
        let list = group.join("acls");
        for initiator in self.tree.folders(&list)? {
            self.unmap(&list.join(initiator).join(format!("lun_{lun}")))?;
        }
        Ok(())
    }

    fn unmap(&self, mapped: &Path) -> Result<(), LioError> {
        for (link, _) in self.tree.links(mapped)? {
            self.tree.unlink(&mapped.join(link))?;
        }
        self.tree.remove(mapped)
    }

    fn set_list(&self, group: &Path, wanted: &Export, admission: &Admission<'_>) -> Result<(), LioError> {
        let list = group.join("acls");
        for initiator in self.tree.folders(&list)? {
            let entry = list.join(&initiator);
            let right = Iqn::new(&initiator)
                .ok()
                .and_then(|name| admission.list.get(&name).copied());
            // With another secret it is a new entry: the session of the old one ends.
            let keep = match right {
                Some(chap) => self.has_chap(&entry.join("auth"), chap)?,
                None => false,
            };
            if !keep {
                self.remove_list_entry(&entry)?;
            }
        }
        for (initiator, chap) in &admission.list {
            let entry = list.join(initiator.as_str());
            self.tree.make(&entry)?;
            self.set_chap(&entry.join("auth"), *chap)?;
            let inherited = chap.is_some() == admission.authenticates();
            let attribute = |name: &str| entry.join("attrib").join(name);
            let own = match (inherited, chap.is_some()) {
                (true, _) => "-1",
                (false, true) => "1",
                (false, false) => "0",
            };
            if inherited {
                self.tree.set_where_possible(&attribute("authentication"), own)?;
            } else {
                self.tree.set(&attribute("authentication"), own)?;
            }
            for (name, value) in [
                ("nopin_response_timeout", PING_ANSWER_WITHIN),
                ("nopin_timeout", PING_AFTER),
            ] {
                self.tree.set_where_possible(&attribute(name), value)?;
            }
            self.map_luns(group, &entry, wanted)?;
        }
        Ok(())
    }

    fn map_luns(&self, group: &Path, entry: &Path, wanted: &Export) -> Result<(), LioError> {
        let right: BTreeSet<u16> = wanted.luns.iter().map(|(lun, _)| *lun).collect();
        for name in self.tree.folders(entry)? {
            if parse_lun(&name).is_some_and(|lun| !right.contains(&lun)) {
                self.unmap(&entry.join(name))?;
            }
        }
        let protect = if wanted.writable { "0" } else { "1" };
        for lun in right {
            let name = format!("lun_{lun}");
            let mapped = entry.join(&name);
            self.tree.make(&mapped)?;
            if self.tree.links(&mapped)?.is_empty() {
                self.tree
                    .link(&group.join("lun").join(&name), &mapped.join(&name))?;
            }
            self.tree.set(&mapped.join("write_protect"), protect)?;
        }
        Ok(())
    }

    /// Ends what the initiator has and forgets it.
    fn remove_list_entry(&self, entry: &Path) -> Result<(), LioError> {
        for name in self.tree.folders(entry)? {
            if name.starts_with("lun_") {
                self.unmap(&entry.join(name))?;
            }
        }
        self.tree.remove(entry)
    }

    fn set_portals(&self, group: &Path, wanted: &[SocketAddr]) -> Result<(), LioError> {
        let portals = group.join("np");
        let mut there = BTreeSet::new();
        for name in self.tree.folders(&portals)? {
            match name.parse::<SocketAddr>() {
                Ok(address) if wanted.contains(&address) => {
                    there.insert(address);
                }
                _ => self.tree.remove(&portals.join(name))?,
            }
        }
        for address in wanted {
            if there.insert(*address) {
                self.tree.make(&portals.join(address.to_string()))?;
            }
        }
        Ok(())
    }

    /// Removes a target: it takes no new logins at once; sessions have `drain` to leave by themselves, then they are ended; then
    /// nothing of it is left. Its backstores stay. A target that is not there is no error.
    ///
    /// # Errors
    /// [`LioError::Stranger`], [`LioError::Busy`] where a command hangs below, and what the kernel refuses.
    pub fn remove_target(&self, name: &Iqn, drain: Duration) -> Result<Outcome, LioError> {
        if !is_ours(name) {
            return Err(LioError::NotOurs(name.clone()));
        }
        let target = self.target_path(name);
        if !target.is_dir() {
            return Ok(Outcome::Identity);
        }
        self.refuse_stranger(&target)?;
        let group = target.join(GROUP);
        if group.is_dir() {
            for portal in self.tree.folders(&group.join("np"))? {
                self.tree.remove(&group.join("np").join(portal))?;
            }
            self.wait_for_sessions(&target, drain)?;
            self.tree.set(&group.join("enable"), "0")?;
            if self.wait_for_sessions(&target, SESSIONS_END_WITHIN)? > 0 {
                return Err(LioError::Busy {
                    path: target,
                    waited: SESSIONS_END_WITHIN,
                });
            }
            for initiator in self.tree.folders(&group.join("acls"))? {
                self.remove_list_entry(&group.join("acls").join(initiator))?;
            }
            let luns = group.join("lun");
            for lun in self.tree.folders(&luns)? {
                for (link, _) in self.tree.links(&luns.join(&lun))? {
                    self.tree.unlink(&luns.join(&lun).join(link))?;
                }
                self.tree.remove(&luns.join(lun))?;
            }
            self.tree.remove(&group)?;
        }
        self.tree.remove(&target)?;
        Ok(Outcome::Changed)
    }

    /// Waits until a target has no sessions; how many it has then.
    fn wait_for_sessions(&self, target: &Path, limit: Duration) -> Result<u64, LioError> {
        let mut last = Ok(0);
        let gone = wait_until(limit, || {
            last = self.session_count(target);
            // An error ends the waiting as well.
            (!matches!(last, Ok(1..))).then_some(())
        });
        match gone {
            Some(()) | None => last,
        }
    }

    fn session_count(&self, target: &Path) -> Result<u64, LioError> {
        let path = target.join("fabric_statistics/iscsi_instance/sessions");
        let text = self.tree.read(&path)?.unwrap_or_else(|| "0".into());
        text.parse().map_err(|_| LioError::Unreadable { path, text })
    }
}

fn unreadable(path: &Path, text: &str) -> LioError {
    LioError::Unreadable {
        path: path.into(),
        text: text.into(),
    }
}

fn no_module(module: &'static str, error: LioError) -> LioError {
    match error {
        LioError::Refused {
            act: Act::Make,
            source,
            ..
        } => LioError::NoModule {
            module,
            source: Some(source),
        },
        other => other,
    }
}

/// `lun_7`
pub(super) fn parse_lun(name: &str) -> Option<u16> {
    name.strip_prefix("lun_")?.parse().ok()
}
