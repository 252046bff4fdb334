//! Metrics in the OpenMetrics text format: rate, errors and duration per route template, and what modules add.

use std::{
    fmt,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use prometheus_client::{
    encoding::{EncodeGaugeValue, EncodeLabelSet, EncodeMetric, MetricEncoder, text},
    metrics::{MetricType, counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};
use tracing::info;

use crate::{
    app::App,
    error::{ApiError, Problem},
    lane::Lane,
    telemetry::TraceContext,
};

/// What a request is counted as that could not be answered because its client had hung up, or its connection was cut: nginx's
/// "client closed request". No client ever sees it.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// The metrics of a process. Clones share them.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    requests: Family<RequestLabels, Counter>,
    problems: Family<ProblemLabels, Counter>,
    durations: Family<RouteLabels, Histogram>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: String,
    lane: &'static str,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ProblemLabels {
    method: String,
    route: String,
    lane: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabels {
    method: String,
    route: String,
    lane: &'static str,
}

/// Whose request this is, as soon as somebody knows; put into each request's extensions by [`observe`].
#[derive(Clone, Default)]
pub struct RequestLane(Arc<OnceLock<&'static str>>);

impl RequestLane {
    /// Records whose request this is. The first one to know is right.
    pub fn set(&self, lane: &Lane) {
        self.0.get_or_init(|| lane.kind());
    }
}

/// How long the body of a request was awaited, which is its client's time; put into each request's extensions by [`observe`].
#[derive(Clone, Default)]
pub struct Awaited(Arc<AtomicU64>);

impl Awaited {
    /// The body is awaited until what is returned is dropped.
    pub fn begin(&self) -> Awaiting {
        Awaiting(self.clone(), Instant::now())
    }

    fn time(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// A body that is awaited: until this is dropped, also because the client has hung up.
#[must_use]
pub struct Awaiting(Awaited, Instant);

impl Drop for Awaiting {
    fn drop(&mut self) {
        let Self(Awaited(time), since) = self;
        let nanoseconds = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        time.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

/// A gauge that is there while its value is known: no news is no good news, and neither is old news. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Known<N>(Arc<Mutex<Option<N>>>);

impl<N: Copy> Known<N> {
    /// This is how it is now.
    pub fn set(&self, value: N) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    /// Nobody knows any more.
    pub fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn get(&self) -> Option<N> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<N: Copy + EncodeGaugeValue> EncodeMetric for Known<N> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        self.get().map_or(Ok(()), |value| encoder.encode_gauge(&value))
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }

    fn is_empty(&self) -> bool {
        self.get().is_none()
    }
}

impl Metrics {
    /// Metrics of a new process.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let requests = Family::default();
        registry.register(
            "http_server_requests",
            "Requests by the status of their answer; 499: the client has hung up before it",
            requests.clone(),
        );
        let problems = Family::default();
        registry.register(
            "http_server_problems",
            "Requests answered with a problem, by its code",
            problems.clone(),
        );
        let durations = Family::new_with_constructor(latencies as fn() -> Histogram);
        registry.register(
            "http_server_request_duration_seconds",
            "Time from the header of a request to the header of its response, or until the client has hung up; without the time in \
             which its body was awaited, and without requests that were refused (4xx)",
            durations.clone(),
        );
        Self {
            registry: Arc::new(Mutex::new(registry)),
            requests,
            problems,
            durations,
        }
    }

    /// Lets a module add its own metrics.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Everything, as a scraper reads it.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut page = String::new();
        text::encode(
            &mut page,
            &self.registry.lock().unwrap_or_else(PoisonError::into_inner),
        )?;
        Ok(page)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Middleware: continues the client's trace, counts and times the request, and logs one line for it.
pub async fn observe(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let trace = TraceContext::continued(request.headers());
    let observed = Observed::begin(app.metrics.clone(), &mut request);
    trace
        .scope(async move {
            // A panic is a failure like any other: answered, and counted.
            let response = AssertUnwindSafe(next.run(request)).catch_unwind().await;
            let response =
                response.unwrap_or_else(|_| ApiError::internal("a handler panicked").into_response());
            observed.answered(&response);
            response
        })
        .await
}

/// A request under way, which is counted and logged when it is over: also one whose client has hung up, so that nobody asks for
/// its answer any more and this is dropped with it.
struct Observed {
    metrics: Metrics,
    method: String,
    route: String,
    lane: RequestLane,
    awaited: Awaited,
    start: Instant,
    status: u16,
    problem: Option<&'static str>,
}

impl Observed {
    fn begin(metrics: Metrics, request: &mut Request) -> Self {
        let lane = RequestLane::default();
        let awaited = Awaited::default();
        request.extensions_mut().insert(lane.clone());
        request.extensions_mut().insert(awaited.clone());
        let matched = request.extensions().get::<MatchedPath>();
        Self {
            metrics,
            method: known_method(request.method()).to_owned(),
            route: matched.map_or("unmatched", MatchedPath::as_str).to_owned(),
            lane,
            awaited,
            start: Instant::now(),
            status: CLIENT_CLOSED_REQUEST,
            problem: None,
        }
    }

    fn answered(mut self, response: &Response) {
        self.status = response.status().as_u16();
        self.problem = response.extensions().get::<Problem>().map(|problem| problem.code);
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        let elapsed = self.start.elapsed();
        let lane = self.lane.0.get().copied().unwrap_or("live");
        let (method, route, status) = (&self.method, &self.route, self.status);
        let labels = RouteLabels {
            method: method.clone(),
            route: route.clone(),
            lane,
        };
        // Whoever is refused can have taken any time for it, and a verification goes by these figures.
        if !(400..CLIENT_CLOSED_REQUEST).contains(&status) {
            let own = elapsed.saturating_sub(self.awaited.time());
            self.metrics
                .durations
                .get_or_create(&labels)
                .observe(own.as_secs_f64());
        }
        let labels = RequestLabels {
            method: method.clone(),
            route: route.clone(),
            lane,
            status,
        };
        self.metrics.requests.get_or_create(&labels).inc();
        if let Some(code) = self.problem {
            let labels = ProblemLabels {
                method: method.clone(),
                route: route.clone(),
                lane,
                code,
            };
            self.metrics.problems.get_or_create(&labels).inc();
        }
        let nanoseconds = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        info!(
            http.request.method = method,
            http.route = route,
            http.response.status_code = status,
            event.duration = nanoseconds,
            labels.lane = lane,
            "{method} {route} {status}",
        );
    }
}

/// Bounds in seconds. A verification gives a version up when its p99 lies beyond the first bound that is not below its
/// limit: they are close enough, and go as far as a limit can.
fn latencies() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2,
        0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0,
        60.0,
    ])
}

/// Clients can invent methods; a metric label must not grow with them.
fn known_method(method: &http::Method) -> &str {
    match method.as_str() {
        known @ ("GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS") => known,
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, body::Body, http::StatusCode, middleware, routing::get};
    use clap::Parser;
    use tokio::sync::watch;
    use tower::ServiceExt;

    use super::*;
    use crate::{config::ConfigArgs, release::V1, role::Role};

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: ConfigArgs,
    }

    fn app() -> App {
        let flags = [
            "exchange",
            "--database-url=postgres://localhost/exchange",
            "--role=live",
        ];
        let config = Command::parse_from(flags).args.validate().unwrap();
        let (role, readiness) = (watch::channel(Role::Live).1, watch::channel(Ok(())).1);
        App::new("test", V1, config, role, readiness).unwrap()
    }

    #[tokio::test]
    async fn a_panic_is_answered_and_counted() {
        let app = app();
        let router: Router = Router::new()
            .route(
                "/panics",
                get(async || -> &'static str { panic!("as the test wants") }),
            )
            .layer(middleware::from_fn_with_state(app.clone(), observe));
        let request = Request::get("/panics").body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let page = app.metrics.encode().unwrap();
        assert!(
            page.contains(r#"{method="GET",route="/panics",lane="live",status="500"} 1"#),
            "{page}"
        );
    }

    #[tokio::test]
    async fn the_time_of_clients_is_not_that_of_the_service() {
        let slow_client = async |request: Request| {
            let awaited = request.extensions().get::<Awaited>().unwrap().clone();
            let _awaiting = awaited.begin();
            tokio::time::sleep(Duration::from_millis(300)).await;
        };
        let app = app();
        let router: Router = Router::new()
            .route("/slow-client", get(slow_client))
            .route("/refused", get(async || StatusCode::UNAUTHORIZED))
            .layer(middleware::from_fn_with_state(app.clone(), observe));
        for path in ["/slow-client", "/refused"] {
            let request = Request::get(path).body(Body::empty()).unwrap();
            router.clone().oneshot(request).await.unwrap();
        }
        let page = app.metrics.encode().unwrap();
        let bucket = r#"duration_seconds_bucket{le="0.25",method="GET",route="/slow-client",lane="live"} 1"#;
        assert!(page.contains(bucket), "{page}");
        assert!(
            !page.contains(r#"duration_seconds_count{method="GET",route="/refused""#),
            "{page}"
        );
    }

    #[tokio::test]
    async fn a_request_that_nobody_waits_for_any_more_is_counted() {
        let app = app();
        let router: Router = Router::new()
            .route("/waits", get(std::future::pending::<()>))
            .layer(middleware::from_fn_with_state(app.clone(), observe));
        let request = Request::get("/waits").body(Body::empty()).unwrap();
        assert!(router.oneshot(request).now_or_never().is_none());
        let page = app.metrics.encode().unwrap();
        for line in [
            r#"http_server_requests_total{method="GET",route="/waits",lane="live",status="499"} 1"#,
            r#"http_server_request_duration_seconds_count{method="GET",route="/waits",lane="live"} 1"#,
        ] {
            assert!(page.contains(line), "{page}");
        }
    }
}
