//! libiscsi's conformance suite (`iscsi-test-cu`) against `treeboot serve`, with tgt beside it: three kinds of LUN, two sizes of
//! block, two portals.
//!
//! The suite counts a test that it skips as passed. So its words are read, a skipped test is told apart, and only the skips that
//! are listed here are taken. `docs/iscsi.md` has the table and the reason for each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use treeboot_tests::binaries::Binaries;
use treeboot_tests::need::{Need, require};
use treeboot_tests::scratch::Scratch;
use treeboot_tests::table;
use treeboot_tests::tgt::{Disk, Tgt};
use treeboot_tests::wait::{wait_until, within};

use crate::support::{Machine, on_own_thread_within};

/// Enough for the longest transfer of the suite (65,536 blocks of 512), and for 8 MiB, the longest WRITE SAME, many times.
const LUN_BYTES: u64 = 64 << 20;
/// One run of the suite. Alone on two cores a whole one takes 20 to 30 s, most of it the suite's own waiting.
const SUITE_LIMIT: Duration = Duration::from_secs(300);
/// All runs. On a machine that did much else beside they took 140 s.
const LIMIT: Duration = Duration::from_secs(480);
/// Runs at a time: they mostly wait, for each other's processor time too.
const AT_ONCE: usize = 6;
const READY_WITHIN: Duration = Duration::from_secs(60);
const ENDS_WITHIN: Duration = Duration::from_secs(60);
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Tests that no write-protected unit can pass: each begins with a write that must succeed, or asks for nothing else.
/// They are not run on one. That the list is no longer than need be is tested too: each of them must fail.
const NEEDS_WRITES: &[&str] = &[
    "CompareAndWrite.Simple",
    "CompareAndWrite.DpoFua",
    "CompareAndWrite.Miscompare",
    "CompareAndWrite.Unwritten",
    "ExtendedCopy.Simple",
    "GetLBAStatus.UnmapSingle",
    "OrWrite.Simple",
    "OrWrite.DpoFua",
    "OrWrite.Verify",
    "ProutReserve.AccessEA",
    "ProutReserve.AccessWE",
    "ProutReserve.AccessEARO",
    "ProutReserve.AccessWERO",
    "ProutReserve.AccessEAAR",
    "ProutReserve.AccessWEAR",
    "Unmap.Simple",
    "Write10.Simple",
    "Write10.DpoFua",
    "Write10.Async",
    "Write12.Simple",
    "Write12.DpoFua",
    "Write16.Simple",
    "Write16.DpoFua",
    "WriteSame10.Simple",
    "WriteSame10.Check",
    "WriteSame16.Simple",
    "WriteSame16.Check",
    "WriteVerify10.Simple",
    "WriteVerify10.Flags",
    "WriteVerify10.Dpo",
    "WriteVerify12.Simple",
    "WriteVerify12.Flags",
    "WriteVerify12.Dpo",
    "WriteVerify16.Simple",
    "WriteVerify16.Flags",
    "WriteVerify16.Dpo",
    "iSCSIResiduals.Write10Residuals",
    "iSCSIResiduals.Write12Residuals",
    "iSCSIResiduals.Write16Residuals",
    "iSCSIResiduals.WriteVerify10Residuals",
    "iSCSIResiduals.WriteVerify12Residuals",
    "iSCSIResiduals.WriteVerify16Residuals",
    "MultipathIO.Simple",
    "MultipathIO.CompareAndWrite",
    "MultipathIO.CompareAndWriteAsync",
];

/// Tests that send a write and, without waiting, a request to end it. A write-protected unit refuses the write at once, which they
/// take for a failure (and the suite falls over it in the second one), unless the request comes first: chance decides. So they
/// are left out there as well, and nothing is asked of them.
const NEEDS_LUCK: &[&str] = &["iSCSITMF.AbortTaskSimpleAsync", "iSCSITMF.LUNResetSimpleAsync"];

/// Tests that the suite runs only where a physical block has several logical ones. `GetLBAStatus.UnmapSingle` can pass only where
/// it has one, so no LUN runs all.
const NEEDS_PHYSICAL_BLOCKS: &[&str] = &[
    "CompareAndWrite.InvalidDataOutSize",
    "WriteSame10.InvalidDataOutSize",
    "WriteSame10.UnmapUnaligned",
    "WriteSame16.InvalidDataOutSize",
    "WriteSame16.UnmapUnaligned",
];

/// What the suite skips on each of our LUNs; a name that ends with a dot is a whole suite. `docs/iscsi.md` says why.
const SKIPPED: &[&str] = &[
    "CompareAndWrite.InvalidDataOutSize",
    "ExtendedCopy.",
    "NoMedia.",
    "PreventAllow.",
    "ReceiveCopyResults.",
    "Sanitize.",
    "StartStopUnit.",
    "WriteAtomic16.",
    "WriteSame10.InvalidDataOutSize",
    "WriteSame10.UnmapUnaligned",
    "WriteSame10.ZeroBlocks",
    "WriteSame16.InvalidDataOutSize",
    "WriteSame16.UnmapUnaligned",
    "WriteSame16.ZeroBlocks",
];

/// Besides, where nothing is write-protected.
const SKIPPED_WHERE_WRITABLE: &[&str] = &["ReadOnly.ReadOnlySBC"];

/// Besides, where WRITE SAME does not unmap.
const SKIPPED_WITHOUT_UNMAP: &[&str] = &[
    "WriteSame10.Unmap",
    "WriteSame10.UnmapUntilEnd",
    "WriteSame16.Unmap",
    "WriteSame16.UnmapUntilEnd",
];

/// Besides, where nothing is thin.
const SKIPPED_WHERE_FULL: &[&str] = &[
    "GetLBAStatus.UnmapSingle",
    "Inquiry.BlockLimits",
    "Unmap.Simple",
    "Unmap.VPD",
    "Unmap.ZeroBlocks",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Thin,
    Full,
    Protected,
    /// Thin, with physical blocks of 4 KiB.
    Physical,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    Ours,
    Tgt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Lun {
    kind: Kind,
    block_bytes: u32,
    target: Target,
}

impl Lun {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        // The longest first.
        for block_bytes in [4096, 512] {
            for target in [Target::Ours, Target::Tgt] {
                for kind in [Kind::Thin, Kind::Full, Kind::Protected] {
                    all.push(Self {
                        kind,
                        block_bytes,
                        target,
                    });
                }
            }
        }
        all.push(Self {
            kind: Kind::Physical,
            block_bytes: 512,
            target: Target::Ours,
        });
        all
    }

    fn name(self) -> String {
        let kind = match self.kind {
            Kind::Thin => "thin",
            Kind::Full => "full",
            Kind::Protected => "protected",
            Kind::Physical => "physical",
        };
        let target = match self.target {
            Target::Ours => "treeboot",
            Target::Tgt => "tgt",
        };
        format!("{target}-{kind}-{}", self.block_bytes)
    }

    /// What the table calls it.
    fn title(self) -> String {
        let kind = match self.kind {
            Kind::Thin => "thin",
            Kind::Full => "fully allocated",
            Kind::Protected => "write-protected",
            Kind::Physical => "thin, physical 4096",
        };
        format!("{kind}, {}", self.block_bytes)
    }

    /// Whether the suite skips this test on such a LUN of ours.
    fn skips(self, name: &str) -> bool {
        let lists: &[&[&str]] = match self.kind {
            Kind::Thin => &[SKIPPED, SKIPPED_WHERE_WRITABLE],
            Kind::Full => &[
                SKIPPED,
                SKIPPED_WHERE_WRITABLE,
                SKIPPED_WITHOUT_UNMAP,
                SKIPPED_WHERE_FULL,
            ],
            Kind::Protected => &[SKIPPED, SKIPPED_WITHOUT_UNMAP],
            Kind::Physical => &[],
        };
        let is_listed = |listed: &&str| name == *listed || listed.ends_with('.') && name.starts_with(listed);
        lists.iter().any(|list| list.iter().any(is_listed))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Passed,
    /// With the suite's reason.
    Skipped(String),
    /// With the first assertion that did not hold.
    Failed(String),
}

type Verdicts = BTreeMap<String, Verdict>;

/// What the suite printed with `-V`, as far as it came.
struct Words {
    verdicts: Verdicts,
    /// The last test that began.
    last: Option<String>,
    /// The suite's own count: tests run, tests failed.
    counted: Option<(usize, usize)>,
}

impl Words {
    fn read(text: &str) -> Self {
        let (mut suite, mut current) = ("", None);
        let mut words = Self {
            verdicts: Verdicts::new(),
            last: None,
            counted: None,
        };
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("Suite: ") {
                (suite, current) = (name.trim(), None);
                continue;
            }
            let test = line
                .strip_prefix("  Test: ")
                .and_then(|rest| rest.split_once(" ..."));
            let said = match test {
                Some((name, said)) => {
                    let name = format!("{suite}.{name}");
                    words.verdicts.insert(name.clone(), Verdict::Passed);
                    words.last = Some(name.clone());
                    current = Some(name);
                    said
                }
                None => line,
            };
            if let Some(numbers) = line.trim_start().strip_prefix("tests ") {
                let numbers: Vec<usize> = numbers.split_whitespace().flat_map(str::parse).collect();
                if let [_, ran, _, failed, _] = numbers[..] {
                    words.counted = Some((ran, failed));
                }
            }
            if let Some(verdict) = current.as_ref().and_then(|name| words.verdicts.get_mut(name)) {
                hear(verdict, said);
            }
        }
        words
    }

    /// All verdicts, checked against the suite's own count.
    fn whole(self) -> Result<Verdicts> {
        let (ran, failed) = self.counted.context("the suite did not come to its summary")?;
        let (lines, said) = (self.verdicts.len(), failures(&self.verdicts).count());
        ensure!(
            (ran, failed) == (lines, said),
            "the suite counts {ran} tests and {failed} failures, its lines {lines} and {said}"
        );
        Ok(self.verdicts)
    }

    /// The verdicts there are. Where the suite did not come to its end, the test that it was at has failed.
    fn heard_so_far(mut self, pattern: &str) -> Verdicts {
        if self.counted.is_none() {
            let name = self.last.take().unwrap_or_else(|| pattern.to_owned());
            let why = "the suite ended in the midst of it".to_owned();
            self.verdicts.insert(name, Verdict::Failed(why));
        }
        self.verdicts
    }
}

/// Takes one line of a test into account.
fn hear(verdict: &mut Verdict, said: &str) {
    if let Some((_, reason)) = said.split_once("[SKIPPED] ")
        && *verdict == Verdict::Passed
    {
        *verdict = Verdict::Skipped(reason.trim().to_owned());
    }
    if let Some(assertion) = assertion(said)
        && !matches!(verdict, Verdict::Failed(_))
    {
        *verdict = Verdict::Failed(assertion.to_owned());
    }
}

/// `    3. test_x.c:98  - CU_FAIL("...")`: an assertion that did not hold.
fn assertion(line: &str) -> Option<&str> {
    let (number, rest) = line.trim_start().split_once(". ")?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && rest.contains(".c:") && rest.contains("  - ")).then_some(rest)
}

fn failures(verdicts: &Verdicts) -> impl Iterator<Item = (&str, &str)> {
    verdicts.iter().filter_map(|(name, verdict)| match verdict {
        Verdict::Failed(why) => Some((name.as_str(), why.as_str())),
        _ => None,
    })
}

fn skips(verdicts: &Verdicts) -> impl Iterator<Item = (&str, &str)> {
    verdicts.iter().filter_map(|(name, verdict)| match verdict {
        Verdict::Skipped(why) => Some((name.as_str(), why.as_str())),
        _ => None,
    })
}

/// Names of all tests, `SUITE.TEST`.
fn tests(scratch: &Scratch) -> Result<Vec<String>> {
    let output = scratch.command("iscsi-test-cu").arg("--list").output()?;
    let names: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("ALL."))
        .filter(|name| name.contains('.'))
        .map(str::to_owned)
        .collect();
    ensure!(names.len() >= 200, "the suite lists only {} tests", names.len());
    Ok(names)
}

/// Patterns that run all of `names` but those of `without`, in as few runs as the suite's patterns allow.
fn patterns(names: &[String], without: &[&str]) -> Vec<String> {
    let suite_of = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let cut: BTreeSet<String> = without.iter().map(|name| suite_of(name)).collect();
    if cut.is_empty() {
        return vec!["ALL".into()];
    }
    let mut patterns = Vec::new();
    for name in names {
        let suite = suite_of(name);
        let pattern = match cut.contains(&suite) {
            true if without.contains(&name.as_str()) => continue,
            true => format!("ALL.{name}"),
            false => format!("ALL.{suite}"),
        };
        if patterns.last() != Some(&pattern) {
            patterns.push(pattern);
        }
    }
    patterns
}

/// Runs the suite once for each pattern. Where tgt makes it fall over, that is a failure of tgt's and not of this test.
async fn run(
    scratch: &Scratch,
    target: Target,
    label: &str,
    urls: &[String],
    patterns: &[String],
) -> Result<Verdicts> {
    let mut verdicts = Verdicts::new();
    for pattern in patterns {
        let mut command = scratch.command("iscsi-test-cu");
        command
            .args(["-A", "-d", "--allow-sanitize", "-V", "-t", pattern])
            .args(urls)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let suite = tokio::process::Command::from(command).kill_on_drop(true).output();
        let output = match within(SUITE_LIMIT, &format!("{pattern} on {label}"), suite).await {
            Err(late) if target == Target::Tgt => {
                verdicts.insert(pattern.clone(), Verdict::Failed(late.to_string()));
                continue;
            }
            output => output??,
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let words = Words::read(&text);
        if words.counted.is_none() || failures(&words.verdicts).next().is_some() {
            fs::write(scratch.path().join(format!("{label}-{pattern}.txt")), &*text)?;
        }
        verdicts.extend(match target {
            Target::Ours => words
                .whole()
                .with_context(|| format!("{pattern} on {label}: {}", output.status))?,
            Target::Tgt => words.heard_so_far(pattern),
        });
    }
    Ok(verdicts)
}

/// `treeboot serve` as a process.
struct Serve {
    child: Child,
    urls: Vec<String>,
}

impl Serve {
    async fn start(scratch: &Scratch, lun: Lun, file: &Path) -> Result<Self> {
        let folder = scratch.path().join(lun.name());
        fs::create_dir_all(&folder)?;
        let ready = folder.join("ready.json");
        let log = fs::File::create(folder.join("serve.log"))?;
        let mut command = scratch.command(Binaries::locate()?.cli());
        command
            .arg("serve")
            .arg(file)
            .args(["--portal", "127.0.0.1:0", "--portal", "127.0.0.1:0"])
            .args(["--block-size", &lun.block_bytes.to_string()])
            .arg("--ready-file")
            .arg(&ready)
            .args(match lun.kind {
                Kind::Thin => &["--writable"][..],
                Kind::Full => &["--writable", "--fully-allocated"],
                Kind::Physical => &["--writable", "--physical-block-size", "4096"],
                Kind::Protected => &[],
            })
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = command.spawn().context("could not start treeboot")?;
        let urls = wait_until(READY_WITHIN, "treeboot serve to be ready", async || {
            if let Some(status) = child.try_wait()? {
                bail!("treeboot serve ended with {status}");
            }
            let Ok(json) = fs::read(&ready) else {
                return Ok(None);
            };
            let ready: serde_json::Value = serde_json::from_slice(&json)?;
            let urls = ready["urls"].as_array().context("no urls")?;
            Ok(Some(
                urls.iter()
                    .filter_map(|url| url.as_str().map(str::to_owned))
                    .collect(),
            ))
        })
        .await?;
        Ok(Self { child, urls })
    }

    /// Its orderly end, which also says that it lived until then.
    async fn end(mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("a pid fits")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        let child = &mut self.child;
        let status = wait_until(ENDS_WITHIN, "the end of treeboot serve", async || {
            Ok(child.try_wait()?)
        })
        .await?;
        ensure!(status.success(), "treeboot serve ended with {status}");
        Ok(())
    }
}

/// What one LUN came to.
struct Report {
    lun: Lun,
    verdicts: Verdicts,
    left_out: usize,
    seconds: f64,
}

async fn measure(scratch: &Scratch, names: &[String], lun: Lun) -> Result<Report> {
    let began = Instant::now();
    let file = scratch.path().join(format!("{}.raw", lun.name()));
    let image = fs::File::create(&file)?;
    image.set_len(LUN_BYTES)?;
    let left_out = match lun.kind {
        Kind::Protected => [NEEDS_WRITES, NEEDS_LUCK].concat(),
        _ => Vec::new(),
    };
    let patterns = match lun.kind {
        Kind::Physical => exactly(NEEDS_PHYSICAL_BLOCKS),
        _ => patterns(names, &left_out),
    };
    let label = lun.name();
    let verdicts = match lun.target {
        Target::Ours => {
            let serve = Serve::start(scratch, lun, &file).await?;
            let verdicts = run(scratch, lun.target, &label, &serve.urls, &patterns).await?;
            if lun.kind == Kind::Protected && lun.block_bytes == 512 {
                must_fail(scratch, &serve.urls, NEEDS_WRITES).await?;
            }
            serve.end().await?;
            verdicts
        }
        Target::Tgt => {
            let disk = Disk {
                read_only: lun.kind == Kind::Protected,
                thin: lun.kind == Kind::Thin,
                block_bytes: lun.block_bytes,
                portals: 2,
            };
            if lun.kind == Kind::Full {
                // It has no option for it: a unit that is not said to be thin, over a file without holes.
                fs::write(&file, vec![0; usize::try_from(LUN_BYTES)?])?;
            }
            let tgt = Tgt::serve_disk(scratch, &label, LOCALHOST, &file, disk).await?;
            let verdicts = run(scratch, lun.target, &label, &tgt.urls(), &patterns).await;
            tgt.kill()?;
            verdicts?
        }
    };
    Ok(Report {
        lun,
        verdicts,
        left_out: left_out.len(),
        seconds: began.elapsed().as_secs_f64(),
    })
}

fn exactly(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| format!("ALL.{name}")).collect()
}

/// The list of what is left out holds nothing that could pass.
async fn must_fail(scratch: &Scratch, urls: &[String], names: &[&str]) -> Result<()> {
    let verdicts = run(scratch, Target::Ours, "left-out", urls, &exactly(names)).await?;
    let passing: Vec<&String> = verdicts
        .iter()
        .filter(|(_, verdict)| !matches!(verdict, Verdict::Failed(_)))
        .map(|(name, _)| name)
        .collect();
    ensure!(
        passing.is_empty() && verdicts.len() == names.len(),
        "{passing:?} can be run on a write-protected unit; take them off NEEDS_WRITES"
    );
    Ok(())
}

/// The table, and under it who skipped and failed what.
fn report(reports: &[Report]) -> String {
    let rows: Vec<Vec<String>> = reports
        .iter()
        .map(|report| {
            let target = match report.lun.target {
                Target::Ours => "treeboot serve",
                Target::Tgt => "tgt",
            };
            let (ran, skipped) = (report.verdicts.len(), skips(&report.verdicts).count());
            vec![
                format!("{target}: {}", report.lun.title()),
                (ran - skipped).to_string(),
                skipped.to_string(),
                failures(&report.verdicts).count().to_string(),
                report.left_out.to_string(),
                format!("{:.0}", report.seconds),
            ]
        })
        .collect();
    let mut text = table::draw(
        &[
            "iscsi-test-cu",
            "executed",
            "skipped",
            "failed",
            "left out",
            "seconds",
        ],
        &rows,
    );
    for report in reports {
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, why) in skips(&report.verdicts) {
            reasons.entry(why).or_default().push(name);
        }
        for (why, names) in reasons {
            text.push_str(&format!(
                "{} skipped, {why} {}\n",
                report.lun.name(),
                names.join(" ")
            ));
        }
        for (name, why) in failures(&report.verdicts) {
            text.push_str(&format!("{} FAILED {name}: {why}\n", report.lun.name()));
        }
    }
    text
}

#[test]
fn libiscsis_suite_finds_no_fault_in_any_kind_of_lun() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Program("tgtd", "tgt"),
        Need::Program("iscsi-test-cu", "libiscsi-bin"),
    ];
    if !require(&needs) {
        return Ok(());
    }
    on_own_thread_within(LIMIT, Machine::Alone, async || {
        let scratch = Scratch::new(Binaries::locate()?.evidence().join("iscsi-suite"))?;
        let names = tests(&scratch)?;
        let mut reports: Vec<Report> = stream::iter(Lun::all())
            .map(|lun| measure(&scratch, &names, lun))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        reports.sort_by_key(|report| (report.lun.target, report.lun.kind, report.lun.block_bytes));
        let table = report(&reports);
        // Past the capture of output, because the table is half of what this test is for.
        std::io::stderr().write_all(format!("\n{table}").as_bytes())?;
        for report in reports.iter().filter(|report| report.lun.target == Target::Ours) {
            let name = report.lun.name();
            let failed: Vec<&str> = failures(&report.verdicts).map(|(name, _)| name).collect();
            ensure!(failed.is_empty(), "{name}: {failed:?} failed");
            let expected = match report.lun.kind {
                Kind::Physical => NEEDS_PHYSICAL_BLOCKS.len(),
                _ => names.len() - report.left_out,
            };
            ensure!(
                report.verdicts.len() == expected,
                "{name}: {} of {expected} tests ran",
                report.verdicts.len()
            );
            // A test that used to be executed is not skipped without a word, and the list of those that are is no longer
            // than it has to be.
            let skipped: BTreeSet<&str> = skips(&report.verdicts).map(|(name, _)| name).collect();
            let wrong: Vec<&String> = report
                .verdicts
                .keys()
                .filter(|name| report.lun.skips(name) != skipped.contains(name.as_str()))
                .collect();
            ensure!(
                wrong.is_empty(),
                "{name}: {wrong:?}: skipped against the list, or listed and executed"
            );
        }
        scratch.pass();
        Ok(())
    })
}

#[test]
fn the_suites_words_are_told_apart() -> Result<()> {
    let text = "\
Suite: Read6
  Test: Simple ...
    [OK] READ6 returned SUCCESS
passed    Send PRIN/READ_KEYS
  Test: BeyondEol ...    [FAILED] READ6 successful but should have failed
FAILED
    1. test_read6.c:33  - CU_ASSERT_EQUAL(_r,0)
    2. test_read6.c:34  - CU_FAIL(\"x\")
Suite: OrWrite
  Test: Simple ...    [SKIPPED] ORWRITE is not implemented.
passed

Run Summary:    Type  Total    Ran Passed Failed Inactive
              suites     51      2    n/a      0        0
               tests      3      3      2      1        0
             asserts     71     71     70      1      n/a
";
    let verdicts = Words::read(text).whole()?;
    assert_eq!(verdicts["Read6.Simple"], Verdict::Passed);
    assert_eq!(
        verdicts["Read6.BeyondEol"],
        Verdict::Failed("test_read6.c:33  - CU_ASSERT_EQUAL(_r,0)".into())
    );
    assert_eq!(
        verdicts["OrWrite.Simple"],
        Verdict::Skipped("ORWRITE is not implemented.".into())
    );
    // A run that broke off, and one whose failures are worded as nothing that is known.
    let half = &text[..text.find("Suite: OrWrite").context("it is there")?];
    assert!(Words::read(half).whole().is_err());
    let wordless = text.replace(" 1. ", " x. ").replace(" 2. ", " x. ");
    assert!(Words::read(&wordless).whole().is_err());
    assert_eq!(
        Words::read(half).heard_so_far("ALL")["Read6.BeyondEol"],
        Verdict::Failed("the suite ended in the midst of it".into())
    );
    Ok(())
}

#[test]
fn leaving_tests_out_leaves_nothing_else_out() {
    let names = ["A.x", "A.y", "B.x", "B.y", "C.x"].map(str::to_owned);
    assert_eq!(patterns(&names, &[]), ["ALL"]);
    assert_eq!(patterns(&names, &["B.x"]), ["ALL.A", "ALL.B.y", "ALL.C"]);
}
