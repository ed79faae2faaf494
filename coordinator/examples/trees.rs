//! Measures the trees alone, without a network and a store: depth, links into racks, hosts moved and time, for each policy.
//! `cargo run --release -p treeboot-coordinator --example trees`; with `-- burst` only what many joins at once take.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use treeboot_coordinator::tree::{
    Beat, Call, CallId, Effect, Event, Forest, HostState, KAry, Note, Policy, Settings, Speaker, StreamId,
    Striped,
};
use treeboot_types::{
    Digest, Endpoint, HostInfo, HostName, Image, ImageId, ImageRef, Iqn, Labels, Origin, PathPolicy,
    PlaneKind, Portal, Tick,
};

const HOSTS: usize = 1_000;
const TURNS: usize = 10_000;
const RACKS: usize = 20;
const BURST: usize = 10_000;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!(
        "| policy | racks | depth at first | deepest in {TURNS} turns | links into racks | moved a leave | most moved | us a leave and join |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let policies: [(&str, Arc<dyn Policy>); 3] = [
        ("binary", Arc::new(KAry { fan_out: 2 })),
        ("k-ary 4", Arc::new(KAry { fan_out: 4 })),
        ("striped 2", Arc::new(Striped { stripes: 2 })),
    ];
    let only_burst = std::env::args().any(|argument| argument == "burst");
    for (name, policy) in policies.iter().filter(|_| !only_burst) {
        for racks in [0, RACKS] {
            churn(name, policy, racks)?;
        }
    }
    println!("\n| policy | racks | joins at once | time | depth |\n| --- | --- | --- | --- | --- |");
    for (name, policy) in &policies {
        for racks in [0, BURST / 50] {
            let mut fleet = Fleet::new(policy.clone(), racks)?;
            (0..BURST).try_for_each(|n| fleet.come(n))?;
            let began = Instant::now();
            (0..BURST).try_for_each(|n| fleet.join(n))?;
            let took = began.elapsed();
            println!(
                "| {name} | {racks} | {BURST} | {} ms | {} |",
                took.as_millis(),
                fleet.look()?.0
            );
        }
    }
    Ok(())
}

fn churn(name: &str, policy: &Arc<dyn Policy>, racks: usize) -> Result<(), Failure> {
    let mut fleet = Fleet::new(policy.clone(), racks)?;
    for n in 0..HOSTS {
        fleet.come(n)?;
        fleet.join(n)?;
    }
    let (at_first, mut links) = fleet.look()?;
    let (mut deepest, mut moved, mut most) = (at_first, 0, 0);
    let (mut dice, mut spent) = (1u64, Duration::ZERO);
    for turn in 0..TURNS {
        dice = dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let leaver = usize::try_from(dice >> 33)? % HOSTS;
        let began = Instant::now();
        let by_leave = fleet.leave(leaver)?;
        fleet.come(leaver)?;
        fleet.join(leaver)?;
        spent += began.elapsed();
        moved += by_leave;
        most = most.max(by_leave);
        if turn % 50 == 0 || turn + 1 == TURNS {
            let (depth, now) = fleet.look()?;
            deepest = deepest.max(depth);
            links = links.max(now);
        }
    }
    let links = if racks == 0 {
        "-".into()
    } else {
        format!("{links} a rack and stripe")
    };
    let each = f64::from(u32::try_from(moved)?) / f64::from(u32::try_from(TURNS)?);
    let micros = spent.as_micros() / u128::try_from(TURNS)?;
    println!("| {name} | {racks} | {at_first} | {deepest} | {links} | {each:.2} | {most} | {micros} |");
    Ok(())
}

/// Hosts that do as they are told.
struct Fleet {
    forest: Forest,
    racks: usize,
    next: u64,
    effects: Vec<Effect>,
}

impl Fleet {
    fn new(policy: Arc<dyn Policy>, racks: usize) -> Result<Self, Failure> {
        let settings = Settings {
            policy,
            active_parents: 1,
            path_policy: PathPolicy::RoundRobin,
            beat_ms: 1_000,
            lease_ms: 8_000,
            pending_lease_ms: 5_000,
        };
        let mut fleet = Self {
            forest: Forest::new(settings),
            racks,
            next: 0,
            effects: Vec::new(),
        };
        let image = Image {
            id: id()?,
            digest: Digest([7; 32]),
            bytes: 1 << 30,
            chunk_bytes: 65_536,
            stripes: 1,
            stripe_unit_bytes: 65_536,
            origins: vec![Origin {
                endpoint: endpoint("10.255.0.1:3260")?,
                host: None,
                labels: Labels::new(),
            }],
            created_unix_ms: 0,
            allocated_bytes: 1 << 30,
        };
        fleet.call(Call::AddImage { image })?;
        Ok(fleet)
    }

    fn step(&mut self, event: Event) {
        self.effects.clear();
        self.forest.step(Tick(1), event, &mut self.effects);
    }

    fn call(&mut self, call: Call) -> Result<(), Failure> {
        self.next += 1;
        self.step(Event::Call(CallId(self.next), Box::new(call)));
        let refused = self.effects.iter().find_map(|effect| match effect {
            Effect::Answer(_, Err(refusal)) => Some(refusal.clone()),
            _ => None,
        });
        refused.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    fn come(&mut self, number: usize) -> Result<(), Failure> {
        self.next += 1;
        let speaker = speaker(number)?;
        let rack = |racks| ("rack".to_owned(), format!("r{}", number % racks));
        let info = HostInfo {
            name: speaker.host.clone(),
            instance: speaker.instance.clone(),
            agent_address: String::new(),
            portal: portal(number),
            plane: PlaneKind::User,
            max_stripes: 16,
            labels: (self.racks > 0).then(|| rack(self.racks)).into_iter().collect(),
            version: "example".into(),
            weight: 1,
            runs_vms: true,
            holds_store: false,
        };
        let state = HostState {
            info,
            attachments: Vec::new(),
            vms: 0,
        };
        let beat = Beat {
            sequence: 1,
            speaker,
            digest: vec![1],
            state: Some(state),
            bad_parents: Vec::new(),
        };
        self.step(Event::Beat(StreamId(self.next), Box::new(beat)));
        Ok(())
    }

    fn join(&mut self, number: usize) -> Result<(), Failure> {
        self.call(Call::Join {
            speaker: speaker(number)?,
            image: image_ref()?,
            endpoint: endpoint(&portal(number))?,
        })
    }

    /// How many others got other parents for it.
    fn leave(&mut self, number: usize) -> Result<usize, Failure> {
        self.call(Call::Leave {
            speaker: speaker(number)?,
        })?;
        let moved = self.effects.iter().map(|effect| match effect {
            Effect::Note(Note::Moved { hosts, .. }) => *hosts,
            _ => 0,
        });
        Ok(moved.sum())
    }

    /// The greatest depth, and the most hosts of one rack that read one stripe from outside it.
    fn look(&self) -> Result<(u32, usize), Failure> {
        let tree = self.forest.tree(&image_ref()?)?;
        let rack = |host: &str| {
            let number: usize = host.strip_prefix('h')?.parse().ok()?;
            number.checked_rem(self.racks)
        };
        let mut heads: BTreeMap<_, BTreeSet<&HostName>> = BTreeMap::new();
        for vertex in &tree.vertices {
            let Some((host, own)) = vertex.host.as_ref().and_then(|h| Some((h, rack(h.as_str())?))) else {
                continue;
            };
            if vertex.parents.iter().any(|parent| rack(parent) != Some(own)) {
                heads.entry((vertex.stripe, own)).or_default().insert(host);
            }
        }
        let depth = tree.vertices.iter().map(|v| v.depth).max().unwrap_or(0);
        Ok((depth, heads.values().map(BTreeSet::len).max().unwrap_or(0)))
    }
}

fn id() -> Result<ImageId, Failure> {
    Ok("debian@1".parse()?)
}

fn image_ref() -> Result<ImageRef, Failure> {
    Ok("debian@1".parse()?)
}

fn portal(number: usize) -> String {
    format!("10.0.{}.{}:3260", number / 250, number % 250)
}

fn endpoint(portal: &str) -> Result<Endpoint, Failure> {
    Ok(Endpoint {
        portal: Portal::new(portal)?,
        target: Iqn::of_image(&id()?),
        data_lun: 0,
        hash_lun: Some(1),
    })
}

fn speaker(number: usize) -> Result<Speaker, Failure> {
    Ok(Speaker {
        host: HostName::new(&format!("h{number}"))?,
        instance: format!("instance-{number}"),
    })
}
