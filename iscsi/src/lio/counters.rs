//! What a target shipped, by LIO's own counters.

use std::path::Path;

use treeboot_types::Iqn;

use super::target::parse_lun;
use super::{Lio, LioError};

/// What a target did since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TargetCounters {
    /// For each LUN, ascending.
    pub luns: Vec<LunCounters>,
    /// For each initiator on the list that has a session.
    pub sessions: Vec<SessionCounters>,
    /// Sessions of this moment.
    pub session_count: u64,
}

/// What a LUN did since it was made. LIO counts in whole MiB, rounded down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LunCounters {
    /// The LUN.
    pub lun: u16,
    /// MiB read by initiators.
    pub read_mib: u64,
    /// MiB written by initiators.
    pub written_mib: u64,
    /// SCSI commands.
    pub commands: u64,
}

/// What the session of an initiator did, exactly; it begins anew with each session. LIO keeps this for initiators on the list only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionCounters {
    /// Who.
    pub initiator: Iqn,
    /// Bytes of data sent to it.
    pub read_bytes: u64,
    /// Bytes of data received from it.
    pub written_bytes: u64,
    /// SCSI commands.
    pub commands: u64,
}

impl Lio {
    /// A target's counters; `None`: there is no such target.
    ///
    /// # Errors
    /// [`LioError`] where a counter cannot be read.
    pub fn counters(&self, name: &Iqn) -> Result<Option<TargetCounters>, LioError> {
        let target = self.target_path(name);
        let group = target.join("tpgt_1");
        if !group.is_dir() {
            return Ok(None);
        }
        let mut counters = TargetCounters {
            session_count: self.number(&target.join("fabric_statistics/iscsi_instance/sessions"))?,
            ..TargetCounters::default()
        };
        for folder in self.tree.folders(&group.join("lun"))? {
            let Some(lun) = parse_lun(&folder) else {
                continue;
            };
            let port = group.join("lun").join(&folder).join("statistics/scsi_tgt_port");
            counters.luns.push(LunCounters {
                lun,
                read_mib: self.number(&port.join("read_mbytes"))?,
                written_mib: self.number(&port.join("write_mbytes"))?,
                commands: self.number(&port.join("in_cmds"))?,
            });
        }
        counters.luns.sort_by_key(|lun| lun.lun);
        for folder in self.tree.folders(&group.join("acls"))? {
            let Ok(initiator) = Iqn::new(&folder) else {
                continue;
            };
            let session = group
                .join("acls")
                .join(&folder)
                .join("fabric_statistics/iscsi_sess_stats");
            // Without a session these attributes are empty.
            if self
                .tree
                .read(&session.join("cmd_pdus"))?
                .is_some_and(|text| !text.is_empty())
            {
                counters.sessions.push(SessionCounters {
                    initiator,
                    read_bytes: self.number(&session.join("txdata_octs"))?,
                    written_bytes: self.number(&session.join("rxdata_octs"))?,
                    commands: self.number(&session.join("cmd_pdus"))?,
                });
            }
        }
        Ok(Some(counters))
    }

    /// An attribute that is a number; 0 where it is absent or empty.
    fn number(&self, path: &Path) -> Result<u64, LioError> {
        let text = self.tree.read(path)?.unwrap_or_default();
        if text.is_empty() {
            return Ok(0);
        }
        text.parse().map_err(|_| LioError::Unreadable {
            path: path.into(),
            text,
        })
    }
}
