//! The emulator's own controls, for demonstrations: faults, the log of calls, the clock.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Shared;
use crate::calls::{Call, Mark};
use crate::faults::{Fault, FaultId, FaultScope};

type App = State<Arc<Shared>>;

pub(super) fn router() -> Router<Arc<Shared>> {
    Router::new()
        .route("/health", get(async || "ok\n"))
        .route("/keys", get(list_keys))
        .route("/faults", get(list_faults).post(set_fault).delete(clear_faults))
        .route("/faults/{id}", delete(remove_fault))
        .route("/calls", get(list_calls).delete(clear_calls))
        .route("/clock", get(read_clock).post(advance_clock))
        .route("/data-keys", get(list_data_keys))
}

/// A misspelt part of the scope must not turn into a fault that hits everything.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewFault {
    region: Option<String>,
    operation: Option<String>,
    account: Option<String>,
    key: Option<String>,
    fault: Fault,
    times: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Filter {
    /// Calls with this number or a later one.
    since: Option<u64>,
    operation: Option<String>,
    region: Option<String>,
    key: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Advance {
    advance_seconds: u64,
}

async fn list_keys(State(shared): App) -> Json<Value> {
    Json(json!({"keys": shared.engine.key_arns()}))
}

async fn list_faults(State(shared): App) -> Json<Value> {
    Json(json!({"faults": shared.faults.list()}))
}

async fn set_fault(State(shared): App, Json(new): Json<NewFault>) -> Json<Value> {
    let NewFault { region, operation, account, key, fault, times } = new;
    let scope = FaultScope { region, operation, account, key };
    let id = shared.faults.insert(scope, fault, times);
    Json(json!({"id": id}))
}

async fn clear_faults(State(shared): App) -> StatusCode {
    shared.faults.clear();
    StatusCode::NO_CONTENT
}

async fn remove_fault(State(shared): App, Path(id): Path<FaultId>) -> StatusCode {
    if shared.faults.remove(id) { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

async fn list_calls(State(shared): App, Query(filter): Query<Filter>) -> Json<Value> {
    let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
    let mut calls = shared.calls.since(Mark(filter.since.unwrap_or(0)));
    calls.retain(|call: &Call| {
        is(&filter.operation, &call.operation)
            && is(&filter.region, &call.region)
            && is(&filter.key, call.key.as_deref().unwrap_or_default())
    });
    Json(json!({"count": calls.len(), "next": shared.calls.mark().0, "calls": calls}))
}

async fn clear_calls(State(shared): App) -> StatusCode {
    shared.calls.clear();
    StatusCode::NO_CONTENT
}

async fn read_clock(State(shared): App) -> Json<Value> {
    let clock = &shared.engine.clock;
    Json(json!({
        "advanced_seconds": clock.advanced().as_secs(),
        "frozen": clock.is_frozen(),
        "now": clock.now().rfc3339(),
    }))
}

async fn advance_clock(State(shared): App, Json(advance): Json<Advance>) -> Json<Value> {
    shared.engine.clock.advance(Duration::from_secs(advance.advance_seconds));
    read_clock(State(shared)).await
}

async fn list_data_keys(State(shared): App) -> Response {
    match shared.engine.data_keys() {
        Some(keys) => {
            let keys: Vec<String> = keys.iter().map(|key| STANDARD.encode(key)).collect();
            Json(json!({"data_keys": keys})).into_response()
        }
        None => {
            (StatusCode::FORBIDDEN, "the emulator was not started to remember data keys\n").into_response()
        }
    }
}
