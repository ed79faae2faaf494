//! Fail at k, by kill -9 of the real agent: for each verb the moments before and after each step, and each change of the journal, are
//! counted in a call that nothing disturbs; then the agent is killed at each of them in turn and started again. Afterwards the same
//! call succeeds, or says that there is nothing left to do; what there is, is what the undisturbed call made, the bytes too; and when
//! all is removed, nothing is left of it.
//!
//! The agents are `treeboot-doomed-agent`s: the agent itself, to which somebody listens (`treeboot_agent::witness`). Those that are
//! started after a death have no doom. `cargo xtask soak steps` kills at all moments.

mod footprint;
mod verbs;

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tonic::Code;
use treeboot_types::PlaneKind;

use self::footprint::{Footprint, differences, take, wrong};
use self::verbs::{PATTERN, World};
use crate::cluster::{Cluster, Plan};
use crate::wait::{LOOK_EVERY, wait_until};

pub use self::verbs::{Role, Verb};

/// After so many it is not tried any further.
const FINDINGS: usize = 6;
/// What the agents read their doom from.
const DOOM: &str = "TREEBOOT_DOOM";
/// Says at which moments: `all`, or a verb, for all of its own.
const STEPS: &str = "TREEBOOT_STEPS";
const SEED: u64 = 1;
/// For what takes milliseconds on a machine that does nothing else.
const SOON: Duration = Duration::from_secs(60);

/// What goes on after a call was answered has ended when nothing changed for so long. A base of the kernel plane goes over to the cache
/// when a parent is up.
fn still_after(plane: PlaneKind) -> Duration {
    match plane {
        PlaneKind::User => Duration::from_millis(600),
        PlaneKind::Kernel => Duration::from_secs(3),
    }
}

/// The verbs of the user plane, each with those who may die in it.
pub const USER_PLANE: &[(Verb, Role)] = &[
    (Verb::Create, Role::Here),
    (Verb::Destroy, Role::Here),
    (Verb::CreateDevice, Role::Here),
    (Verb::DestroyDevice, Role::Here),
    (Verb::CreateMany, Role::Here),
    (Verb::DestroyInstanceOnly, Role::Here),
    (Verb::Start, Role::Here),
    (Verb::DestroyRunning, Role::Here),
    (Verb::Stop, Role::Here),
    (Verb::Attach, Role::Here),
    (Verb::Detach, Role::Here),
    (Verb::Snapshot, Role::Here),
    (Verb::RollBack, Role::Here),
    (Verb::DeleteSnapshot, Role::Here),
    (Verb::CloneHere, Role::Here),
    (Verb::CloneThere, Role::Here),
    (Verb::CloneThere, Role::There),
    (Verb::Migrate, Role::Here),
    (Verb::Migrate, Role::There),
    (Verb::Limit, Role::Here),
    (Verb::Import, Role::Origin),
    (Verb::RemoveImage, Role::Origin),
    (Verb::Publish, Role::Here),
    (Verb::Publish, Role::Origin),
    (Verb::Flatten, Role::Origin),
];

/// The verbs of the kernel plane; what it does not have, it refuses (docs/verbs.md).
pub const KERNEL_PLANE: &[(Verb, Role)] = &[
    (Verb::Create, Role::Here),
    (Verb::Destroy, Role::Here),
    (Verb::CreateDevice, Role::Here),
    (Verb::DestroyDevice, Role::Here),
    (Verb::CreateMany, Role::Here),
    (Verb::DestroyInstanceOnly, Role::Here),
    (Verb::Attach, Role::Here),
    (Verb::Detach, Role::Here),
];

/// At which moments agents are killed.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Of each verb one of so many.
    pub stride: u64,
    /// The same of `create` and `destroy`, on which all others stand.
    pub short_stride: u64,
    /// With which they begin.
    pub seed: u64,
    /// All moments instead, of each verb or of the one that is named.
    pub whole: Option<String>,
}

impl Choice {
    /// As the environment says: `TREEBOOT_SEED`, `TREEBOOT_STEPS`.
    #[must_use]
    pub fn of_environment(stride: u64, short_stride: u64) -> Self {
        let seed = std::env::var("TREEBOOT_SEED")
            .ok()
            .and_then(|text| text.parse().ok());
        Self {
            stride,
            short_stride,
            seed: seed.unwrap_or(SEED),
            whole: std::env::var(STEPS).ok(),
        }
    }

    fn has_verb(&self, verb: Verb) -> bool {
        match self.whole.as_deref() {
            None | Some("all") => true,
            Some(name) => format!("{verb:?}") == name,
        }
    }

    /// Of so many moments of a verb, numbered from 1. `turn` is another for each verb, so that they do not all begin with the same.
    fn moments(&self, verb: Verb, turn: u64, count: u64) -> Vec<u64> {
        let stride = match verb {
            _ if self.whole.is_some() => 1,
            Verb::Create | Verb::Destroy => self.short_stride,
            _ => self.stride,
        };
        // At least one of each.
        let first = self.seed.wrapping_mul(5).wrapping_add(turn.wrapping_mul(7)) % stride.min(count).max(1);
        (first + 1..=count)
            .step_by(usize::try_from(stride).unwrap_or(1))
            .collect()
    }
}

/// A coordinator, an origin and hosts of a plane, whose agents can be doomed: two, or one that has the kernel.
///
/// # Errors
/// As [`Cluster::start`].
pub async fn cluster(label: &str, plane: PlaneKind) -> Result<Cluster> {
    let plan = Plan {
        hosts: match plane {
            PlaneKind::User => 2,
            PlaneKind::Kernel => 1,
        },
        kernel_plane: plane == PlaneKind::Kernel,
        agent_program: Some("treeboot-doomed-agent"),
        ..Plan::default()
    };
    // A place that nobody gave back, because its host died, is given up within seconds.
    let plan = plan.with_leases(Duration::from_secs(3));
    let cluster = Cluster::prepare(label, &plan)?;
    for agent in cluster.agents() {
        agent.set_env(DOOM, &agent.folder().display().to_string());
    }
    cluster.coordinator.start(cluster.scratch()).await?;
    cluster.start_agents().await?;
    Ok(cluster)
}

/// What becomes of the agent that is to die.
struct Doom {
    folder: PathBuf,
}

/// How many dooms were written: an agent counts anew with each.
static LIVES: AtomicU64 = AtomicU64::new(0);

impl Doom {
    /// From now on moments are counted; the one of this number, from 1, is the last.
    fn write(&self, number: u64) -> Result<()> {
        let life = LIVES.fetch_add(1, Ordering::Relaxed);
        let _ = std::fs::remove_file(self.folder.join("moments"));
        let new = self.folder.join("doom.new");
        std::fs::write(&new, format!("{life} {number}"))?;
        Ok(std::fs::rename(new, self.folder.join("doom"))?)
    }

    fn lift(&self) -> Result<()> {
        match std::fs::remove_file(self.folder.join("doom")) {
            // Whom it met took it along.
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn moments(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.folder.join("moments")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

/// What was done.
#[derive(Debug, Default)]
pub struct Sum {
    /// That there are.
    pub moments: u64,
    /// Of them, at which an agent was killed.
    pub kills: u64,
    /// From an agent's death to the end of the same call again.
    pub longest: Duration,
}

impl Sum {
    fn words(&self, since: Instant) -> String {
        format!(
            "{} kills, {} moments, in {:.1} s, the same call done within {} ms of a death",
            self.kills,
            self.moments,
            since.elapsed().as_secs_f64(),
            self.longest.as_millis()
        )
    }
}

struct Trial<'a> {
    world: World<'a>,
    verb: Verb,
    role: Role,
    doom: Doom,
    /// What there is after the call.
    made: Footprint,
    /// What there is when nothing is.
    nothing: Footprint,
}

/// What there is once it stays so; nothing of it may be wrong.
async fn still(world: &World<'_>) -> Result<Footprint> {
    let last = parking_lot::Mutex::new((Footprint::new(), Instant::now()));
    let settled = wait_until(SOON, "that nothing changes any more", async || {
        let now = take(world.cluster, world.plane, &world.vm).await?;
        let mut last = last.lock();
        if last.0 != now {
            *last = (now, Instant::now());
        }
        let still = last.1.elapsed() >= still_after(world.plane) && wrong(&last.0).is_empty();
        Ok(still.then(|| last.0.clone()))
    });
    settled
        .await
        .with_context(|| format!("{:?}", wrong(&last.lock().0)))
}

/// There is what is expected, within the time that things take that nobody waits for.
async fn expect(world: &World<'_>, what: &str, expected: &Footprint) -> Result<()> {
    let seen = parking_lot::Mutex::new(Vec::new());
    let as_expected = wait_until(SOON, what, async || {
        if world.revive().await? {
            return Ok(None);
        }
        // An agent that dies at this moment does not answer.
        let Ok(now) = take(world.cluster, world.plane, &world.vm).await else {
            return Ok(None);
        };
        let differ = differences(expected, &now);
        let same = differ.is_empty();
        *seen.lock() = differ;
        Ok(same.then_some(()))
    });
    as_expected.await.with_context(|| seen.lock().join("\n"))
}

impl Trial<'_> {
    /// Where the verb begins.
    async fn begin(&self) -> Result<()> {
        self.world.reset().await?;
        expect(&self.world, "nothing to be left", &self.nothing).await?;
        self.world.prepare(self.verb).await.context("before the verb")
    }

    /// Calls it, with the agent killed at a moment; whether that moment came.
    async fn killed_at(&self, moment: u64, sum: &mut Sum) -> Result<bool> {
        let (world, agent) = (&self.world, self.world.agent(self.role));
        self.begin().await?;
        self.doom.write(moment)?;
        let done = Cell::new(false);
        let calling = async {
            // A front end that is gone is still seen as logged in for a moment; that is no call yet.
            let began = Instant::now();
            let first = loop {
                match world.call(self.verb).await {
                    Err(status) if status.code() == Code::FailedPrecondition && began.elapsed() < SOON => {
                        tokio::time::sleep(LOOK_EVERY).await;
                    }
                    first => break first,
                }
            };
            done.set(true);
            first
        };
        let reviving = async {
            let dead = wait_until(SOON, "the call's end", async || {
                Ok(match agent.is_running() {
                    true => done.get().then_some(false),
                    false => Some(true),
                })
            });
            match dead.await? {
                true => world.revive().await.map(drop),
                false => Ok(()),
            }
        };
        let (first, revived) = tokio::join!(calling, reviving);
        revived?;
        if first.is_ok() {
            // What it left to be done afterwards may be where the agent dies.
            expect(world, "the first call's work to be done", &self.made).await?;
        }
        self.doom.lift()?;
        world.revive().await?;
        let began = Instant::now();
        let said = first
            .err()
            .map_or_else(|| "done".to_owned(), |status| status.to_string());
        world
            .call_until_done(self.verb)
            .await
            .with_context(|| format!("the first call said: {said}"))?;
        sum.longest = sum.longest.max(began.elapsed());
        expect(world, "what the verb makes", &self.made).await?;
        world.check(self.verb).await?;
        Ok(self.doom.moments().len() as u64 >= moment)
    }

    /// Counts the moments of the verb, and sees what it makes.
    async fn undisturbed(&mut self) -> Result<Vec<String>> {
        self.begin().await?;
        self.doom.write(0)?;
        self.world.call_until_done(self.verb).await?;
        self.made = still(&self.world).await?;
        let moments = self.doom.moments();
        self.doom.lift()?;
        self.world.check(self.verb).await?;
        Ok(moments)
    }

    async fn run(&mut self, choice: &Choice, turn: u64, sum: &mut Sum) -> Result<()> {
        let (verb, role) = (self.verb, self.role);
        let moments = self.undisturbed().await;
        let moments = moments.with_context(|| format!("{verb:?}, undisturbed"))?;
        sum.moments = moments.len() as u64;
        for number in choice.moments(verb, turn, sum.moments) {
            let name = moments
                .get(usize::try_from(number - 1)?)
                .map_or("", String::as_str);
            let killed = self.killed_at(number, sum).await;
            let killed =
                killed.with_context(|| format!("{verb:?}, {role:?} killed at moment {number}, {name}"));
            sum.kills += u64::from(killed?);
        }
        Ok(())
    }
}

/// Kills at the chosen moments of each verb.
///
/// # Errors
/// Something was left, a call did not succeed again, or bytes are others; the error says after which moment.
pub async fn verb_by_verb(
    cluster: &Cluster,
    plane: PlaneKind,
    verbs: &[(Verb, Role)],
    choice: &Choice,
) -> Result<Sum> {
    println!("steps: TREEBOOT_SEED={}", choice.seed);
    let world = || World::new(cluster, plane);
    PATTERN.write(&world().file())?;
    cluster.import(&world().file(), verbs::IMAGE).await?;
    // What is made once and kept, such as the cache.
    world().call_until_done(Verb::Attach).await?;
    world().reset().await?;
    let mut nothing = still(&world()).await?;
    let (began, mut all) = (Instant::now(), Sum::default());
    let mut findings = Vec::new();
    let chosen = verbs.iter().filter(|(verb, _)| choice.has_verb(*verb));
    for (turn, &(verb, role)) in (0..).zip(chosen) {
        let mut trial = Trial {
            world: world(),
            verb,
            role,
            doom: Doom {
                folder: world().agent(role).folder().to_owned(),
            },
            made: Footprint::new(),
            nothing: nothing.clone(),
        };
        let (since, mut sum) = (Instant::now(), Sum::default());
        let outcome = trial.run(choice, turn, &mut sum).await;
        println!("{verb:?}, {role:?}: {}", sum.words(since));
        all.moments += sum.moments;
        all.kills += sum.kills;
        all.longest = all.longest.max(sum.longest);
        if let Err(error) = outcome {
            println!("{verb:?}, {role:?}: {error:#}");
            println!("{}", world().agent(role).log_tail());
            findings.push(error);
            ensure!(findings.len() < FINDINGS, "{} findings", findings.len());
            // What one verb left is not found again with each of the others.
            world().reset().await?;
            nothing = still(&world()).await?;
        }
    }
    if let Some(first) = findings.into_iter().next() {
        return Err(first);
    }
    world().reset().await?;
    expect(&world(), "nothing to be left", &nothing).await?;
    println!("steps: {}", all.words(began));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_verb_has_a_kill_and_all_have_all_where_that_is_asked_for() {
        let choice = |whole: Option<&str>| Choice {
            stride: 12,
            short_stride: 3,
            seed: 1,
            whole: whole.map(Into::into),
        };
        for (turn, count) in (0..).zip([1, 2, 11, 12, 13, 40]) {
            let moments = choice(None).moments(Verb::Stop, turn, count);
            assert!(!moments.is_empty() && moments.iter().all(|n| (1..=count).contains(n)));
        }
        assert_eq!(choice(None).moments(Verb::Create, 0, 8), [3, 6]);
        assert_eq!(choice(Some("all")).moments(Verb::Stop, 3, 3), [1, 2, 3]);
        assert!(choice(Some("Stop")).has_verb(Verb::Stop) && !choice(Some("Stop")).has_verb(Verb::Start));
    }
}
