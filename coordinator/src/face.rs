//! The coordinator as HTTP: the verbs that people and platforms ask for, its health and its figures. The verbs of hosts are left
//! out: a host speaks gRPC.

use std::time::{Duration, Instant};

use tokio::time::timeout;
use treeboot_daemon::http::metrics::{Family, Labels};
use treeboot_daemon::http::{Check, Condition, Face, Method, Route, Vitals};

use crate::owner::Handle;
use crate::tree::{Census, Forest};

/// How long the owner of the trees may take for an answer. Its longest steps, a flush of the record to a slow disk
/// among them, take less.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

const ROUTES: &[Route] = &[
    Route::new(Method::Get, "/v1/hosts", "Coordinator/ListHosts"),
    Route::new(Method::Get, "/v1/images", "Coordinator/ListImages"),
    Route::new(Method::Post, "/v1/images", "Coordinator/AddImage"),
    Route::new(Method::Get, "/v1/images/{image=id.name}", "Coordinator/GetImage")
        .with(&[("version", "id.version")]),
    Route::new(
        Method::Delete,
        "/v1/images/{image=id.name}",
        "Coordinator/RemoveImage",
    )
    .with(&[("version", "id.version"), ("force", "force")]),
    Route::new(
        Method::Post,
        "/v1/images/{image=name}/labels",
        "Coordinator/LabelImage",
    ),
    Route::new(
        Method::Get,
        "/v1/images/{image=image.name}/tree",
        "Coordinator/GetTree",
    )
    .with(&[("version", "image.version")]),
    Route::new(
        Method::Get,
        "/v1/images/{image=image.name}/exports",
        "Coordinator/Search",
    )
    .with(&[("version", "image.version"), ("host", "host"), ("limit", "limit")]),
];

/// The face of a coordinator.
pub(crate) fn face(insecure: bool) -> Face {
    Face {
        title: "treeboot coordinator",
        descriptors: treeboot_proto::DESCRIPTORS,
        package: "treeboot.v1",
        service: "Coordinator",
        routes: ROUTES,
        insecure,
    }
}

/// What is seen of the coordinator over the owner's handle.
#[derive(Debug)]
pub(crate) struct Life {
    owner: Handle,
    started: Instant,
}

impl Life {
    pub(crate) fn new(owner: Handle, started: Instant) -> Self {
        Self { owner, started }
    }

    async fn census(&self) -> Option<Census> {
        let census = timeout(ANSWER_LIMIT, self.owner.ask(Forest::census)).await;
        census.ok()?.ok()
    }
}

#[tonic::async_trait]
impl Vitals for Life {
    async fn checks(&self) -> Vec<Check> {
        let answered = timeout(ANSWER_LIMIT, self.owner.ask(Forest::is_rebuilding)).await;
        let health = self.owner.health().borrow().clone();
        let rebuilding = match answered {
            Ok(Ok(rebuilding)) => rebuilding,
            Ok(Err(stopping)) => return vec![Check::new("trees", Some(stopping.to_string()))],
            Err(_) => {
                let limit = ANSWER_LIMIT.as_secs();
                return vec![Check {
                    name: "trees",
                    condition: Condition::Dead(format!(
                        "the owner of the trees did not answer within {limit} s"
                    )),
                }];
            }
        };
        // Not impaired: were it taken out of service, the hosts could not come.
        let condition = if rebuilding {
            let words = "the record was lost; hosts are telling where they stand, and until they have nobody is given a place";
            Condition::Busy(words.to_owned())
        } else {
            Condition::Good
        };
        let trees = Check {
            name: "trees",
            condition,
        };
        vec![trees, Check::new("record", health.not_saved)]
    }

    async fn figures(&self) -> Vec<Family> {
        let mut families = counted(&self.owner);
        families.push(Family::gauge(
            "treeboot_coordinator_uptime_seconds",
            "Since the coordinator's start.",
            self.started.elapsed().as_secs_f64(),
        ));
        // Without them where the owner does not answer: the counters are what tells why.
        if let Some(census) = self.census().await {
            families.extend(of_trees(&census));
        }
        families
    }
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn of_trees(census: &Census) -> Vec<Family> {
    let labelled = |label: &'static str, word: &str| -> Labels { vec![(label, word.to_owned())] };
    let images = || census.images.iter().map(|image| (image.id.to_string(), image));
    let states = images().flat_map(|(id, image)| {
        let states = [
            ("ready", image.ready),
            ("pending", image.pending),
            ("lost", image.lost),
        ];
        states.map(|(state, count)| {
            (
                vec![("image", id.clone()), ("state", state.to_owned())],
                count as f64,
            )
        })
    });
    let depths = images().flat_map(|(id, image)| {
        let depths = image.depths.iter().enumerate();
        depths.map(move |(stripe, depth)| {
            (
                vec![("image", id.clone()), ("stripe", stripe.to_string())],
                f64::from(*depth),
            )
        })
    });
    vec![
        Family::gauges(
            "treeboot_coordinator_hosts",
            "Hosts by state: connected, or silent with a lease that is not over.",
            [
                (labelled("state", "connected"), census.connected as f64),
                (labelled("state", "silent"), census.silent as f64),
            ],
        ),
        Family::gauge(
            "treeboot_coordinator_vms",
            "VMs that run on all hosts.",
            census.vms as f64,
        ),
        Family::gauge(
            "treeboot_coordinator_images",
            "Images in the record.",
            census.images.len() as f64,
        ),
        Family::gauges(
            "treeboot_coordinator_image_origins",
            "Origins of an image.",
            images().map(|(id, image)| (vec![("image", id)], image.origins as f64)),
        ),
        Family::gauges(
            "treeboot_coordinator_image_hosts",
            "Hosts in an image's trees: ready, pending (they have a place and no export yet); of both, those that are silent are lost.",
            states,
        ),
        Family::gauges(
            "treeboot_coordinator_tree_depth",
            "Steps from an origin to the host that is farthest from one.",
            depths,
        ),
        Family::gauge(
            "treeboot_coordinator_rebuilding",
            "1 while places are learned from the hosts and none are given out.",
            f64::from(u8::from(census.rebuilding)),
        ),
        Family::gauge(
            "treeboot_coordinator_epoch_incarnation",
            "How often the record began anew.",
            census.epoch.incarnation as f64,
        ),
        Family::gauge(
            "treeboot_coordinator_epoch_counter",
            "Decisions of this incarnation.",
            census.epoch.counter as f64,
        ),
    ]
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn counted(owner: &Handle) -> Vec<Family> {
    let count = owner.figures();
    let (waiting, room) = owner.queue();
    let health = owner.health().borrow().clone();
    vec![
        Family::gauge(
            "treeboot_coordinator_queue_length",
            "Requests that wait for the owner of the trees.",
            waiting as f64,
        ),
        Family::gauge(
            "treeboot_coordinator_queue_limit",
            "Requests that may wait for it.",
            room as f64,
        ),
        Family::counter(
            "treeboot_coordinator_beats_total",
            "Heartbeats of hosts.",
            count.beats.get(),
        ),
        Family::counter(
            "treeboot_coordinator_calls_total",
            "Calls that change something.",
            count.calls.get(),
        ),
        Family::counter(
            "treeboot_coordinator_refusals_total",
            "Calls and beats that were refused.",
            count.refusals.get(),
        ),
        Family::counter(
            "treeboot_coordinator_hosts_came_total",
            "Hosts that came.",
            count.hosts_came.get(),
        ),
        Family::counter(
            "treeboot_coordinator_hosts_left_total",
            "Hosts that left by themselves.",
            count.hosts_left.get(),
        ),
        Family::counter(
            "treeboot_coordinator_hosts_lost_total",
            "Hosts whose lease ended.",
            count.hosts_lost.get(),
        ),
        Family::counter(
            "treeboot_coordinator_placements_total",
            "Places that were given out.",
            count.placed.get(),
        ),
        Family::counter(
            "treeboot_coordinator_adoptions_total",
            "Places that hosts had already, and told of.",
            count.adopted.get(),
        ),
        Family::counter(
            "treeboot_coordinator_moves_total",
            "Hosts that got other parents.",
            count.moved.get(),
        ),
        Family::counter(
            "treeboot_coordinator_slot_leases_ended_total",
            "Places that ended because nobody kept their lease.",
            count.slot_leases_ended.get(),
        ),
        Family::counter(
            "treeboot_coordinator_complaints_total",
            "Reports of hosts about a parent.",
            count.complaints.get(),
        ),
        Family::counter(
            "treeboot_coordinator_pushed_placements_total",
            "Placements sent over heartbeat streams.",
            count.pushed_placements.get(),
        ),
        Family::counter(
            "treeboot_coordinator_slow_hosts_total",
            "Streams that were closed because their host did not read.",
            count.slow_hosts.get(),
        ),
        Family::counter(
            "treeboot_coordinator_deaf_seconds_total",
            "Time in which the coordinator did not run, or its clock jumped; leases do not count it.",
            count.deaf_ms.get() / 1e3,
        ),
        Family::counter(
            "treeboot_coordinator_record_writes_total",
            "Attempts to write the record.",
            count.writes.get(),
        ),
        Family::counter(
            "treeboot_coordinator_record_write_errors_total",
            "Those that failed.",
            count.write_errors.get(),
        ),
        Family::counter(
            "treeboot_coordinator_record_write_seconds_total",
            "Time that they took.",
            count.write_us.get() / 1e6,
        ),
        Family::gauge(
            "treeboot_coordinator_record_unsaved",
            "Changes that are not durable yet.",
            health.waiting as f64,
        ),
        Family::gauge(
            "treeboot_coordinator_record_failing",
            "1 while the newest attempt to write the record had failed.",
            f64::from(u8::from(health.not_saved.is_some())),
        ),
    ]
}
