//! What can go wrong in a pass, and what is to be done about it.

use std::time::Duration;

use kube::api::ApiResource;
use tokio::time::timeout;

use crate::{guard::Refusal, observe::pods::short, status::Stack};

/// Why a pass ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server did not do what it was asked.
    #[error("failed to {doing}")]
    Api {
        /// What it was asked.
        doing: String,
        /// What it said.
        #[source]
        source: Box<kube::Error>,
    },
    /// It took too long.
    #[error("failed to {doing} within {} s", .limit.as_secs())]
    Timeout {
        /// What took too long.
        doing: String,
        /// How long it may take.
        limit: Duration,
    },
    /// What was planned is not right any more.
    #[error("refused to write: {0}")]
    Refused(#[from] Refusal),
    /// A name that is needed belongs to somebody else.
    #[error("{}/{name} belongs to somebody else", kind.kind)]
    Taken {
        /// Of which kind it is.
        kind: Box<ApiResource>,
        /// Its name.
        name: String,
    },
    /// Something changes what is written, as it is written.
    #[error("failed to keep {0} as it was rendered: something, such as an admission webhook, changes it")]
    Changed(String),
    /// What a Job should come from is not there any more.
    #[error("what was rendered for {0} is lost: declare again what it runs")]
    Lost(Stack),
    /// An object of ours is not what we wrote.
    #[error("{0} cannot be read: {1}")]
    Unreadable(String, String),
}

/// What an error means for the next pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Somebody else was faster, or something has changed: look again. Nothing is wrong.
    Conflict,
    /// It may go better next time.
    Transient,
    /// The API server does not allow it: a person has to change the operator's rights.
    Forbidden,
    /// The API server does not accept what was sent, or sent what cannot be read.
    Invalid,
}

impl Class {
    /// As a label of metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Conflict => "conflict",
            Self::Transient => "transient",
            Self::Forbidden => "forbidden",
            Self::Invalid => "invalid",
        }
    }
}

impl Error {
    /// Says what the API server was asked.
    pub fn api(doing: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let doing = doing.into();
        |source| Self::Api {
            doing,
            source: Box::new(source),
        }
    }

    /// What it means for the next pass.
    pub fn class(&self) -> Class {
        match self {
            Self::Refused(_) => Class::Conflict,
            Self::Timeout { .. } => Class::Transient,
            Self::Unreadable(..) | Self::Taken { .. } | Self::Changed(_) | Self::Lost(_) => Class::Invalid,
            Self::Api { source, .. } => match &**source {
                kube::Error::Api(status) => match status.code {
                    // Not found: what should be written or deleted has gone.
                    404 | 409 => Class::Conflict,
                    401 | 403 => Class::Forbidden,
                    400 | 413 | 415 | 422 => Class::Invalid,
                    _ => Class::Transient,
                },
                kube::Error::SerdeError(_) | kube::Error::BuildRequest(_) => Class::Invalid,
                _ => Class::Transient,
            },
        }
    }

    /// What keeps a write from being done, for people: a clause. Nothing if the next look tells.
    pub fn refusal(&self) -> Option<String> {
        let verb = if self.lasts() { "refuses" } else { "fails" };
        let what = match self {
            Self::Api { .. } if self.class() == Class::Conflict => return None,
            Self::Api { doing, source } => {
                let said = match &**source {
                    kube::Error::Api(status) => status.message.clone(),
                    other => other.to_string(),
                };
                short(&format!("{doing}: {said}"))
            }
            Self::Changed(_) | Self::Timeout { .. } => self.to_string().replacen("failed to ", "", 1),
            Self::Lost(_) => return Some(self.to_string()),
            Self::Refused(_) | Self::Taken { .. } | Self::Unreadable(..) => return None,
        };
        Some(format!("the API server {verb} to {what}"))
    }

    /// Whether it ends only when somebody does something about it.
    pub fn lasts(&self) -> bool {
        matches!(self.class(), Class::Forbidden | Class::Invalid)
    }

    /// The whole chain of causes, for people.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

/// What the API server answers, if it does within this time.
pub(crate) async fn within<T>(
    limit: Duration,
    doing: String,
    answer: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    match timeout(limit, answer).await {
        Ok(answered) => answered.map_err(Error::api(doing)),
        Err(_) => Err(Error::Timeout { doing, limit }),
    }
}
