//! Faults under load: while a VM's disk on a kernel-plane host is read and written under `fio --verify`, something dies. fio must end without
//! an error and without a wrong byte; the longest time that one of its requests took is the fail-over time, and is printed.
//!
//! What is read is the image, which fio itself wrote, with its checksums; each block is read once, so that it comes from a parent. What is
//! written lies beside it on the same disk. The host, `h2`, reads from `h1`, which reads from the origin.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use treeboot_tests::lab::{HostSpec, Lab, LabHost, LabSpec, Plane};
use treeboot_tests::wait::wait_until;

use crate::support::{import, local, sha256, with_spec};

/// fio's block.
const BLOCK: &str = "16k";
/// How fast the image is read; half as fast is written.
const READ_RATE: u64 = 1 << 20;
/// What must have been read before the fault, and again before it is taken back.
const BEFORE: u64 = 2 << 20;
/// For boots, repairs and the checks at the end.
const AROUND: Duration = Duration::from_secs(300);
/// Reads that no parent answers fail after 60 s; a fail-over by the settings takes 5 s. Between them there is room for a busy machine.
const LONGEST_STALL: Duration = Duration::from_secs(40);
/// For `doctor` to find all as it should be, once the fault is over.
const MENDED_WITHIN: Duration = Duration::from_secs(60);
/// Memory of the host on which fio runs: Debian's is linked to half a distribution.
const FIO_MIB: u32 = 288;
/// How often an agent is killed.
const KILLS: u32 = 20;
/// Where a kernel-plane agent keeps what VMs write.
const DELTAS: &str = "/var/lib/treeboot/agent/kernel-deltas";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The parent loses its power.
    ParentKilled,
    /// The parent's time stops; its connections stay.
    ParentStopped,
    /// The parent's link is cut.
    LinkCut,
    /// The coordinator is killed, and comes back.
    CoordinatorRestarted,
    /// The host's own agent is killed, again and again.
    AgentKilled,
    /// Another VM of the host writes until no room is left for deltas.
    DeltaFull,
    /// All of the cache device answers with errors.
    CacheErrors,
}

impl Fault {
    /// How long fio reads; what is done meanwhile must be over before.
    fn seconds(self) -> u64 {
        match self {
            Self::ParentKilled | Self::ParentStopped | Self::CoordinatorRestarted => 24,
            Self::LinkCut => 14,
            Self::DeltaFull => 40,
            Self::CacheErrors => 30,
            Self::AgentKilled => 120,
        }
    }

    fn child(self) -> HostSpec {
        let host = HostSpec {
            memory_mib: FIO_MIB,
            ..HostSpec::of(Plane::Kernel)
        };
        let args = |args: &[&str]| args.iter().map(ToString::to_string).collect();
        match self {
            // All is brought in first, so that there is something to lose.
            Self::CacheErrors => HostSpec {
                agent_args: args(&["--cache-device", "/dev/labcache"]),
                setup: "truncate -s 1G /mnt/disk/cache.raw\n\
                        loop=$(losetup -f --show /mnt/disk/cache.raw)\n\
                        dmsetup --noudevsync --noudevrules create labcache \
                        --table \"0 $(blockdev --getsz $loop) linear $loop 0\"\n\
                        ln -s /dev/dm-$(dmsetup info -c --noheadings -o minor labcache) /dev/labcache"
                    .into(),
                ..host
            },
            Self::DeltaFull => HostSpec {
                agent_args: args(&["--fill-rate", "0"]),
                setup: format!(
                    "mkdir -p {DELTAS}\nmountpoint -q {DELTAS} || mount -t tmpfs -o size={}m deltas {DELTAS}",
                    (self.written_bytes() >> 20) + 8
                ),
                ..host
            },
            _ => HostSpec {
                agent_args: args(&["--fill-rate", "0"]),
                ..host
            },
        }
    }

    fn read_bytes(self) -> u64 {
        self.seconds() * READ_RATE
    }

    fn written_bytes(self) -> u64 {
        self.read_bytes() / 2
    }
}

/// What fio says of a run.
#[derive(Debug)]
struct Report {
    stall: Duration,
    read: u64,
    written: u64,
    ended: Instant,
}

/// Runs fio on a disk to its end.
async fn load(host: &LabHost, disk: &str, fault: Fault) -> Result<Report> {
    let script = format!(
        "cd /tmp\nexec fio --thread --output-format=json --direct=1 --ioengine=psync --bs={BLOCK} --verify=crc32c --verify_fatal=1 \
         --filename='{disk}' --group_reporting=0 \
         --name=image --rw=randread --offset=0 --size={read} --rate={READ_RATE} \
         --name=own --rw=randwrite --offset={read} --size={written} --rate={half} --verify_backlog=64",
        // fio takes a colon for the end of a name.
        disk = disk.replace(':', "\\:"),
        read = fault.read_bytes(),
        written = fault.written_bytes(),
        half = READ_RATE / 2,
    );
    let limit = Duration::from_secs(fault.seconds()) + AROUND;
    let output = host.run(&script, limit).await?;
    let ended = Instant::now();
    let json = output.stdout.find('{').map(|at| &output.stdout[at..]);
    let json: Option<serde_json::Value> = json.and_then(|json| serde_json::from_str(json).ok());
    let Some(jobs) = json.as_ref().and_then(|json| json["jobs"].as_array()) else {
        bail!(
            "fio ended with {}: {}{}",
            output.code,
            output.stdout,
            output.stderr
        );
    };
    let sum = |direction: &str| {
        jobs.iter()
            .filter_map(|job| job[direction]["io_bytes"].as_u64())
            .sum()
    };
    let longest = jobs
        .iter()
        .flat_map(|job| ["read", "write"].map(|direction| job[direction]["clat_ns"]["max"].as_u64()))
        .flatten()
        .max();
    let wrong = jobs.iter().any(|job| job["error"] != 0);
    ensure!(
        output.code == 0 && !wrong,
        "fio ended with {}: {}\n{}",
        output.code,
        output.stderr,
        host.console_end()
    );
    Ok(Report {
        stall: Duration::from_nanos(longest.context("fio tells no times")?),
        read: sum("read"),
        written: sum("write"),
        ended,
    })
}

/// Waits until so much more was read from a device.
async fn wait_read(host: &LabHost, disk: &str, bytes: u64) -> Result<()> {
    let script = format!(
        "stat=/sys/dev/block/$(lsblk -dno maj:min '{disk}' | tr -d ' ')/stat\n\
         read_sectors() {{ set -- $(cat $stat); echo $3; }}\n\
         until_sectors=$(($(read_sectors) + {}))\n\
         until [ $(read_sectors) -ge $until_sectors ]; do sleep 0.1; done",
        bytes / 512
    );
    host.sh_within(&script, AROUND).await?;
    Ok(())
}

async fn strike(lab: &Lab, disk: &str, fault: Fault, image_sum: &str) -> Result<()> {
    let [parent, child] = &lab.hosts[..] else {
        bail!("this lab has a parent and a child");
    };
    wait_read(child, disk, BEFORE).await?;
    match fault {
        Fault::ParentKilled => parent.kill(),
        Fault::ParentStopped => parent.freeze()?,
        Fault::LinkCut => lab.network.cut_tap(parent.number())?,
        Fault::CoordinatorRestarted => {
            lab.coordinator.kill()?;
            wait_read(child, disk, BEFORE).await?;
            lab.coordinator.start(lab.scratch()).await?;
            lab.wait_known().await?;
        }
        Fault::AgentKilled => {
            for _ in 0..KILLS {
                child.kill_agent().await?;
                child.start_agent().await?;
            }
        }
        Fault::DeltaFull => fill_delta(lab, child, image_sum).await?,
        Fault::CacheErrors => {
            child
                .sh("table=\"0 $(blockdev --getsz /dev/labcache) error\"\n\
                     dmsetup --noudevsync --noudevrules suspend --noflush labcache\n\
                     dmsetup --noudevsync --noudevrules load labcache --table \"$table\"\n\
                     dmsetup --noudevsync --noudevrules resume labcache")
                .await?;
        }
    }
    // The fault is to have some of the reading.
    wait_read(child, disk, BEFORE).await
}

/// Writes one VM's disk until there is no room; its writes fail, `doctor` says why, and it can be thrown away and made again.
async fn fill_delta(lab: &Lab, host: &LabHost, image_sum: &str) -> Result<()> {
    let small = lab.disk(host, "small").await?;
    let filled = host
        .run(
            &format!("dd if=/dev/zero of='{small}' bs=64k oflag=direct conv=fsync status=none"),
            AROUND,
        )
        .await?;
    ensure!(
        filled.code != 0 && filled.stderr.contains("Input/output error"),
        "a delta without room took all: {filled:?}"
    );
    let status = host.sh("dmsetup status treeboot:disk:small").await?;
    ensure!(status.contains("Invalid"), "{status}");
    let doctor = lab.treeboot_output(&["doctor", "--host", host.name()]).await?;
    let said = String::from_utf8_lossy(&doctor.stdout);
    ensure!(
        said.lines()
            .any(|line| line.contains("damaged") && line.contains("small")),
        "doctor does not say that the delta is lost: {said}{}",
        String::from_utf8_lossy(&doctor.stderr)
    );
    lab.treeboot(&["vm", "destroy", "small"]).await?;
    let small = lab.create_disk(host, "small", "image").await?;
    let sum = sum(host, &small).await?;
    ensure!(sum == image_sum, "the disk that was made anew has other bytes");
    Ok(())
}

async fn sum(host: &LabHost, device: &str) -> Result<String> {
    let text = host
        .sh_within(
            &format!("blockdev --flushbufs {device}\nsha256sum {device}"),
            AROUND,
        )
        .await?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

async fn heal(lab: &Lab, fault: Fault) -> Result<()> {
    let parent = &lab.hosts[0];
    match fault {
        Fault::ParentKilled => {
            parent.boot(lab.scratch())?;
            parent.wait_up().await?;
        }
        Fault::ParentStopped => parent.thaw()?,
        Fault::LinkCut => lab.network.mend_tap(parent.number())?,
        Fault::CoordinatorRestarted | Fault::AgentKilled | Fault::DeltaFull | Fault::CacheErrors => {}
    }
    lab.wait_known().await
}

async fn scenario(lab: &Lab, fault: Fault) -> Result<()> {
    let file = lab.scratch().path().join("image.raw");
    let bytes = fault.read_bytes() + fault.written_bytes();
    let options = [
        "--name=image".to_owned(),
        format!("--filename={}", file.display()),
        format!("--size={bytes}"),
        format!("--bs={BLOCK}"),
    ];
    let mut args: Vec<&str> = options.iter().map(String::as_str).collect();
    args.extend(["--rw=write", "--verify=crc32c", "--do_verify=0", "--thread"]);
    // Else it leaves a file in the working directory.
    args.push("--verify_state_save=0");
    local("fio", &args)?;
    import(lab, &file, "image").await?;
    let image_sum = sha256(&file)?;
    for host in &lab.hosts {
        lab.treeboot(&["image", "attach", "image", "--host", host.name()])
            .await?;
    }
    let [_, child] = &lab.hosts[..] else {
        bail!("this lab has a parent and a child");
    };
    let disk = lab.create_disk(child, "vm", "image").await?;
    if fault == Fault::DeltaFull {
        // What a VM has once written has its place, whatever others write later.
        child
            .sh_within(
                &format!(
                    "dd if=/dev/urandom of='{disk}' bs=64k oflag=direct,seek_bytes seek={} count={} status=none",
                    fault.read_bytes(),
                    fault.written_bytes() >> 16
                ),
                AROUND,
            )
            .await?;
        lab.treeboot(&[
            "vm",
            "create",
            "small",
            "--image",
            "image",
            "--host",
            child.name(),
        ])
        .await?;
    }
    if fault == Fault::CacheErrors {
        wait_until(AROUND, "the image to be cached", async || {
            let show = lab.json(&["host", "show", child.name(), "--json"]).await?;
            let cached = show["bases"][0]["cached_bytes"].as_u64();
            Ok((cached >= Some(fault.read_bytes())).then_some(()))
        })
        .await?;
    }
    let show = lab.json(&["host", "show", child.name(), "--json"]).await?;
    ensure!(
        show["bases"][0]["paths"].as_array().is_some_and(|paths| paths
            .iter()
            .any(|path| path["active"] == true && path["host"] == "h1")),
        "the child does not read from its parent: {show}"
    );

    let struck = async {
        strike(lab, &disk, fault, &image_sum).await?;
        Ok(Instant::now())
    };
    let (report, struck) = futures_util::try_join!(load(child, &disk, fault), struck)?;
    ensure!(struck < report.ended, "fio had ended before {fault:?} was over");
    let bases = lab.json(&["host", "show", child.name(), "--json"]).await?["bases"][0].clone();
    println!(
        "{fault:?}: the longest request took {:.1} s; {:.1} MiB of the image and of the VM's own read and checked, {:.1} MiB written, \
         no error; {} bytes came from parents, {} from fallbacks",
        report.stall.as_secs_f64(),
        report.read as f64 / f64::from(1 << 20),
        report.written as f64 / f64::from(1 << 20),
        bases["fetched_parent_bytes"],
        bases["fetched_fallback_bytes"],
    );
    ensure!(
        report.read >= fault.read_bytes() + fault.written_bytes() && report.written >= fault.written_bytes(),
        "fio did not do all of it: {report:?}"
    );
    ensure!(report.stall < LONGEST_STALL, "a request took {:?}", report.stall);

    heal(lab, fault).await?;
    wait_until(MENDED_WITHIN, "the doctor to find nothing wrong", async || {
        let mut all = true;
        for host in &lab.hosts {
            let output = lab.treeboot_output(&["doctor", "--host", host.name()]).await?;
            all &= output.status.success();
        }
        Ok(all.then_some(()))
    })
    .await?;
    for host in &lab.hosts {
        let sum = sum(host, "/dev/mapper/treeboot:base:*").await?;
        ensure!(sum == image_sum, "the base of {} has other bytes", host.name());
    }
    Ok(())
}

fn test(label: &str, fault: Fault) -> Result<()> {
    let spec = LabSpec {
        hosts: vec![HostSpec::of(Plane::Kernel), fault.child()],
        fan_out: Some(1),
        ..LabSpec::default()
    };
    let limit = Duration::from_secs(fault.seconds()) + 2 * AROUND;
    with_spec(label, spec, limit, async move |lab| scenario(lab, fault).await)
}

#[test]
fn a_parents_link_that_is_cut_is_a_short_stall_on_the_kernel_plane() -> Result<()> {
    test("lab-fault-link", Fault::LinkCut)
}

#[test]
#[ignore = "by hand: cargo xtask lab test fault_parent_killed"]
fn fault_parent_killed() -> Result<()> {
    test("lab-fault-killed", Fault::ParentKilled)
}

#[test]
#[ignore = "by hand: cargo xtask lab test fault_parent_stopped"]
fn fault_parent_stopped() -> Result<()> {
    test("lab-fault-stopped", Fault::ParentStopped)
}

#[test]
#[ignore = "by hand: cargo xtask lab test fault_coordinator_restarted"]
fn fault_coordinator_restarted() -> Result<()> {
    test("lab-fault-coordinator", Fault::CoordinatorRestarted)
}

#[test]
#[ignore = "by hand: cargo xtask lab test fault_agent_killed"]
fn fault_agent_killed() -> Result<()> {
    test("lab-fault-agent", Fault::AgentKilled)
}

#[test]
#[ignore = "by hand: cargo xtask lab test fault_delta_full"]
fn fault_delta_full() -> Result<()> {
    test("lab-fault-delta", Fault::DeltaFull)
}

#[test]
#[ignore = "by hand: cargo xtask lab test fault_cache_errors"]
fn fault_cache_errors() -> Result<()> {
    test("lab-fault-cache", Fault::CacheErrors)
}
