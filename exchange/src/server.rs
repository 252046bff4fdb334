//! The accept loop of the public port: HTTP/1.1 and cleartext HTTP/2, without ever closing a connection under a
//! client's next request.
//!
//! A client that keeps a connection alive may send its next request at any moment. If the server closes an idle
//! HTTP/1.1 connection at that moment, the request is lost, and the client cannot know whether it was processed.
//! Therefore a connection that is to go (draining, its age, termination) is only *asked* to go: by
//! `Connection: close` on its next HTTP/1.1 response, by GOAWAY on HTTP/2. Only when it has had the time that [`Closing`]
//! gives it is it cut. Graceful shutdown of hyper and of `axum::serve` closes idle connections at once, hence this loop.

mod io;

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body, extract::ConnectInfo};
use bytes::Bytes;
use futures::FutureExt;
use http::{HeaderValue, Request, Response, Version, header};

use http_body_util::BodyExt;
use hyper::{
    body::{Body as _, Frame, Incoming, SizeHint},
    server::conn::{http1, http2},
    service::{Service, service_fn},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::role::STACK_HEADER;

use io::Io;

/// After the last response the rest of what the client sends is read and dropped for so long: closing a socket with
/// unread data resets it, and the client may lose the response.
const LINGER: Duration = Duration::from_secs(2);

/// How long an HTTP/2 connection that is to go waits for its first request before it is told. Told at once, whoever connects
/// to a stack that is draining might never get a request through.
const FIRST_REQUEST: Duration = Duration::from_secs(1);

/// How the public port treats connections.
#[derive(Clone, Debug)]
pub struct Options {
    /// The age from which a connection is asked to close, give or take a tenth.
    pub max_connection_age: Duration,
    /// How long the rest of a request's header may take, and the rest of a body that nobody reads.
    pub request_timeout: Duration,
    /// How much of a body that nobody reads is read so that the connection can stay.
    pub max_body_size: usize,
}

/// Whether connections are asked to close, and when they are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    /// They may stay.
    No,
    /// They are asked to close.
    Asked {
        /// Since when.
        since: Instant,
        /// How long after that a connection is cut, or after it was accepted if that came later: whoever connects to a stack
        /// that has been draining for hours is a client like any other, and may be the one who says that it is live again.
        patience: Duration,
    },
}

impl Closing {
    /// They are asked to close from now on.
    pub fn within(patience: Duration) -> Self {
        let since = Instant::now();
        Self::Asked { since, patience }
    }

    /// When a connection is cut that was accepted at this time.
    fn cuts(self, accepted: Instant) -> Option<Instant> {
        match self {
            Self::No => None,
            Self::Asked { since, patience } => Some(since.max(accepted) + patience),
        }
    }
}

/// What is open on the public port. Clones share the numbers.
#[derive(Clone, Default)]
pub struct Counts(Arc<CountsInner>);

#[derive(Default)]
struct CountsInner {
    connections: AtomicUsize,
    in_flight: AtomicUsize,
}

impl Counts {
    /// Open connections.
    pub fn connections(&self) -> usize {
        self.0.connections.load(Ordering::Relaxed)
    }

    /// Requests whose response has not been sent completely.
    pub fn in_flight(&self) -> usize {
        self.0.in_flight.load(Ordering::Relaxed)
    }
}

/// One more of something for as long as this lives.
struct Counted(Counts, fn(&CountsInner) -> &AtomicUsize);

impl Counted {
    fn new(counts: &Counts, which: fn(&CountsInner) -> &AtomicUsize) -> Self {
        which(&counts.0).fetch_add(1, Ordering::Relaxed);
        Self(counts.clone(), which)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.1)(&self.0.0).fetch_sub(1, Ordering::Relaxed);
    }
}

/// What all connections share.
struct Shared {
    router: Router,
    stack: HeaderValue,
    options: Options,
    counts: Counts,
}

/// Serves until `stop`, then ends what is still open.
///
/// `stack` stands in [`STACK_HEADER`] of each response.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    stack: HeaderValue,
    options: Options,
    counts: Counts,
    closing: watch::Receiver<Closing>,
    stop: CancellationToken,
) {
    let shared = Arc::new(Shared {
        router,
        stack,
        options,
        counts,
    });
    let mut connections = JoinSet::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, peer)) => {
                connections.spawn(connection(stream, peer, Arc::clone(&shared), closing.clone()));
            }
            Err(error) => {
                // Out of file descriptors, most likely: accepting again at once would only burn the processor.
                warn!(error.message = %error, "failed to accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    connections.shutdown().await;
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    shared: Arc<Shared>,
    mut closing: watch::Receiver<Closing>,
) {
    let _counted = Counted::new(&shared.counts, |counts| &counts.connections);
    if let Err(error) = keep_alive(&stream) {
        debug!(error.message = %error, "failed to set socket options");
    }
    let age = shared
        .options
        .max_connection_age
        .mul_f64(rand::random_range(0.9..1.1));
    let accepted = Instant::now();
    let old = accepted + age;
    let mut deadline = closing.clone();
    let cut = passed(&mut deadline, |closing| closing.cuts(accepted));
    tokio::select! {
        () = cut => debug!(client.address = %peer.ip(), "cut at the deadline"),
        result = converse(stream, peer, &shared, &mut closing, old) => {
            if let Err(error) = result {
                debug!(client.address = %peer.ip(), error.message = %error, "a connection broke");
            }
        }
    }
}

/// Finds dead peers without ever sending anything that a live one could see.
fn keep_alive(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let probes = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    socket2::SockRef::from(stream).set_tcp_keepalive(&probes)
}

/// Returns when the time that the watched value names has passed. It may change its mind, or name none.
async fn passed<T>(watched: &mut watch::Receiver<T>, time: impl Fn(&T) -> Option<Instant>) {
    loop {
        let time = time(&watched.borrow_and_update());
        let changed = changed(watched);
        match time {
            None => changed.await,
            Some(time) => tokio::select! {
                // It has changed its mind in time, however late this is found out.
                biased;
                () = changed => {}
                () = sleep_until(time) => return,
            },
        }
    }
}

/// Waits for a change, which never comes when the sender is gone.
async fn changed<T>(watched: &mut watch::Receiver<T>) {
    if watched.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn converse(
    mut stream: TcpStream,
    peer: SocketAddr,
    shared: &Arc<Shared>,
    closing: &mut watch::Receiver<Closing>,
    old: Instant,
) -> Result<(), BoxError> {
    let head = watch::Sender::new(Head::Idle);
    let mut waiting = head.subscribe();
    let state = Arc::new(ConnectionState {
        head,
        closing: closing.clone(),
        old,
    });
    let mut io = Io::new(&mut stream, Arc::clone(&state), shared.stack.clone());
    // An idle connection may wait as long as it likes, a header that has begun may not.
    let stalled = passed(&mut waiting, |head| match head {
        Head::Idle | Head::Answering => None,
        Head::Began(at) => Some(*at + shared.options.request_timeout),
    });
    tokio::pin!(stalled);
    let is_http2 = tokio::select! {
        biased;
        is_http2 = io.sniff() => is_http2?,
        () = &mut stalled => return Err("the header stalled".into()),
    };
    let service = service_fn(|request| answer(request, peer, Arc::clone(shared), Arc::clone(&state)).boxed());
    if is_http2 {
        // From here on hyper's pings find a silent peer, and its streams are limited in number.
        state.head.send_replace(Head::Idle);
        converse_http2(io, service, &state).await?;
    } else {
        let mut connection = http1::Builder::new()
            // Hyper's own limit for the header also runs while a connection is idle.
            .header_read_timeout(None)
            .serve_connection(TokioIo::new(io), service);
        tokio::select! {
            biased;
            result = std::future::poll_fn(|context| connection.poll_without_shutdown(context)) => result?,
            () = &mut stalled => return Err("the header stalled".into()),
        }
    }
    linger(stream).await;
    Ok(())
}

async fn converse_http2<S>(io: Io<'_>, service: S, state: &ConnectionState) -> Result<(), BoxError>
where
    S: Service<Request<Incoming>, Response = Response<Answered>, Error = Infallible>,
    S::Future: Send + 'static,
{
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .max_concurrent_streams(256)
        .serve_connection(TokioIo::new(io), service);
    tokio::pin!(connection);
    let told = async {
        state.asked_to_close().await;
        let mut head = state.head.subscribe();
        // A connection that nobody uses may go as well.
        let _ = timeout(FIRST_REQUEST, head.wait_for(|head| *head == Head::Answering)).await;
    };
    tokio::pin!(told);
    let mut asked = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => return Ok(result?),
            () = &mut told, if !asked => {
                asked = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Lets the client have all that has been written: a socket that is closed while the client still sends is reset, and what
/// the client has not read by then may be lost to it. With HTTP/2 that can be the answers of all its streams.
async fn linger(mut stream: TcpStream) {
    let rest = async {
        stream.shutdown().await?;
        let mut dropped = [0; 4096];
        while stream.read(&mut dropped).await? > 0 {}
        std::io::Result::Ok(())
    };
    // Whatever happens here, the response is out and the connection is over.
    let _ = timeout(LINGER, rest).await;
}

/// Whether the header of a request has begun to arrive. With HTTP/2: whether there has been any request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Head {
    Idle,
    Began(Instant),
    Answering,
}

struct ConnectionState {
    head: watch::Sender<Head>,
    closing: watch::Receiver<Closing>,
    old: Instant,
}

impl ConnectionState {
    fn should_close(&self) -> bool {
        *self.closing.borrow() != Closing::No || Instant::now() >= self.old
    }

    async fn asked_to_close(&self) {
        let mut closing = self.closing.clone();
        let asked = async {
            while *closing.borrow_and_update() == Closing::No {
                changed(&mut closing).await;
            }
        };
        tokio::select! {
            () = sleep_until(self.old) => {}
            () = asked => {}
        }
    }
}

async fn answer(
    request: Request<Incoming>,
    peer: SocketAddr,
    shared: Arc<Shared>,
    state: Arc<ConnectionState>,
) -> Result<Response<Answered>, Infallible> {
    let in_flight = Counted::new(&shared.counts, |counts| &counts.in_flight);
    let is_http2 = request.version() == Version::HTTP_2;
    state.head.send_replace(Head::Answering);
    let expects = request.headers().contains_key(header::EXPECT);
    let (parts, incoming) = request.into_parts();
    let unread = Unread(Arc::new(Mutex::new(incoming)));
    let mut request = Request::from_parts(parts, Body::new(unread.clone()));
    request.extensions_mut().insert(ConnectInfo(peer));
    let Ok(mut response) = shared.router.clone().oneshot(request).await;
    response.headers_mut().insert(STACK_HEADER, shared.stack.clone());
    if !is_http2 {
        // With a body left unread hyper closes the connection after this response, unannounced.
        let drained = if expects && !unread.is_end() {
            false
        } else {
            unread.drain(&shared.options).await
        };
        if !drained || state.should_close() {
            response
                .headers_mut()
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
    let state = (!is_http2).then_some(state);
    Ok(response.map(|body| Answered {
        body,
        _done: Done {
            state,
            _in_flight: in_flight,
        },
    }))
}

/// A request body that can be taken back from a handler that did not read it.
#[derive(Clone)]
struct Unread(Arc<Mutex<Incoming>>);

impl Unread {
    fn with<T>(&self, action: impl FnOnce(&mut Incoming) -> T) -> T {
        action(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_end(&self) -> bool {
        self.with(|body| body.is_end_stream())
    }

    /// Reads the rest, if it is small and comes in time.
    async fn drain(mut self, options: &Options) -> bool {
        let mut left = options.max_body_size;
        let rest = async {
            loop {
                if self.is_end() {
                    return true;
                }
                match self.frame().await {
                    None => return true,
                    Some(Err(_)) => return false,
                    Some(Ok(frame)) => match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                        Some(rest) => left = rest,
                        None => return false,
                    },
                }
            }
        };
        timeout(options.request_timeout, rest).await.unwrap_or(false)
    }
}

impl hyper::body::Body for Unread {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.with(|body| Pin::new(body).poll_frame(context))
    }

    fn is_end_stream(&self) -> bool {
        self.is_end()
    }

    fn size_hint(&self) -> SizeHint {
        self.with(|body| body.size_hint())
    }
}

/// A response body; the request is in flight until it has been sent.
struct Answered {
    body: Body,
    _done: Done,
}

struct Done {
    state: Option<Arc<ConnectionState>>,
    _in_flight: Counted,
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(state) = &self.state {
            state.head.send_replace(Head::Idle);
        }
    }
}

impl hyper::body::Body for Answered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
