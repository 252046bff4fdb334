//! The admin port: `/livez`, `/readyz`, `/metrics` and `/stack`.

use std::sync::atomic::Ordering;

use axum::{
    Json, Router, extract::State, http::StatusCode, http::header, response::IntoResponse, routing::get,
};
use serde::Serialize;

use crate::{app::App, role::Role};

/// What a stack says about itself, per process.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StackReport<'a> {
    colour: &'a str,
    revision: &'a str,
    version: &'a str,
    role: Role,
    /// Requests on the public port.
    in_flight: usize,
    /// Connections on the public port.
    connections: usize,
    /// Whether it takes messages of the live lane from the queue.
    consuming: bool,
    /// The identity of the database, when it has been reached.
    database: Option<uuid::Uuid>,
}

/// The routes of the admin port.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/livez", get(|| async { "alive" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/stack", get(stack))
        .with_state(app)
}

/// Needs the database once, at start. A store that is lost later is the affair of each request: an empty Service
/// would help nobody.
async fn readyz(State(app): State<App>) -> impl IntoResponse {
    match app.readiness.borrow().as_ref() {
        Ok(()) => (StatusCode::OK, "ready".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason.clone()),
    }
}

async fn metrics(State(app): State<App>) -> impl IntoResponse {
    app.gauges.update(&app);
    match app.metrics.encode() {
        Ok(page) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(header::CONTENT_TYPE, content_type)], page).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn stack(State(app): State<App>) -> impl IntoResponse {
    Json(StackReport {
        colour: &app.stack.colour,
        revision: &app.stack.revision,
        version: app.stack.version,
        role: *app.role.borrow(),
        in_flight: app.counts.in_flight(),
        connections: app.counts.connections(),
        consuming: app.consuming.load(Ordering::Relaxed),
        database: app.database_identity.get().copied(),
    })
    .into_response()
}
