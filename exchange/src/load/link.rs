//! Connections of the load test. They behave as a good client does, and hide nothing: a request that may have
//! reached the server is never sent again.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use futures::stream;
use http::{Request, Response, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, sync::Mutex};

use super::record::Record;

/// A request's body.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Longer than this is a failure.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What connections did beside carrying requests.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// Connections made.
    pub(crate) connects: AtomicU64,
    /// HTTP/1.1 connections that the server closed without having said `Connection: close`.
    pub(crate) closed_without_notice: AtomicU64,
    /// Requests of which the connection took nothing, sent on a new one.
    pub(crate) never_sent: AtomicU64,
}

/// Which protocol a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Http1 => "http/1.1",
            Self::Http2 => "http/2",
        }
    }
}

enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

/// One connection to one service, made again when it is gone.
pub(crate) struct Link {
    authority: String,
    pub(crate) protocol: Protocol,
    events: Arc<Events>,
    /// An HTTP/1.1 connection belongs to one request at a time; of an HTTP/2 one each request takes a copy.
    sender: Mutex<Option<Sender>>,
}

/// Makes a request, as often as it takes until a connection takes one.
pub(crate) type MakeRequest<'a> = &'a (dyn Fn() -> Result<Request<Body>, String> + Sync);

/// What came back.
pub(crate) struct Answered {
    pub(crate) status: u16,
    pub(crate) stack: Option<String>,
    pub(crate) body: Bytes,
}

/// A body that is sent at once, or in four parts within `slow`.
pub(crate) fn body(content: Bytes, slow: Option<Duration>) -> Body {
    let Some(slow) = slow else {
        return Full::new(content).boxed_unsync();
    };
    let part = content.len().div_ceil(4).max(1);
    let parts: Vec<Bytes> = content.chunks(part).map(Bytes::copy_from_slice).collect();
    let parts = stream::unfold(parts.into_iter(), move |mut parts| async move {
        let part = parts.next()?;
        tokio::time::sleep(slow / 4).await;
        Some((Ok(Frame::data(part)), parts))
    });
    StreamBody::new(parts).boxed_unsync()
}

impl Link {
    pub(crate) fn new(authority: String, protocol: Protocol, events: Arc<Events>) -> Self {
        Self {
            authority,
            protocol,
            events,
            sender: Mutex::new(None),
        }
    }

    async fn connect(&self) -> anyhow::Result<Sender> {
        self.events.connects.fetch_add(1, Ordering::Relaxed);
        let stream = TcpStream::connect(&self.authority).await.context("connect")?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        Ok(match self.protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(io).await.context("handshake")?;
                tokio::spawn(connection);
                Sender::Http1(sender)
            }
            Protocol::Http2 => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io)
                    .await
                    .context("handshake")?;
                tokio::spawn(connection);
                Sender::Http2(sender)
            }
        })
    }

    /// Sends a request and reads the whole answer. The error says in few words what broke. The request is made once more
    /// only if the first one is known not to have been taken.
    pub(crate) async fn send(&self, request: MakeRequest<'_>) -> Result<Answered, String> {
        if let Ok(result) = tokio::time::timeout(TIMEOUT, self.exchange(request)).await {
            return result;
        }
        Err("timeout".to_owned())
    }

    async fn exchange(&self, request: MakeRequest<'_>) -> Result<Answered, String> {
        match self.protocol {
            Protocol::Http1 => self.exchange_http1(request).await,
            Protocol::Http2 => self.exchange_http2(request).await,
        }
    }

    async fn exchange_http1(&self, request: MakeRequest<'_>) -> Result<Answered, String> {
        let mut slot = self.sender.lock().await;
        for first in [true, false] {
            let kept = match slot.take() {
                Some(Sender::Http1(mut sender)) => {
                    let open = sender.ready().await.is_ok();
                    if !open {
                        // It is only kept after an answer that did not announce its end.
                        self.events.closed_without_notice.fetch_add(1, Ordering::Relaxed);
                    }
                    open.then_some(sender)
                }
                _ => None,
            };
            let mut sender = match kept {
                Some(sender) => sender,
                None => match self.connect().await.map_err(|error| format!("{error:#}"))? {
                    Sender::Http1(sender) => sender,
                    Sender::Http2(_) => return Err("wrong protocol".to_owned()),
                },
            };
            let response = match sender.try_send_request(request()?).await {
                Ok(response) => response,
                Err(error) if first && error.message().is_some() => {
                    self.events.never_sent.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                Err(error) => return Err(words(error.error())),
            };
            let closing = says_close(&response);
            let answered = read(response).await?;
            if !closing {
                *slot = Some(Sender::Http1(sender));
            }
            return Ok(answered);
        }
        Err("never sent".to_owned())
    }

    async fn exchange_http2(&self, request: MakeRequest<'_>) -> Result<Answered, String> {
        for first in [true, false] {
            let mut sender = {
                let mut slot = self.sender.lock().await;
                match &*slot {
                    Some(Sender::Http2(sender)) if !sender.is_closed() => sender.clone(),
                    _ => match self.connect().await.map_err(|error| format!("{error:#}"))? {
                        Sender::Http2(sender) => {
                            *slot = Some(Sender::Http2(sender.clone()));
                            sender
                        }
                        Sender::Http1(_) => return Err("wrong protocol".to_owned()),
                    },
                }
            };
            match sender.try_send_request(request()?).await {
                Ok(response) => return read(response).await,
                Err(error) if first && (error.message().is_some() || said_goodbye(error.error())) => {
                    self.events.never_sent.fetch_add(1, Ordering::Relaxed);
                    self.sender.lock().await.take();
                }
                Err(error) => return Err(words(error.error())),
            }
        }
        Err("never sent".to_owned())
    }
}

/// Whether the server has announced the end of the connection before it took this request (RFC 9113, section 6.8: the
/// streams that it still answers are those that it names, and these do not end with this error).
fn said_goodbye(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error);
    let error = source.and_then(|source| source.downcast_ref::<h2::Error>());
    error.is_some_and(|error| {
        error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR)
    })
}

fn says_close(response: &Response<Incoming>) -> bool {
    let value = response
        .headers()
        .get(header::CONNECTION)
        .and_then(|value| value.to_str().ok());
    value.is_some_and(|value| value.eq_ignore_ascii_case("close"))
}

async fn read(response: Response<Incoming>) -> Result<Answered, String> {
    let status = response.status().as_u16();
    let stack = response
        .headers()
        .get(crate::role::STACK_HEADER)
        .and_then(|value| value.to_str().ok());
    let stack = stack.map(ToOwned::to_owned);
    let body = response
        .into_body()
        .collect()
        .await
        .map_err(|error| words(&error))?
        .to_bytes();
    Ok(Answered { status, stack, body })
}

/// A failure in words of which there are few, so that they can be counted.
fn words(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The record of a request that has ended.
pub(crate) fn record(template: Record, result: &Result<Answered, String>) -> Record {
    match result {
        Ok(answered) => Record {
            status: Some(answered.status),
            stack: answered.stack.clone(),
            ..template
        },
        Err(error) => Record {
            error: Some(error.clone()),
            ..template
        },
    }
}
