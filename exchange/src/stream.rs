//! Server-sent events: a user's notifications as they are written, by whichever pod of whichever colour.
//!
//! PostgreSQL tells every process who has news (`notify`); the news itself is read from the table, from the
//! client's cursor on. So a client that reads slowly costs one flag and at most one page of memory, a lost
//! announcement costs at most one heartbeat of delay, and `Last-Event-ID` continues on any stack.
//!
//! A stream is allowed as long as a request would be: it ends with its access token, and when its session is ended, of
//! which PostgreSQL tells as well; at the age of a connection at the latest.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use axum::{
    extract::{FromRequestParts, State},
    http::{HeaderName, HeaderValue, header, request::Parts},
    response::{
        IntoResponse, Response,
        sse::{Event, Sse},
    },
};
use futures::stream::{self, Stream};
use sqlx::{PgPool, postgres::PgListener};
use time::OffsetDateTime;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use crate::{
    auth::Caller,
    error::{self, ApiError},
    notification::{CHANNEL, Notification, Shared, columns},
    role::Role,
    session,
};

/// The client's cursor.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// How often a silent stream sends a comment, and looks whether an announcement was lost, of news or of the session's end.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How soon a client should come back when its stream has ended.
const RETRY: Duration = Duration::from_secs(1);
/// Most notifications read at a time for one client.
const PAGE: i64 = 100;
/// Most streams of one user at one process.
const MAX_STREAMS: usize = 8;

/// The event streams that are open in this process.
#[derive(Debug, Default)]
pub struct Hub {
    /// For each user, a bell for each open stream. A bell remembers one ring until its stream looks.
    bells: Mutex<HashMap<Uuid, Vec<Weak<Notify>>>>,
    ending: CancellationToken,
}

impl Hub {
    /// No streams.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Listens to PostgreSQL and rings, until told to stop; then all streams end. Continues by itself after a
    /// loss of the database, and then rings for everybody.
    pub async fn run(&self, db: &PgPool, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            let Some(Err(error)) = stop.run_until_cancelled(self.listen(db)).await else {
                break;
            };
            warn!(error.message = %error, "lost the announcements of notifications; listening again");
            stop.run_until_cancelled(tokio::time::sleep(Duration::from_secs(1)))
                .await;
        }
        self.ending.cancel();
    }

    async fn listen(&self, db: &PgPool) -> Result<Infallible, sqlx::Error> {
        let mut listener = PgListener::connect_with(db).await?;
        listener.listen(CHANNEL).await?;
        self.ring_all();
        loop {
            match listener.try_recv().await? {
                Some(announcement) => {
                    if let Ok(user) = announcement.payload().parse() {
                        self.ring(user);
                    }
                }
                // The connection was lost and made again; whatever was announced in between is gone.
                None => self.ring_all(),
            }
        }
    }

    fn ring(&self, user: Uuid) {
        if let Some(bells) = self.bells().get(&user) {
            bells
                .iter()
                .filter_map(Weak::upgrade)
                .for_each(|bell| bell.notify_one());
        }
    }

    fn ring_all(&self) {
        self.bells()
            .values()
            .flatten()
            .filter_map(Weak::upgrade)
            .for_each(|bell| bell.notify_one());
    }

    /// A bell for a new stream of the user, unless there are too many.
    fn subscribe(&self, user: Uuid) -> Option<Arc<Notify>> {
        let mut bells = self.bells();
        // Streams leave by dropping their bell.
        bells.retain(|_, bells| {
            bells.retain(|bell| bell.strong_count() > 0);
            !bells.is_empty()
        });
        let mine = bells.entry(user).or_default();
        if mine.len() >= MAX_STREAMS {
            return None;
        }
        let bell = Arc::new(Notify::new());
        mine.push(Arc::downgrade(&bell));
        Some(bell)
    }

    fn bells(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Vec<Weak<Notify>>>> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The route of the event stream, before it is bound to an application.
pub(crate) fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(follow))
}

impl FromRequestParts<Shared> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Self, ApiError> {
        Self::from_request_parts(parts, &shared.app).await
    }
}

/// The number of the last notification that the client has, from `Last-Event-ID`.
struct LastEventId(Option<i64>);

impl<S: Sync> FromRequestParts<S> for LastEventId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Some(value) = parts.headers.get(LAST_EVENT_ID) else {
            return Ok(Self(None));
        };
        let id = value
            .to_str()
            .ok()
            .and_then(|id| id.parse().ok())
            .filter(|id| *id >= 0);
        match id {
            Some(id) => Ok(Self(Some(id))),
            None => Err(ApiError::from(error::INVALID_PARAMETER)
                .field("Last-Event-ID")
                .detail("not a number")),
        }
    }
}

/// The caller's notifications as server-sent events: `id` is the notification's number, `event` is `notification`,
/// `data` the notification as in the list. With `Last-Event-ID` the stream begins with what came after it, else
/// with what comes next. The server may end a stream at any event, and does when the access token expires or its session
/// is ended; come back after `retry` with the last id, and with a token that is valid.
#[utoipa::path(
    get,
    path = "/notifications/stream",
    tag = "notification",
    security(("access_token" = [])),
    params(("Last-Event-ID" = Option<i64>, Header, description = "The last notification that the client has")),
    responses((status = 200, body = Notification, content_type = "text/event-stream")),
)]
async fn follow(
    State(shared): State<Shared>,
    caller: Caller,
    LastEventId(last): LastEventId,
) -> Result<Response, ApiError> {
    if !session::is_open(&shared.app.db, &caller).await? {
        return Err(error::UNAUTHENTICATED.into());
    }
    let token_left = Duration::try_from(caller.expires_at - OffsetDateTime::now_utc()).unwrap_or_default();
    let ends_at = Instant::now() + token_left.min(shared.app.config.max_connection_age);
    let Some(bell) = shared.hub.subscribe(caller.user_id) else {
        return Err(ApiError::from(error::TOO_MANY_REQUESTS)
            .detail("too many open event streams")
            .retry_after(Duration::from_secs(30)));
    };
    let cursor = match last {
        Some(last) => last,
        None => newest(&shared.app.db, caller.user_id).await?,
    };
    let follower = Follower {
        shared,
        caller,
        ends_at,
        bell,
        cursor,
        state: Next::Begin,
    };
    let mut response = Sse::new(follower.events()).into_response();
    // Proxies must pass events on as they come.
    response.headers_mut().insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

async fn newest(db: &PgPool, user: Uuid) -> Result<i64, sqlx::Error> {
    let newest: Option<(i64,)> =
        sqlx::query_as("select last_seq from notification_counters where user_id = $1")
            .bind(user)
            .fetch_optional(db)
            .await?;
    Ok(newest.map_or(0, |(seq,)| seq))
}

/// One client's stream.
struct Follower {
    shared: Shared,
    caller: Caller,
    /// When the token is over, or the connection old.
    ends_at: Instant,
    bell: Arc<Notify>,
    cursor: i64,
    state: Next,
}

enum Next {
    Begin,
    Send(std::vec::IntoIter<Notification>),
    Wait,
    /// Say good-bye.
    End,
    Ended,
}

impl Follower {
    fn events(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, |mut follower| async move {
            let event = follower.next().await?;
            Some((Ok(event), follower))
        })
    }

    async fn next(&mut self) -> Option<Event> {
        loop {
            if self.must_end() && !matches!(self.state, Next::Ended) {
                self.state = Next::End;
            }
            match &mut self.state {
                Next::Begin => {
                    self.state = self.page().await;
                    return Some(Event::default().retry(RETRY).comment("ready"));
                }
                Next::Send(page) => match page.next() {
                    Some(notification) => {
                        self.cursor = notification.id;
                        let event = Event::default()
                            .event("notification")
                            .id(notification.id.to_string());
                        // Notifications are plain data; they cannot fail to be written as JSON.
                        return event.json_data(&notification).ok();
                    }
                    None => self.state = self.page().await,
                },
                Next::Wait => {
                    let heartbeat = self.wait().await;
                    // Whoever has to leave does not ask a database that may be away.
                    if self.must_end() {
                        continue;
                    }
                    self.state = self.page().await;
                    if heartbeat {
                        return Some(Event::default().comment(""));
                    }
                }
                Next::End => {
                    self.state = Next::Ended;
                    return Some(Event::default().retry(RETRY).comment("come back"));
                }
                Next::Ended => return None,
            }
        }
    }

    /// Reads what is there after the cursor. A stream whose session has been ended, or whose database is away, ends; the
    /// client comes back, if it may.
    async fn page(&self) -> Next {
        match session::is_open(&self.shared.app.db, &self.caller).await {
            Ok(true) => {}
            Ok(false) => return Next::End,
            Err(error) => return cannot_be_read(&error),
        }
        let page: Result<Vec<Notification>, _> = sqlx::query_as(concat!(
            "select ",
            columns!(),
            " from notifications where user_id = $1 and seq > $2 order by seq limit $3"
        ))
        .bind(self.caller.user_id)
        .bind(self.cursor)
        .bind(PAGE)
        .fetch_all(&self.shared.app.db)
        .await;
        match page {
            Ok(page) if page.is_empty() => Next::Wait,
            Ok(page) => Next::Send(page.into_iter()),
            Err(error) => cannot_be_read(&error),
        }
    }

    /// Waits for news or the end, and says whether the client should see a sign of life first.
    async fn wait(&self) -> bool {
        let mut role = self.shared.app.role.clone();
        let draining = async {
            // An error means that the process is ending.
            let _ = role.wait_for(|role| *role == Role::Draining).await;
        };
        tokio::select! {
            () = draining => false,
            () = self.shared.hub.ending.cancelled() => false,
            () = self.bell.notified() => false,
            () = tokio::time::sleep_until(self.ends_at) => false,
            () = tokio::time::sleep(HEARTBEAT) => true,
        }
    }

    fn must_end(&self) -> bool {
        self.shared.hub.ending.is_cancelled()
            || *self.shared.app.role.borrow() == Role::Draining
            || Instant::now() >= self.ends_at
    }
}

fn cannot_be_read(error: &sqlx::Error) -> Next {
    warn!(error.message = %error, "an event stream ends: its notifications cannot be read");
    Next::End
}
