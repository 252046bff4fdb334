//! What goes wrong, as clients see it: RFC 9457 problem documents with a stable `code`.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

/// A kind of failure. The code is stable and documented; clients decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The HTTP status.
    pub status: StatusCode,
    /// The stable name.
    pub code: &'static str,
    /// One sentence for people.
    pub title: &'static str,
}

impl Problem {
    /// A kind of failure, for a module's constants.
    pub const fn new(status: StatusCode, code: &'static str, title: &'static str) -> Self {
        Self { status, code, title }
    }
}

/// The body is not JSON, or no object.
pub const INVALID_BODY: Problem = Problem::new(
    StatusCode::BAD_REQUEST,
    "invalid_body",
    "The body is not what this endpoint takes.",
);
/// A path or query parameter, or a header, cannot be read.
pub const INVALID_PARAMETER: Problem = Problem::new(
    StatusCode::BAD_REQUEST,
    "invalid_parameter",
    "A parameter cannot be read.",
);
/// One field has a value that is not allowed, or is missing, unknown, or there twice.
pub const INVALID_FIELD: Problem = Problem::new(
    StatusCode::UNPROCESSABLE_ENTITY,
    "invalid_field",
    "A field has a value that is not allowed.",
);
/// No valid access token.
pub const UNAUTHENTICATED: Problem = Problem::new(
    StatusCode::UNAUTHORIZED,
    "unauthenticated",
    "A valid access token is needed.",
);
/// The token does not allow this.
pub const FORBIDDEN: Problem = Problem::new(
    StatusCode::FORBIDDEN,
    "forbidden",
    "The caller is not allowed to do this.",
);
/// Nothing there, or nothing that the caller may see.
pub const NOT_FOUND: Problem = Problem::new(StatusCode::NOT_FOUND, "not_found", "There is no such thing.");
/// The path exists, the method does not.
pub const METHOD_NOT_ALLOWED: Problem = Problem::new(
    StatusCode::METHOD_NOT_ALLOWED,
    "method_not_allowed",
    "The path does not take this method.",
);
/// The body did not arrive in time.
pub const REQUEST_TIMEOUT: Problem = Problem::new(
    StatusCode::REQUEST_TIMEOUT,
    "request_timeout",
    "The body did not arrive in time.",
);
/// The body is larger than allowed.
pub const BODY_TOO_LARGE: Problem = Problem::new(
    StatusCode::PAYLOAD_TOO_LARGE,
    "body_too_large",
    "The body is larger than allowed.",
);
/// The body is not declared as JSON.
pub const UNSUPPORTED_MEDIA_TYPE: Problem = Problem::new(
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    "unsupported_media_type",
    "Send application/json.",
);
/// Too much in too short a time.
pub const TOO_MANY_REQUESTS: Problem = Problem::new(
    StatusCode::TOO_MANY_REQUESTS,
    "too_many_requests",
    "Too many requests; try again later.",
);
/// A fault of ours.
pub const INTERNAL: Problem = Problem::new(
    StatusCode::INTERNAL_SERVER_ERROR,
    "internal",
    "Something went wrong on our side.",
);
/// A store cannot be reached, or is overloaded; the same request may be sent again.
pub const UNAVAILABLE: Problem = Problem::new(
    StatusCode::SERVICE_UNAVAILABLE,
    "unavailable",
    "Not possible right now; try again.",
);

/// The failures that every endpoint can have.
pub const PROBLEMS: &[Problem] = &[
    INVALID_BODY,
    INVALID_PARAMETER,
    INVALID_FIELD,
    UNAUTHENTICATED,
    FORBIDDEN,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    REQUEST_TIMEOUT,
    BODY_TOO_LARGE,
    UNSUPPORTED_MEDIA_TYPE,
    TOO_MANY_REQUESTS,
    INTERNAL,
    UNAVAILABLE,
];

/// The answer to a request that failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}: {}", .problem.code, .detail.as_deref().unwrap_or(.problem.title))]
pub struct ApiError {
    /// The kind of failure.
    pub problem: Problem,
    /// What exactly, in a sentence that may be shown to the user.
    pub detail: Option<String>,
    /// The field or parameter at fault.
    pub field: Option<String>,
    /// When to try again.
    pub retry_after: Option<Duration>,
}

/// The body of an error response (`application/problem+json`).
#[derive(Serialize, utoipa::ToSchema)]
pub struct ProblemDocument {
    /// A URI reference that names the kind of failure.
    #[serde(rename = "type")]
    kind: String,
    /// One sentence about the kind of failure.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// The stable name of the kind of failure; decide by this.
    code: &'static str,
    /// What exactly happened.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    /// The field or parameter at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
}

impl ApiError {
    /// Says what exactly happened.
    #[must_use]
    pub fn detail(self, detail: impl Into<String>) -> Self {
        Self {
            detail: Some(detail.into()),
            ..self
        }
    }

    /// Names the field or parameter at fault.
    #[must_use]
    pub fn field(self, field: impl Into<String>) -> Self {
        Self {
            field: Some(field.into()),
            ..self
        }
    }

    /// Says when to try again, in whole seconds.
    #[must_use]
    pub fn retry_after(self, after: Duration) -> Self {
        Self {
            retry_after: Some(after),
            ..self
        }
    }

    /// A field whose value is not allowed, and why.
    pub fn invalid_field(field: &str, why: impl Into<String>) -> Self {
        Self::from(INVALID_FIELD).field(field).detail(why)
    }

    /// Logs what the client must not see, and answers with 500.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(error.message = %cause, "a request failed");
        Self::from(INTERNAL)
    }

    /// A store that cannot be used right now.
    pub fn unavailable(cause: impl std::fmt::Display) -> Self {
        tracing::warn!(error.message = %cause, "a store is not available");
        Self::from(UNAVAILABLE).retry_after(Duration::from_secs(1))
    }
}

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> Self {
        Self {
            problem,
            detail: None,
            field: None,
            retry_after: None,
        }
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> Self {
        Self::from(&error)
    }
}

impl From<&sqlx::Error> for ApiError {
    fn from(error: &sqlx::Error) -> Self {
        if crate::db::is_unavailable(error) || crate::db::is_retryable(error) {
            Self::unavailable(error)
        } else {
            Self::internal(error)
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Problem { status, code, title } = self.problem;
        let document = ProblemDocument {
            kind: format!("/problems/{code}"),
            title,
            status: status.as_u16(),
            code,
            detail: self.detail,
            field: self.field,
        };
        let mut response = (status, Json(document)).into_response();
        // For whoever counts.
        response.extensions_mut().insert(self.problem);
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
