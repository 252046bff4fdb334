//! Version 2 with a fault, for tests of what releases it. The fault is named by `EXCHANGE_FAULT`; no other binary knows
//! the variable, or has any of this.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{
    extract::{FromRequestParts, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use clap::ValueEnum;
use exchange::{
    app::App,
    auth::Caller,
    cli,
    error::ApiError,
    release::{Release, V2},
};
use http::{Method, request::Parts};
use utoipa_axum::router::OpenApiRouter;

/// How long a service that crashes lives.
const LIFE: Duration = Duration::from_secs(5);

/// Of so many live requests one is hurt.
const ONE_IN: u32 = 10;

/// Far more than any verification allows.
const SLOW: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Fault {
    /// Every order fails, in every lane.
    FailsSmoke,
    /// Of the requests in the live lane one in ten fails: no test lane shows it.
    FailsVerification,
    /// A service ends five seconds after each start.
    Crashes,
    /// No migration makes the schema what it needs.
    NeverReady,
    /// Of the requests in the live lane one in ten takes two seconds.
    SlowsDown,
}

impl Fault {
    fn release(self) -> Release {
        let version = match self {
            Self::FailsSmoke => "2.0.1-fails-smoke",
            Self::FailsVerification => "2.0.2-fails-verification",
            Self::Crashes => "2.0.3-crashes",
            Self::NeverReady => "2.0.4-never-ready",
            Self::SlowsDown => "2.0.5-slows-down",
        };
        let level = if self == Self::NeverReady { 9999 } else { V2.level };
        Release { version, level, ..V2 }
    }
}

/// The fault at work in one service.
#[derive(Clone)]
struct Faulty {
    fault: Fault,
    app: App,
    requests: Arc<AtomicU32>,
}

fn main() -> ExitCode {
    match fault() {
        Ok(fault) => cli::start(fault.release(), around),
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn fault() -> Result<Fault, String> {
    let name = std::env::var("EXCHANGE_FAULT").unwrap_or_default();
    Fault::from_str(&name, false).map_err(|_| format!("EXCHANGE_FAULT={name:?} is not a fault"))
}

fn around(app: App, routes: OpenApiRouter) -> OpenApiRouter {
    // It was one in `main`.
    let Ok(fault) = fault() else { return routes };
    if fault == Fault::Crashes {
        tokio::spawn(async {
            tokio::time::sleep(LIFE).await;
            eprintln!("crashes, as EXCHANGE_FAULT says");
            std::process::exit(70);
        });
    }
    let faulty = Faulty {
        fault,
        app,
        requests: Arc::default(),
    };
    routes.layer(middleware::from_fn_with_state(faulty, hurt))
}

async fn hurt(State(faulty): State<Faulty>, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    let hurts = match faulty.fault {
        Fault::FailsSmoke => parts.method == Method::POST && parts.uri.path() == "/trade/add",
        Fault::FailsVerification | Fault::SlowsDown => faulty.is_its_turn(&mut parts).await,
        Fault::Crashes | Fault::NeverReady => false,
    };
    match faulty.fault {
        Fault::SlowsDown if hurts => tokio::time::sleep(SLOW).await,
        _ if hurts => return ApiError::internal("as EXCHANGE_FAULT says").into_response(),
        _ => {}
    }
    next.run(Request::from_parts(parts, body)).await
}

impl Faulty {
    /// Whether a request is in the live lane, and its turn has come.
    async fn is_its_turn(&self, parts: &mut Parts) -> bool {
        let caller = Caller::from_request_parts(parts, &self.app).await;
        caller.is_ok_and(|caller| caller.lane.is_live())
            && self.requests.fetch_add(1, Ordering::Relaxed) % ONE_IN == ONE_IN - 1
    }
}
