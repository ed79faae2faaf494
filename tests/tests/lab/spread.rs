//! What an image costs: no host gets more of it than once, so that nobody, and above all not the origin, ships it more often than it has
//! children.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use treeboot_tests::image::Pattern;
use treeboot_tests::lab::{HostSpec, Lab, LabHost, LabSpec, Plane};
use treeboot_tests::network::LinkBytes;

use crate::support::{import, sha256, with_spec};

/// What a host may get above the image's bytes, and the origin ship above them to each of its children: chunks that caches missed and
/// that are asked for again.
const SURPLUS: f64 = 0.10;
/// Two below the origin, four below these, one below those.
const HOSTS: usize = 7;
const FAN_OUT: u64 = 2;
const LIMIT: Duration = Duration::from_secs(600);
/// Of each host. The page cache is to hold a chunk for the moments until the cache has it, beside the programs.
const MEMORY_MIB: u32 = 512;
/// How fast each host reads, at most, in bytes a second.
const PACE: u64 = 20_000_000;

/// Bytes that the links of the origin and of each host have carried.
struct Links(BTreeMap<String, LinkBytes>);

impl Links {
    /// Until now.
    fn read(lab: &Lab) -> Result<Self> {
        let mut links = BTreeMap::from([("origin".to_owned(), lab.network.link_bytes(0)?)]);
        for host in &lab.hosts {
            links.insert(host.name().to_owned(), lab.network.tap_bytes(host.number())?);
        }
        Ok(Self(links))
    }

    /// Those of one since `before`.
    fn since(&self, before: &Self, name: &str) -> Result<LinkBytes> {
        let (now, then) = (self.0.get(name), before.0.get(name));
        let (now, then) = now.zip(then).with_context(|| format!("no link of {name}"))?;
        Ok(LinkBytes {
            received: now.received - then.received,
            sent: now.sent - then.sent,
        })
    }
}

/// Prints who got what from whom since `before`, as a table; gives those who got more than they may.
///
/// What was got is counted by the agents, without headers, from parents and fallbacks together; what links carried holds the headers (5 % of
/// full segments), the hash tree (1 %) and everything else.
async fn greedy(lab: &Lab, before: &Links, distinct: u64) -> Result<Vec<String>> {
    let links = Links::read(lab)?;
    let tree = lab.json(&["tree", "image", "--json"]).await?;
    let nodes = tree["nodes"].as_array().context("a tree without nodes")?;
    ensure!(nodes.len() == HOSTS + 1, "a tree of others: {tree}");
    let times = |bytes: u64| bytes as f64 / distinct as f64;
    println!(
        "| host | depth | children | got, of the image | of it from fallbacks | link sent | link received |"
    );
    let (mut greedy, mut from_origin) = (Vec::new(), 0);
    for node in nodes {
        let name = node["host"].as_str().context("a node without a host")?;
        let link = links.since(before, name)?;
        let base = lab.json(&["host", "show", name, "--json"]).await?["bases"][0].clone();
        let count = |what: &str| base[what].as_u64().unwrap_or_default();
        let (parent, fallback) = (count("fetched_parent_bytes"), count("fetched_fallback_bytes"));
        println!(
            "| {name} | {} | {} | {:.3} | {:.3} | {:.3} | {:.3} |",
            node["depth"],
            node["children"],
            times(parent + fallback),
            times(fallback),
            times(link.sent),
            times(link.received),
        );
        if node["depth"] == 1 {
            from_origin += parent;
        }
        if times(parent + fallback) > 1.0 + SURPLUS {
            greedy.push(name.to_owned());
        }
        from_origin += fallback;
    }
    println!("the origin shipped {:.3} of the image", times(from_origin));
    if times(from_origin) > FAN_OUT as f64 * (1.0 + SURPLUS) {
        greedy.push("the origin's children".to_owned());
    }
    Ok(greedy)
}

/// When hosts begin to read.
#[derive(Debug, Clone, Copy)]
enum Start {
    /// All at the same moment, once all have attached the image, one after the other.
    InTurn,
    /// Each as soon as it has attached it, and all attach at the same moment: a fleet that boots.
    AtOnce,
}

/// All hosts attach an image and read it whole, each at 20 MB/s at most.
async fn scenario(lab: &Lab, bytes: u64, start: Start) -> Result<()> {
    let file = lab.scratch().path().join("image.raw");
    Pattern { seed: 41, bytes }.write(&file)?;
    import(lab, &file, "image").await?;
    let expected = sha256(&file)?;
    let before = Links::read(lab)?;
    let read = format!("{} read --rate {PACE}", lab.lab_program()?.display());
    let create = async |host: &LabHost| {
        lab.create_disk(host, &format!("vm-{}", host.name()), "image")
            .await
    };
    let read = async |host: &LabHost, disk: &str| {
        host.sh_within(&format!("blockdev --flushbufs '{disk}'\n{read} '{disk}'"), LIMIT)
            .await
    };
    let began = Instant::now();
    let disks = match start {
        Start::InTurn => {
            let mut disks = Vec::new();
            for host in &lab.hosts {
                disks.push(create(host).await?);
            }
            println!("attached after {:.1} s", began.elapsed().as_secs_f64());
            try_join_all(lab.hosts.iter().zip(&disks).map(|(host, disk)| read(host, disk))).await?;
            disks
        }
        Start::AtOnce => {
            try_join_all(lab.hosts.iter().map(async |host| {
                let disk = create(host).await?;
                read(host, &disk).await?;
                Ok::<_, anyhow::Error>(disk)
            }))
            .await?
        }
    };
    println!("read after {:.1} s", began.elapsed().as_secs_f64());
    let greedy = greedy(lab, &before, bytes).await?;
    // Only now, because reads that the count is to be about must not be these.
    for (host, disk) in lab.hosts.iter().zip(&disks) {
        let sum = host
            .sh_within(
                &format!("blockdev --flushbufs '{disk}'\nsha256sum < '{disk}'"),
                LIMIT,
            )
            .await?;
        ensure!(sum.starts_with(&expected), "{} has other bytes", host.name());
    }
    ensure!(greedy.is_empty(), "{} got more than they may", greedy.join(", "));
    Ok(())
}

fn test(label: &str, bytes: u64, start: Start, agent_args: &[&str]) -> Result<()> {
    let host = HostSpec {
        agent_args: agent_args.iter().map(ToString::to_string).collect(),
        memory_mib: MEMORY_MIB,
        ..HostSpec::of(Plane::Kernel)
    };
    let spec = LabSpec {
        hosts: vec![host; HOSTS],
        fan_out: Some(u32::try_from(FAN_OUT)?),
        ..LabSpec::default()
    };
    with_spec(label, spec, LIMIT, async move |lab| {
        scenario(lab, bytes, start).await
    })
}

#[test]
fn spread_small() -> Result<()> {
    test("lab-spread", 16 << 20, Start::InTurn, &[])
}

#[test]
#[ignore = "by hand: cargo xtask lab test spread_large"]
fn spread_large() -> Result<()> {
    test("lab-spread-large", 64 << 20, Start::InTurn, &[])
}

#[test]
#[ignore = "by hand: cargo xtask lab test spread_at_once"]
fn spread_at_once() -> Result<()> {
    test(
        "lab-spread-at-once",
        64 << 20,
        Start::AtOnce,
        &["--fill-rate", "100M"],
    )
}

#[test]
#[ignore = "by hand: cargo xtask lab test spread_by_reads_alone"]
fn spread_by_reads_alone() -> Result<()> {
    test("lab-spread-reads", 64 << 20, Start::InTurn, &["--fill-rate", "0"])
}

#[test]
#[ignore = "by hand: cargo xtask lab test spread_by_dm_cache"]
fn spread_by_dm_cache() -> Result<()> {
    test(
        "lab-spread-dm",
        64 << 20,
        Start::InTurn,
        &["--cache-kind", "dm-cache"],
    )
}
