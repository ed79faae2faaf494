//! What a seed stands for: a fleet, a policy, a network, and a list of faults. Drawn once, before anything runs, so that a fault can be
//! left out without changing the others.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use treeboot_coordinator::tree::{KAry, Policy, Settings, Striped};
use treeboot_types::PathPolicy;

use super::chance::Chance;
use super::racks::Stand;

/// How often a host beats.
pub const BEAT_MS: u64 = 1_000;
/// The coordinator's default for so many beats.
pub const LEASE_MS: u64 = 8 * BEAT_MS;
/// The coordinator's default for so many beats.
pub const PENDING_MS: u64 = 5 * BEAT_MS;
/// Faults happen in this time only.
pub const FAULTS_MS: u64 = 30_000;

/// What goes wrong, or what people do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// An agent dies and starts again; with `power` what its journal had not synced is gone.
    Crash {
        /// Whose.
        host: usize,
        /// For how long.
        ms: u64,
        /// The machine's power went too.
        power: bool,
    },
    /// A machine dies for good.
    Die {
        /// Which.
        host: usize,
    },
    /// People end a host's attachment, and take it up again after some time where that is not 0.
    Detach {
        /// Whose.
        host: usize,
        /// Until it attaches again; 0: never.
        ms: u64,
    },
    /// A host is taken out of the fleet: its agent ends and the coordinator is told.
    Leave {
        /// Who.
        host: usize,
    },
    /// These hosts and the coordinator do not reach each other.
    Cut {
        /// Who.
        hosts: Vec<usize>,
        /// For how long.
        ms: u64,
    },
    /// These hosts and the others do not reach each other.
    Split {
        /// Who.
        hosts: Vec<usize>,
        /// For how long.
        ms: u64,
    },
    /// A host's stream breaks.
    Break {
        /// Whose.
        host: usize,
    },
    /// A host finds that one of its parents ships wrong bytes.
    WrongBytes {
        /// Who finds it.
        host: usize,
    },
    /// The coordinator dies at one of its next writes.
    DieAtWrite {
        /// Which of them, from 0.
        write: u64,
        /// Before the record has it, or after.
        before: bool,
        /// Until it is started again.
        ms: u64,
    },
    /// The coordinator stands still.
    Pause {
        /// For how long.
        ms: u64,
    },
    /// The record's disk is full.
    Full {
        /// For how long.
        ms: u64,
    },
}

/// A fault at its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// In milliseconds of virtual time.
    pub at: u64,
    /// What.
    pub kind: Kind,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {} ms: {:?}", self.at, self.kind)
    }
}

/// One host as it begins.
#[derive(Debug, Clone)]
pub struct Member {
    /// When it is switched on.
    pub boots: u64,
    /// When people want the image on it.
    pub wants: u64,
    /// Its share of slots.
    pub weight: u32,
    /// It cannot read stripes apart.
    pub whole: bool,
    /// A VM stands on the image there; otherwise it is pinned.
    pub vm: bool,
    /// Its zone and rack.
    pub stand: Stand,
}

/// What labels the hosts of a fleet have.
#[derive(Clone, Copy)]
enum Labelled {
    Not,
    Racks,
    Zones,
}

impl Labelled {
    fn stand(self, chance: &mut Chance, racks: usize) -> Stand {
        let rack = Some(chance.one_of(racks) as u16);
        let zone = Some(chance.one_of(3) as u16);
        // A few hosts stand in no rack, or in no zone.
        let is_lone = chance.permille(60);
        match self {
            Self::Racks if !is_lone => Stand { zone: None, rack },
            Self::Zones if is_lone => {
                [Stand { zone, rack: None }, Stand { zone: None, rack }][chance.one_of(2)]
            }
            Self::Zones => Stand { zone, rack },
            Self::Not | Self::Racks => Stand::default(),
        }
    }
}

/// How messages travel.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    /// Longest usual delay in milliseconds.
    pub delay: u64,
    /// So many in a thousand take much longer.
    pub late: u64,
    /// So many calls in a thousand come twice.
    pub doubled: u64,
    /// So many messages in a thousand are lost, and their stream with them.
    pub lost: u64,
    /// Messages of one stream overtake each other.
    pub reorders: bool,
}

/// All that a seed stands for.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// The seed.
    pub seed: u64,
    /// How trees are kept.
    pub settings: Settings,
    /// For people.
    pub policy_name: String,
    /// The hosts.
    pub members: Vec<Member>,
    /// Foreign origins.
    pub foreign_origins: usize,
    /// An agent with a store is an origin too.
    pub store_origin: bool,
    /// How messages travel.
    pub network: Network,
    /// By time.
    pub faults: Vec<Fault>,
}

impl Scenario {
    /// Draws it.
    #[must_use]
    pub fn new(seed: u64, hosts: usize) -> Self {
        let mut chance = Chance::new(seed, 1);
        let (policy, policy_name): (Arc<dyn Policy>, String) = match chance.one_of(6) {
            0 => (Arc::new(KAry { fan_out: 2 }), "binary".into()),
            1 => {
                let fan_out = chance.within(3, 6) as u32;
                (Arc::new(KAry { fan_out }), format!("k-ary of {fan_out}"))
            }
            2 => (Arc::new(Striped { stripes: 3 }), "striped in 3".into()),
            _ => (Arc::new(Striped { stripes: 2 }), "striped in 2".into()),
        };
        let active_parents = if chance.permille(250) { 2 } else { 1 };
        let settings = Settings {
            policy,
            active_parents,
            path_policy: PathPolicy::RoundRobin,
            beat_ms: BEAT_MS,
            lease_ms: LEASE_MS,
            pending_lease_ms: PENDING_MS,
        };
        let reorders = chance.permille(300);
        let network = Network {
            delay: [2, 10, 40][chance.one_of(3)],
            late: if reorders {
                100
            } else {
                [0, 5, 20][chance.one_of(3)]
            },
            doubled: [0, 50][chance.one_of(2)],
            lost: [0, 0, 1][chance.one_of(3)],
            reorders,
        };
        // Most of the fleet comes; in some seeds few do, because small trees have cases of their own.
        let coming = if chance.permille(250) {
            chance.within(1, hosts as u64 + 1) as usize
        } else {
            hosts
        };
        let labelled = [Labelled::Not, Labelled::Racks, Labelled::Racks, Labelled::Zones][chance.one_of(4)];
        let racks = [3, 8, 20][chance.one_of(3)].min(1 + coming / 4);
        let burst = chance.permille(500);
        let odd = chance.permille(300);
        let members: Vec<Member> = (0..coming)
            .map(|_| {
                let boots = chance.within(0, 500);
                let spread = if burst { 500 } else { FAULTS_MS / 2 };
                Member {
                    boots,
                    wants: boots + chance.within(0, spread),
                    weight: if odd && chance.permille(200) { 2 } else { 1 },
                    whole: odd && chance.permille(100),
                    vm: chance.permille(300),
                    stand: labelled.stand(&mut chance, racks),
                }
            })
            .collect();
        let store_origin = chance.permille(300);
        let foreign_origins = if store_origin {
            chance.one_of(2)
        } else {
            1 + chance.one_of(2)
        };
        let mut faults = faults(&mut chance, &members);
        faults.sort_by_key(|fault| fault.at);
        Self {
            seed,
            settings,
            policy_name: format!("{policy_name}, {active_parents} active"),
            members,
            foreign_origins,
            store_origin,
            network,
            faults,
        }
    }
}

impl Scenario {
    /// The same without the faults of these numbers.
    #[must_use]
    pub fn leave_out(mut self, without: &BTreeSet<usize>) -> Self {
        let mut number = 0;
        self.faults.retain(|_| {
            number += 1;
            !without.contains(&(number - 1))
        });
        self
    }
}

fn faults(chance: &mut Chance, members: &[Member]) -> Vec<Fault> {
    let hosts = members.len();
    let mut faults = Vec::new();
    let some = |chance: &mut Chance| -> Vec<usize> {
        if chance.permille(500) {
            // A rack.
            let rack = members[chance.one_of(hosts)].stand;
            (0..hosts).filter(|&h| members[h].stand == rack).collect()
        } else {
            let count = 1 + chance.one_of(hosts.min(12));
            (0..count).map(|_| chance.one_of(hosts)).collect()
        }
    };
    // In some seeds the coordinator's own faults are left out, so that what hosts do is seen for itself.
    let coordinator = chance.permille(600);
    let count = 4 + chance.one_of(10 + hosts.min(60) / 2);
    for _ in 0..count {
        let host = chance.one_of(hosts);
        let kind = match chance.one_of(if coordinator { 26 } else { 20 }) {
            0..=2 => Kind::Crash {
                host,
                ms: chance.within(200, 14_000),
                power: chance.permille(300),
            },
            3..=4 => Kind::Die { host },
            5..=8 => Kind::Detach {
                host,
                ms: if chance.permille(600) {
                    chance.within(1, 6_000)
                } else {
                    0
                },
            },
            9 => Kind::Leave { host },
            10..=12 => Kind::Cut {
                hosts: some(chance),
                ms: chance.within(100, 16_000),
            },
            13..=14 => Kind::Split {
                hosts: some(chance),
                ms: chance.within(100, 12_000),
            },
            15..=16 => Kind::Break { host },
            17..=19 => Kind::WrongBytes { host },
            20..=22 => Kind::DieAtWrite {
                write: chance.within(0, 6),
                before: chance.permille(500),
                ms: chance.within(50, 6_000),
            },
            23..=24 => Kind::Pause {
                ms: chance.within(100, 20_000),
            },
            _ => Kind::Full {
                ms: chance.within(100, 5_000),
            },
        };
        faults.push(Fault {
            at: chance.within(300, FAULTS_MS),
            kind,
        });
    }
    // Sometimes most of the fleet ends at once: what is left must be well placed too.
    if chance.permille(150) {
        let at = chance.within(8_000, FAULTS_MS);
        for host in 0..hosts {
            if chance.permille(850) {
                let at = at + chance.within(0, 2_000);
                faults.push(Fault {
                    at: at.min(FAULTS_MS),
                    kind: Kind::Detach { host, ms: 0 },
                });
            }
        }
    }
    faults
}
