//! `/metrics`, `/livez` and `/readyz`.

use std::time::Duration;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    watch::{Heard, WEDGED},
};

/// What is told about a process.
#[derive(Clone)]
pub struct Health {
    /// Its metrics.
    pub metrics: Metrics,
    /// When its watches were heard of; none while it stands by.
    pub heard: Heard,
    /// Whether the API server has answered it at least once.
    pub reached: watch::Receiver<bool>,
}

/// Serves until it is told to stop.
pub async fn serve(listener: TcpListener, health: Health, stop: CancellationToken) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(health);
    axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn metrics(State(health): State<Health>) -> Response {
    for (kind, age) in health.heard.ages() {
        health.metrics.watch_age(kind, age);
    }
    match health.metrics.encode() {
        Ok(page) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content_type)], page).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Not alive if a watch has been silent for so long that beginning it anew must have failed twice.
async fn livez(State(health): State<Health>) -> Response {
    let silent: Vec<(&'static str, Duration)> = health
        .heard
        .ages()
        .into_iter()
        .filter(|(_, age)| *age > WEDGED)
        .collect();
    match silent.first() {
        None => "alive".into_response(),
        Some((kind, age)) => {
            let text = format!("the watch of {kind} has been silent for {} s", age.as_secs());
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

/// Ready as soon as the API server has answered; whether it leads or stands by.
async fn readyz(State(health): State<Health>) -> Response {
    if *health.reached.borrow() {
        "ready".into_response()
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the API server has not answered yet",
        )
            .into_response()
    }
}
