//! Traders that read their notifications as server-sent events all the while. A stream that ends is opened again where it
//! stopped, as the server's hint says; afterwards nothing may be missing, and nothing have come twice.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use http::header;
use serde::Serialize;
use serde_json::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Run, locked};
use crate::trader::chain;

/// When to come back, until a server has said it.
const RETRY: Duration = Duration::from_secs(1);

/// One stream from its opening to its end.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Opening {
    /// Whose.
    pub(crate) trader: usize,
    /// The stack that answered; empty if none did.
    pub(crate) stack: String,
    /// When it was asked for, since the start of the run.
    pub(crate) from_ms: u64,
    /// When it ended.
    pub(crate) to_ms: u64,
    /// Notifications that came.
    pub(crate) notifications: usize,
    /// How it ended.
    pub(crate) end: End,
    /// And why, if it should not have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failure: Option<String>,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End {
    /// The server ended it between two events.
    BetweenEvents,
    /// The connection broke, or an event was cut off.
    CutOff,
    /// There was no answer, or not the right one.
    NotOpened,
    /// We had seen enough.
    Left,
}

/// A notification as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    /// Its number among the trader's notifications.
    pub(crate) id: i64,
    /// The trade that it is about, if it is about one.
    pub(crate) trade: Option<String>,
}

/// What the streams of all traders have seen.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    openings: Mutex<Vec<Opening>>,
    received: Vec<Mutex<Vec<Received>>>,
    stop: CancellationToken,
}

impl Streams {
    /// For so many traders, the first ones.
    pub(crate) fn of(traders: usize) -> Arc<Self> {
        Arc::new(Self {
            received: (0..traders).map(|_| Mutex::default()).collect(),
            ..Self::default()
        })
    }

    /// What has come to a trader so far; nothing if the trader has no stream.
    pub(crate) fn received(&self, trader: usize) -> Option<Vec<Received>> {
        self.received.get(trader).map(|received| locked(received).clone())
    }

    /// Ends all streams.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    /// All streams that were opened.
    pub(crate) fn openings(&self) -> Vec<Opening> {
        locked(&self.openings).clone()
    }

    /// Reads a trader's notifications, from the first one on, until told to stop.
    pub(crate) async fn follow(self: Arc<Self>, trader: usize, base: String, run: Arc<Run>) {
        // Each stream is a connection of its own: reused ones would hide how the last one ended.
        let http = reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .build();
        let Ok(http) = http else { return };
        let mut reader = Reader::default();
        while !self.stop.is_cancelled() {
            let from = run.start.elapsed();
            let request = http
                .get(format!("{base}/notifications/stream"))
                .header("last-event-id", reader.last)
                .bearer_auth(run.token(trader));
            let before = reader.notifications;
            let (stack, end, failure) = self.read(trader, request, &mut reader).await;
            locked(&self.openings).push(Opening {
                trader,
                stack,
                from_ms: milliseconds(from),
                to_ms: milliseconds(run.start.elapsed()),
                notifications: reader.notifications - before,
                end,
                failure,
            });
            self.stop.run_until_cancelled(sleep(reader.retry)).await;
        }
    }

    async fn read(
        &self,
        trader: usize,
        request: reqwest::RequestBuilder,
        reader: &mut Reader,
    ) -> (String, End, Option<String>) {
        let Some(answer) = self.stop.run_until_cancelled(request.send()).await else {
            return (String::new(), End::Left, None);
        };
        let mut response = match answer {
            Ok(response) => response,
            Err(error) => return (String::new(), End::NotOpened, Some(chain(&error))),
        };
        let stack = response
            .headers()
            .get(header::HeaderName::from_static("x-exchange-stack"));
        let stack = stack
            .and_then(|stack| stack.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        if response.status() != http::StatusCode::OK {
            let failure = format!("status {}", response.status().as_u16());
            return (stack, End::NotOpened, Some(failure));
        }
        reader.rest.clear();
        loop {
            let (end, failure) = match self.stop.run_until_cancelled(response.chunk()).await {
                None => (End::Left, None),
                Some(Ok(Some(bytes))) => {
                    let news = reader.feed(&bytes);
                    if let Some(received) = self.received.get(trader) {
                        locked(received).extend(news);
                    }
                    continue;
                }
                Some(Ok(None)) if reader.rest.is_empty() => (End::BetweenEvents, None),
                Some(Ok(None)) => (End::CutOff, Some("ended within an event".to_owned())),
                Some(Err(error)) => (End::CutOff, Some(chain(&error))),
            };
            return (stack, end, failure);
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Reads events out of bytes that come in any pieces.
#[derive(Debug)]
struct Reader {
    rest: Vec<u8>,
    last: i64,
    retry: Duration,
    notifications: usize,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            rest: Vec::new(),
            last: 0,
            retry: RETRY,
            notifications: 0,
        }
    }
}

impl Reader {
    fn feed(&mut self, bytes: &[u8]) -> Vec<Received> {
        self.rest.extend_from_slice(bytes);
        let mut received = Vec::new();
        while let Some(end) = self.rest.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.rest.drain(..end + 2).collect();
            received.extend(self.event(&String::from_utf8_lossy(&event)));
        }
        received
    }

    fn event(&mut self, event: &str) -> Option<Received> {
        let mut id = None;
        let mut data = None;
        for line in event.lines() {
            match line.split_once(": ") {
                Some(("id", value)) => id = value.parse().ok(),
                Some(("data", value)) => data = serde_json::from_str::<Value>(value).ok(),
                Some(("retry", value)) => {
                    self.retry = value.parse().map_or(self.retry, Duration::from_millis);
                }
                _ => {}
            }
        }
        let (id, data) = (id?, data?);
        self.last = id;
        self.notifications += 1;
        let trade = data.pointer("/data/trade_id").and_then(Value::as_str);
        Some(Received {
            id,
            trade: trade.map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_whatever_pieces_they_come_in() {
        let text = "retry: 250\n: ready\n\nid: 7\nevent: notification\ndata: {\"data\":{\"trade_id\":\"a\"}}\n\n\
                    :\n\nid: 8\nevent: notification\ndata: {\"data\":{}}\n\nid: 9\nda";
        for size in [1, 2, 7, text.len()] {
            let mut reader = Reader::default();
            let pieces = text.as_bytes().chunks(size);
            let received: Vec<_> = pieces.flat_map(|piece| reader.feed(piece)).collect();
            let expected = [(7, Some("a")), (8, None)].map(|(id, trade)| Received {
                id,
                trade: trade.map(str::to_owned),
            });
            assert_eq!(received, expected);
            assert_eq!(reader.last, 8);
            assert_eq!(reader.retry, Duration::from_millis(250));
            assert_eq!(reader.rest, b"id: 9\nda");
        }
    }
}
