//! Extractors whose rejections are problem documents that name the field.

use std::{
    error::Error as _,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use axum::{
    body::Bytes,
    extract::{
        ConnectInfo, FromRequest, FromRequestParts, MatchedPath, Request,
        rejection::{BytesRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode, header, request::Parts},
};
use ipnet::IpNet;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_path_to_error::Segment;

use crate::{
    app::App,
    error::{self, ApiError},
    metrics::Awaited,
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
        let awaited = request.extensions().get::<Awaited>().cloned().unwrap_or_default();
        let body = {
            let _awaiting = awaited.begin();
            tokio::time::timeout(app.config.request_timeout, Bytes::from_request(request, app)).await
        };
        let body = body
            .map_err(|_| ApiError::from(error::REQUEST_TIMEOUT))?
            .map_err(|rejection: BytesRejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ApiError::from(error::BODY_TOO_LARGE),
                _ => ApiError::from(error::INVALID_BODY).detail("the body was cut off"),
            })?;
        read(&body).map(Self)
    }
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| refused(body, error))?;
    deserializer
        .end()
        .map_err(|error| ApiError::from(error::INVALID_BODY).detail(error.to_string()))?;
    Ok(value)
}

/// Names the field at fault: its value is not one of those allowed, or it is missing, unknown, or there twice. What is not
/// JSON, or no object, is at fault as a whole.
fn refused(body: &[u8], error: serde_path_to_error::Error<serde_json::Error>) -> ApiError {
    // What is inside of an enumeration's value is nothing that clients know of.
    let keys = error.path().iter().map_while(|segment| match segment {
        Segment::Map { key } => Some(key.clone()),
        _ => None,
    });
    let mut field: Vec<String> = keys.collect();
    let detail = error.into_inner().to_string();
    // Of these the path leads to the object only, and the name is nowhere but in serde's words.
    let absent = ["missing field `", "duplicate field `"]
        .iter()
        .find_map(|words| detail.strip_prefix(words)?.split('`').next());
    field.extend(absent.map(ToOwned::to_owned));
    // The error does not tell: serde_json takes some values of the wrong kind for a mistake of syntax.
    let is_json = serde_json::from_slice::<IgnoredAny>(body).is_ok();
    if is_json && !field.is_empty() {
        ApiError::invalid_field(&field.join("."), detail)
    } else {
        ApiError::from(error::INVALID_BODY).detail(detail)
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
            .map_err(|rejection| {
                let error = ApiError::from(error::INVALID_PARAMETER).detail(rejection.body_text());
                match parameter(&rejection) {
                    Some(parameter) => error.field(parameter),
                    None => error,
                }
            })
    }
}

/// The query parameter at fault, if it is there.
fn parameter(rejection: &QueryRejection) -> Option<String> {
    let mut cause = rejection.source();
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<serde_path_to_error::Error<serde::de::value::Error>>() {
            return Some(found.path().to_string()).filter(|path| path != ".");
        }
        cause = error.source();
    }
    None
}

/// The path parameters.
#[derive(Debug)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let read = axum::extract::Path::from_request_parts(parts, state).await;
        read.map(|axum::extract::Path(value)| Self(value))
            .map_err(|rejection| {
                let error = ApiError::from(error::INVALID_PARAMETER).detail(rejection.body_text());
                // No path has more than one.
                let pattern = parts.extensions.get::<MatchedPath>().map(MatchedPath::as_str);
                let parameter = pattern.and_then(|pattern| pattern.split(['{', '}']).nth(1));
                match parameter {
                    Some(parameter) => error.field(parameter),
                    None => error,
                }
            })
    }
}

/// The address of the client: of the connection, or, behind trusted proxies, the last one that is not theirs. Of IPv6 the
/// network: whoever has an address has all of its /64.
#[derive(Clone, Copy, Debug)]
pub struct ClientAddress(pub IpAddr);

impl FromRequestParts<App> for ClientAddress {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let ConnectInfo(peer) = parts
            .extensions
            .get::<ConnectInfo<SocketAddr>>()
            .ok_or_else(|| ApiError::internal("the accept loop left no peer address"))?;
        Ok(Self(network(client_address(
            peer.ip(),
            &parts.headers,
            &app.config.trusted_proxies,
        ))))
    }
}

/// Each proxy appends the address that it was called from, so only from the right, and only as far as the proxies are ours,
/// is the list more than the client's invention. It ends at the first entry that is no address.
fn client_address(peer: IpAddr, headers: &HeaderMap, proxies: &[IpNet]) -> IpAddr {
    let trusted = |address: IpAddr| proxies.iter().any(|network| network.contains(&address));
    let values = headers.get_all("x-forwarded-for").iter().rev();
    let mut forwarded = values.flat_map(|value| value.to_str().unwrap_or_default().rsplit(','));
    let mut client = peer.to_canonical();
    while trusted(client)
        && let Some(Ok(address)) = forwarded.next().map(|entry| entry.trim().parse::<IpAddr>())
    {
        client = address.to_canonical();
    }
    client
}

/// What one client has for certain: an address of IPv4, or the 64 bits of one of IPv6 that it cannot choose.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "what matters is what cannot be read")]
    struct Parcel {
        size: Size,
        weight: u8,
        to: Option<Address>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Size {
        Small,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "what matters is what cannot be read")]
    struct Address {
        city: String,
    }

    #[test]
    fn the_field_at_fault_is_named() {
        read::<Parcel>(br#"{"size": "small", "weight": 1, "to": {"city": "x"}}"#).unwrap();
        for (body, field) in [
            (r#"{"size": "huge", "weight": 1}"#, "size"),
            (r#"{"size": 7, "weight": 1}"#, "size"),
            (r#"{"size": {"small": 1}, "weight": 1}"#, "size"),
            (r#"{"size": "small", "weight": 256}"#, "weight"),
            (r#"{"size": "small", "weight": null}"#, "weight"),
            (r#"{"size": "small", "weight": 1e999}"#, "weight"),
            (r#"{"size": "small"}"#, "weight"),
            (r#"{"size": "small", "weight": 1, "size": "small"}"#, "size"),
            (r#"{"size": "small", "weight": 1, "colour": 1}"#, "colour"),
            (r#"{"size": "small", "weight": 1, "to": {"city": 1}}"#, "to.city"),
            (r#"{"size": "small", "weight": 1, "to": {}}"#, "to.city"),
            (
                r#"{"size": "small", "weight": 1, "to": {"city": "x", "c": 1}}"#,
                "to.c",
            ),
        ] {
            let refusal = read::<Parcel>(body.as_bytes()).unwrap_err();
            assert_eq!(refusal.problem, error::INVALID_FIELD, "{body}");
            assert_eq!(refusal.field.as_deref(), Some(field), "{body}");
        }
        for body in [
            "",
            "{",
            "[]",
            "7",
            r#"{"size": "small", "weight": 1}}"#,
            r#"{"size": smal"#,
        ] {
            let refusal = read::<Parcel>(body.as_bytes()).unwrap_err();
            assert_eq!(
                (refusal.problem, refusal.field),
                (error::INVALID_BODY, None),
                "{body}"
            );
        }
    }

    #[test]
    fn a_client_cannot_choose_what_it_is_known_by() {
        for (address, known_by) in [
            ("203.0.113.7", "203.0.113.7"),
            ("::ffff:203.0.113.7", "203.0.113.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::"),
            ("2001:db8:1:3::1", "2001:db8:1:3::"),
        ] {
            assert_eq!(network(address.parse().unwrap()).to_string(), known_by);
        }
    }

    #[test]
    fn a_client_cannot_invent_its_address() {
        let proxies = ["10.0.0.0/8".parse().unwrap()];
        let client = |peer: &str, forwarded: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for value in forwarded {
                headers.append("x-forwarded-for", HeaderValue::from_bytes(value).unwrap());
            }
            client_address(peer.parse().unwrap(), &headers, &proxies).to_string()
        };
        let cases: &[(&str, &[&[u8]], &str)] = &[
            ("192.0.2.1", &[b"203.0.113.7"], "192.0.2.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &[b"203.0.113.7"], "203.0.113.7"),
            ("::ffff:10.0.0.1", &[b"::ffff:203.0.113.7"], "203.0.113.7"),
            // Two proxies of ours, in one header or in two.
            (
                "10.0.0.1",
                &[b"198.51.100.1, 203.0.113.7, 10.0.0.2"],
                "203.0.113.7",
            ),
            (
                "10.0.0.1",
                &[b"198.51.100.1, 203.0.113.7", b"10.0.0.2"],
                "203.0.113.7",
            ),
            // What a client has written stands before what the first proxy has appended, whatever it is.
            ("10.0.0.1", &[b"198.51.100.1, x, 203.0.113.7"], "203.0.113.7"),
            ("10.0.0.1", &[b"198.51.100.1, \xff, 203.0.113.7"], "10.0.0.1"),
            (
                "10.0.0.1",
                &[b"198.51.100.1, \xff", b"203.0.113.7"],
                "203.0.113.7",
            ),
            ("10.0.0.1", &[b"x,,, 203.0.113.7"], "203.0.113.7"),
            // Nothing to the left of garbage is looked at.
            ("10.0.0.1", &[b"198.51.100.1, x"], "10.0.0.1"),
            ("10.0.0.1", &[b"198.51.100.1, 10.0.0.3, x, 10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", &[b"198.51.100.1,"], "10.0.0.1"),
            ("10.0.0.1", &[b"198.51.100.1", b""], "10.0.0.1"),
        ];
        for (peer, forwarded, expected) in cases {
            assert_eq!(client(peer, forwarded), *expected, "{peer} {forwarded:?}");
        }
    }
}
