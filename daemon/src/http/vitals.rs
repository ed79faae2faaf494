//! Whether a daemon lives, and whether it can do its work.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::Response;
use tokio::time::timeout;

use super::answer::json_text;
use super::metrics::Family;

/// Whoever asks for health waits no longer. A daemon that takes longer for a look at itself is not well.
const LOOK_LIMIT: Duration = Duration::from_secs(3);

/// How a part of a daemon does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Well.
    Good,
    /// Well, and at something that others want to know of.
    Busy(String),
    /// It cannot do all that it is for, and a restart would not help: why, and what would.
    Impaired(String),
    /// It does not answer; only a restart helps.
    Dead(String),
}

/// One part of a daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Which.
    pub name: &'static str,
    /// How it does.
    pub condition: Condition,
}

impl Check {
    /// A part that is well unless there is a problem.
    #[must_use]
    pub fn new(name: &'static str, problem: Option<String>) -> Self {
        Self {
            name,
            condition: problem.map_or(Condition::Good, Condition::Impaired),
        }
    }
}

/// What a daemon says of itself.
#[tonic::async_trait]
pub trait Vitals: Send + Sync + 'static {
    /// How its parts do.
    async fn checks(&self) -> Vec<Check>;
    /// Its figures.
    async fn figures(&self) -> Vec<Family>;
}

/// All parts, in bounded time.
pub(super) async fn look(vitals: &dyn Vitals) -> Vec<Check> {
    timeout(LOOK_LIMIT, vitals.checks()).await.unwrap_or_else(|_| {
        vec![Check {
            name: "daemon",
            condition: Condition::Dead(format!("it did not answer within {} s", LOOK_LIMIT.as_secs())),
        }]
    })
}

/// Whether all parts are well.
pub(super) fn all_good(checks: &[Check]) -> bool {
    let well = |check: &Check| matches!(check.condition, Condition::Good | Condition::Busy(_));
    checks.iter().all(well)
}

/// Whether the process is worth keeping: a full disk is no reason to restart it.
pub(super) async fn healthz(vitals: &dyn Vitals) -> Response {
    let checks = look(vitals).await;
    let alive = !checks
        .iter()
        .any(|check| matches!(check.condition, Condition::Dead(_)));
    told(alive, &checks)
}

/// Whether it can take work on.
pub(super) async fn readyz(vitals: &dyn Vitals) -> Response {
    let checks = look(vitals).await;
    told(all_good(&checks), &checks)
}

fn told(passes: bool, checks: &[Check]) -> Response {
    let parts: Vec<_> = checks
        .iter()
        .map(|check| match &check.condition {
            Condition::Good => serde_json::json!({ "name": check.name, "state": "good" }),
            Condition::Busy(why) => serde_json::json!({ "name": check.name, "state": "busy", "why": why }),
            Condition::Impaired(why) => {
                serde_json::json!({ "name": check.name, "state": "impaired", "why": why })
            }
            Condition::Dead(why) => serde_json::json!({ "name": check.name, "state": "dead", "why": why }),
        })
        .collect();
    let state = if all_good(checks) {
        "good"
    } else if checks
        .iter()
        .any(|check| matches!(check.condition, Condition::Dead(_)))
    {
        "dead"
    } else {
        "impaired"
    };
    let status = if passes {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    json_text(
        status,
        serde_json::json!({ "state": state, "checks": parts }).to_string(),
    )
}
