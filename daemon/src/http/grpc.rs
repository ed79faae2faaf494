//! What stands beside a daemon's own gRPC service behind its gate: health, reflection, the figures.

use std::sync::Arc;
use std::time::Duration;

use axum::http::header;
use axum::routing::get;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::vitals::{all_good, look};
use super::{Face, FaceError, METRICS_PATH, Vitals, metrics};

/// How often health is looked at for those who watch it over gRPC.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// `own`, still to be put behind the gate and then handed to [`router`](super::router), with the standard health service (its answer is that of `/readyz`, for the daemon's service and for ""), reflection in
/// both of its versions, and the figures. Watches of health end when `stop` says so.
///
/// # Errors
/// [`FaceError`].
pub fn services(
    face: &Face,
    own: Routes,
    vitals: &Arc<dyn Vitals>,
    stop: watch::Receiver<bool>,
) -> Result<Routes, FaceError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(face.descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (reporter, health) = tonic_health::server::health_reporter();
    let service = format!("{}.{}", face.package, face.service);
    tokio::spawn(keep_health(reporter, service, Arc::clone(vitals), stop));
    let vitals = Arc::clone(vitals);
    let figures = move || async move {
        let text = metrics::text(&vitals.figures().await);
        ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text)
    };
    let routes = own
        .add_service(health)
        .add_service(reflection().build_v1().map_err(FaceError::Reflection)?)
        .add_service(reflection().build_v1alpha().map_err(FaceError::Reflection)?)
        .into_axum_router()
        .route(METRICS_PATH, get(figures));
    Ok(routes.into())
}

async fn keep_health(
    reporter: HealthReporter,
    service: String,
    vitals: Arc<dyn Vitals>,
    mut stop: watch::Receiver<bool>,
) {
    let mut clock = interval(LOOK_EVERY);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            _ = clock.tick() => {}
        }
        let status = if all_good(&look(&*vitals).await) {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for name in ["", &service] {
            reporter.set_service_status(name, status).await;
        }
    }
    // Whoever watches is told by the end of their stream.
    let mut reporter = reporter;
    for name in ["", &service] {
        reporter.clear_service_status(name).await;
    }
}
