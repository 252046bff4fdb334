//! The user service.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    app::App,
    auth::Jwk,
    error::{ApiError, ProblemDocument},
};

/// The routes of the user service.
pub fn router(app: App) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(jwks)).with_state(app)
}

/// The keys that verify access tokens.
#[derive(Serialize, utoipa::ToSchema)]
struct JwkSet {
    keys: Vec<Jwk>,
}

/// The public keys that verify access tokens: all that are unexpired, also the one that will sign next.
#[utoipa::path(
    get,
    path = "/.well-known/jwks.json",
    tag = "user",
    responses((status = 200, body = JwkSet), (status = 503, body = ProblemDocument)),
)]
async fn jwks(State(app): State<App>) -> Result<Json<JwkSet>, ApiError> {
    Ok(Json(JwkSet {
        keys: app.keys.published().await?,
    }))
}
