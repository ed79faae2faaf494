//! Carries out plans: look, plan, and for each step journal, do, journal. It makes no choice.

use std::sync::Arc;

use crate::journal::{Journal, JournalError, Outcome};
use crate::plane::{Plane, PlaneError, Scope};
use crate::stack::{Obstacle, Step, Wanted, plan};

/// Why what was wanted was not reached.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// The look failed.
    #[error("what is on this host cannot be seen")]
    Inspect(#[source] PlaneError),
    /// A step failed; those before it stand, and the next attempt goes on from there.
    #[error("the step {} failed", .step.name())]
    Step {
        /// The step.
        step: Box<Step>,
        /// The reason.
        #[source]
        source: PlaneError,
    },
    /// What could be done is done, but not all could.
    #[error("{}", display(.0))]
    Obstacles(Vec<Obstacle>),
    /// The journal refused, so nothing more was begun.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

fn display(obstacles: &[Obstacle]) -> String {
    let texts: Vec<_> = obstacles.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// A plane with the journal of what it is told to do.
#[derive(Clone)]
pub struct Applier {
    /// Where steps go.
    pub plane: Arc<dyn Plane>,
    /// Where they are written down.
    pub journal: Journal,
}

impl Applier {
    /// Brings one part of the host to what is wanted of it.
    ///
    /// # Errors
    /// [`ReachError`] at the first step that fails, or with what the plan could not reach.
    pub async fn reach(&self, scope: &Scope, wanted: &Wanted) -> Result<(), ReachError> {
        let found = self.plane.inspect(scope).await.map_err(ReachError::Inspect)?;
        let plan = plan(wanted, &found);
        for step in plan.steps {
            self.apply(step).await?;
        }
        if plan.obstacles.is_empty() {
            Ok(())
        } else {
            Err(ReachError::Obstacles(plan.obstacles))
        }
    }

    /// Brings the whole host as near as it gets: a step that fails does not keep the others from being tried, so
    /// that one broken cache does not keep other VMs from their disks after a restart. Returns what went wrong.
    pub async fn reach_all(&self, wanted: &Wanted) -> Vec<ReachError> {
        let found = match self.plane.inspect(&Scope::All).await {
            Ok(found) => found,
            Err(error) => return vec![ReachError::Inspect(error)],
        };
        let plan = plan(wanted, &found);
        let mut errors = Vec::new();
        for step in plan.steps {
            if let Err(error) = self.apply(step).await {
                errors.push(error);
            }
        }
        if !plan.obstacles.is_empty() {
            errors.push(ReachError::Obstacles(plan.obstacles));
        }
        errors
    }

    /// Carries out one step, journalled as all are.
    ///
    /// # Errors
    /// [`ReachError`] where it fails.
    pub async fn step(&self, step: Step) -> Result<(), ReachError> {
        self.apply(step).await
    }

    async fn apply(&self, step: Step) -> Result<(), ReachError> {
        let intent = self.journal.intend(&step).await?;
        let result = self.plane.apply(&step).await;
        let outcome = match &result {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Failed(error.to_string()),
        };
        tracing::debug!(step = step.name(), ?outcome, "step");
        self.journal.settle(intent, outcome).await?;
        result.map_err(|source| ReachError::Step {
            step: Box::new(step),
            source,
        })
    }
}
