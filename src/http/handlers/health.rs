//! `GET /live` and `GET /ready`: without credentials, and without telling anything but how the service is.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use crate::http::SharedState;

#[derive(Serialize, ToSchema)]
pub(in crate::http) struct Live {
    #[schema(example = "live")]
    status: &'static str,
}

/// Is the process alive?
///
/// Depends on nothing else: an outage of the KMS or the registry is no reason to restart the service.
#[utoipa::path(get, path = "/live", operation_id = "live", tag = "health",
    responses((status = 200, description = "It is", body = Live)))]
pub(in crate::http) async fn live() -> Json<Live> {
    Json(Live { status: "live" })
}

/// How the service is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Readiness {
    /// `ready`; `degraded`: it serves, but something is wrong; `unable`: it serves nothing.
    #[schema(example = "ready")]
    pub status: ReadinessStatus,
    /// What is wrong.
    pub reasons: Vec<String>,
}

/// How the service is, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReadinessStatus {
    /// It serves.
    Ready,
    /// It serves, but something is wrong.
    Degraded,
    /// It cannot serve.
    Unable,
}

/// Can the service serve?
///
/// The answer is a second old at most. A degraded service goes on serving, so it is in the load balancer's rotation.
#[utoipa::path(get, path = "/ready", operation_id = "ready", tag = "health",
    responses((status = 200, description = "It serves, perhaps degraded", body = Readiness),
              (status = 503, description = "It cannot serve now", body = Readiness)))]
pub(in crate::http) async fn ready(State(state): State<SharedState>) -> Response {
    let readiness = state.probe.readiness().await;
    let status = match readiness.status {
        ReadinessStatus::Ready | ReadinessStatus::Degraded => StatusCode::OK,
        ReadinessStatus::Unable => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(readiness)).into_response()
}
