//! Extractors whose rejections are problem documents that name the field.

use std::net::{IpAddr, SocketAddr};

use axum::{
    body::Bytes,
    extract::{ConnectInfo, FromRequest, FromRequestParts, Request, rejection::BytesRejection},
    http::{StatusCode, header, request::Parts},
};
use serde::de::DeserializeOwned;

use crate::{
    app::App,
    error::{self, ApiError},
};

/// A JSON body.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let content_type = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        let media_type = content_type
            .and_then(|value| value.split(';').next())
            .map(str::trim);
        if !media_type.is_some_and(|media_type| media_type.eq_ignore_ascii_case("application/json")) {
            return Err(error::UNSUPPORTED_MEDIA_TYPE.into());
        }
        let body = tokio::time::timeout(app.config.request_timeout, Bytes::from_request(request, app))
            .await
            .map_err(|_| ApiError::from(error::REQUEST_TIMEOUT))?
            .map_err(|rejection: BytesRejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ApiError::from(error::BODY_TOO_LARGE),
                _ => ApiError::from(error::INVALID_BODY).detail("the body was cut off"),
            })?;
        let mut deserializer = serde_json::Deserializer::from_slice(&body);
        let value = serde_path_to_error::deserialize(&mut deserializer)
            .map_err(|error| at_path(error::INVALID_BODY, error))?;
        deserializer
            .end()
            .map_err(|error| ApiError::from(error::INVALID_BODY).detail(error.to_string()))?;
        Ok(Self(value))
    }
}

/// The query parameters.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|rejection| ApiError::from(error::INVALID_PARAMETER).detail(rejection.body_text()))
    }
}

/// The path parameters.
#[derive(Debug)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        axum::extract::Path::from_request_parts(parts, state)
            .await
            .map(|axum::extract::Path(value)| Self(value))
            .map_err(|rejection| ApiError::from(error::INVALID_PARAMETER).detail(rejection.body_text()))
    }
}

/// The address of the client: of the connection, or, behind trusted proxies, the last one that is not theirs.
#[derive(Clone, Copy, Debug)]
pub struct ClientAddress(pub IpAddr);

impl FromRequestParts<App> for ClientAddress {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let ConnectInfo(peer) = parts
            .extensions
            .get::<ConnectInfo<SocketAddr>>()
            .ok_or_else(|| ApiError::internal("the accept loop left no peer address"))?;
        let trusted = |address: IpAddr| {
            app.config
                .trusted_proxies
                .iter()
                .any(|network| network.contains(&address))
        };
        let forwarded: Vec<IpAddr> = parts
            .headers
            .get_all("x-forwarded-for")
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map_while(|address| address.trim().parse().ok())
            .collect();
        let mut client = peer.ip().to_canonical();
        for address in forwarded.into_iter().rev() {
            if !trusted(client) {
                break;
            }
            client = address.to_canonical();
        }
        Ok(Self(client))
    }
}

fn at_path(problem: error::Problem, error: serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    let path = error.path().to_string();
    let detail = ApiError::from(problem).detail(error.into_inner().to_string());
    if path == "." { detail } else { detail.field(path) }
}
