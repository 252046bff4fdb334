//! `/metrics`, `/livez` and `/readyz`.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, watch::Heard};

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
    health.metrics.watch_ages(&health.heard.ages());
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
    match health.heard.wedged() {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::StreamExt;
    use k8s_openapi::api::core::v1::Service;
    use kube::{Client, client::Body};
    use tower_test::mock;

    use super::*;
    use crate::watch::Watches;

    /// Asked over the network, as the kubelet does it.
    async fn ask(port: u16, path: &str) -> (u16, String) {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client.get(format!("http://127.0.0.1:{port}{path}"));
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    #[tokio::test]
    async fn a_process_is_ready_when_it_has_reached_the_api_server_and_alive_until_a_watch_is_wedged() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = Heard::with_patience(Duration::from_secs(1), Duration::from_secs(3));
        let (reach, reached) = watch::channel(false);
        let (metrics, stop) = (Metrics::new(), CancellationToken::new());
        let health = Health {
            metrics: metrics.clone(),
            heard: heard.clone(),
            reached,
        };
        let served = tokio::spawn(serve(listener, health, stop.clone()));

        assert_eq!(
            ask(port, "/readyz").await,
            (503, "the API server has not answered yet".to_owned())
        );
        reach.send_replace(true);
        assert_eq!(ask(port, "/readyz").await, (200, "ready".to_owned()));
        // Standing by, it watches nothing.
        assert_eq!(ask(port, "/livez").await, (200, "alive".to_owned()));

        // An API server that takes requests and never answers.
        let (service, _unanswered) = mock::pair::<http::Request<Body>, http::Response<Body>>();
        let watches = Watches {
            client: Client::new(service, "ns"),
            namespace: None,
            metrics,
            heard,
        };
        let mut events = watches.events::<Service>("Service", "").boxed();
        tokio::spawn(async move { while events.next().await.is_some() {} });
        assert_eq!(ask(port, "/livez").await, (200, "alive".to_owned()));
        let wedged = async {
            loop {
                let (code, text) = ask(port, "/livez").await;
                if code != 200 {
                    return (code, text);
                }
            }
        };
        let (code, text) = tokio::time::timeout(Duration::from_mins(1), wedged)
            .await
            .unwrap();
        assert_eq!(code, 503);
        assert!(
            text.starts_with("the watch of Service has been silent for"),
            "{text}"
        );
        assert_eq!(ask(port, "/readyz").await.0, 200);
        let (code, page) = ask(port, "/metrics").await;
        assert_eq!(code, 200);
        let told = r#"exchange_operator_watch_age_seconds{kind="Service"}"#;
        assert!(page.contains(told), "{page}");

        stop.cancel();
        served.await.unwrap().unwrap();
    }
}
