//! Connections of the load test. They behave as a good client does, and hide nothing: a request that may have
//! reached the server is never sent again.

use std::{
    convert::Infallible,
    error::Error,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context as Task, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::stream;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, ReadBuf, join},
    net::{TcpStream, tcp::OwnedReadHalf},
    sync::Mutex,
};
use tokio_util::sync::CancellationToken;

use super::record::Record;
use crate::trader::CallError;

/// A request's body.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Connections that a request is offered to, each of which may be ending just then. More than that do not end by chance.
const CONNECTIONS: usize = 5;
/// Longer than this is a failure.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Length of the header of an HTTP/2 frame, and the type of the one that announces a connection's end (RFC 9113, 4.1, 6.8).
const FRAME_HEADER: usize = 9;
const GOAWAY: u8 = 7;
/// Whoever is told to try again has to be told when.
const NO_RETRY_AFTER: &str = "status 503 without Retry-After";
/// How a failure begins that says that nobody took the connection, or that it broke: so it is when a server has died, and no
/// server that lives may bring it about.
const CONNECT: &str = "connect";
const LOST: &str = "connection lost";
/// The same of one that has not come to an end in time.
const LATE: &str = "timeout";

/// What connections did beside carrying requests.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// Connections made.
    pub(crate) connects: AtomicU64,
    /// Connections that the server closed while no request was on them, without having said `Connection: close` (HTTP/1.1)
    /// or GOAWAY (HTTP/2).
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
    Http1(http1::SendRequest<Body>, CancellationToken),
    Http2(Shared),
}

/// An HTTP/2 connection, as each of its requests has it.
#[derive(Clone)]
struct Shared {
    sender: http2::SendRequest<Body>,
    /// Cancelled when it takes no more requests.
    ended: CancellationToken,
    fate: Arc<Fate>,
}

/// What has been seen of an HTTP/2 connection's end: the client library does not tell whether it was announced.
#[derive(Default)]
struct Fate {
    /// Requests that are on it.
    carrying: AtomicUsize,
    announced: AtomicBool,
    /// It ended unannounced, with no request on it.
    forsaken: AtomicBool,
    counted: AtomicBool,
}

/// A request on a connection, until its answer has been read.
struct Carried(Arc<Fate>);

impl Carried {
    fn on(fate: &Arc<Fate>) -> Self {
        fate.carrying.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(fate))
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.carrying.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a server sends over HTTP/2, looked at in passing.
struct Watched {
    inner: OwnedReadHalf,
    frames: Frames,
    fate: Arc<Fate>,
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        task: &mut Task<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut this.inner).poll_read(task, buffer));
        let news = buffer.filled().get(before..).unwrap_or_default();
        if this.frames.announce_an_end(news) {
            this.fate.announced.store(true, Ordering::SeqCst);
        }
        let ended = result.is_err() || (news.is_empty() && buffer.remaining() > 0);
        if ended
            && !this.fate.announced.load(Ordering::SeqCst)
            && this.fate.carrying.load(Ordering::SeqCst) == 0
        {
            this.fate.forsaken.store(true, Ordering::SeqCst);
        }
        Poll::Ready(result)
    }
}

/// Reads the headers of frames out of bytes that come in any pieces.
#[derive(Default)]
struct Frames {
    header: Vec<u8>,
    /// Bytes left of the frame's content.
    content: usize,
}

impl Frames {
    /// Whether a GOAWAY begins in these bytes.
    fn announce_an_end(&mut self, mut bytes: &[u8]) -> bool {
        let mut announced = false;
        while !bytes.is_empty() {
            let (skipped, rest) = bytes.split_at(self.content.min(bytes.len()));
            self.content -= skipped.len();
            let (header, rest) = rest.split_at((FRAME_HEADER - self.header.len()).min(rest.len()));
            self.header.extend_from_slice(header);
            bytes = rest;
            if let [a, b, c, kind, _, _, _, _, _] = *self.header.as_slice() {
                self.content = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                self.header.clear();
                announced |= kind == GOAWAY;
            }
        }
        announced
    }
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
    /// What is wrong with the answer, beside its status.
    pub(crate) fault: Option<&'static str>,
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

    async fn connect(&self) -> Result<Sender, String> {
        self.events.connects.fetch_add(1, Ordering::Relaxed);
        let failed = |error: io::Error| format!("{CONNECT}: {error}");
        let stream = TcpStream::connect(&self.authority).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        Ok(match self.protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(TokioIo::new(stream))
                    .await
                    .map_err(|error| words(&error))?;
                Sender::Http1(sender, drive(connection))
            }
            Protocol::Http2 => {
                let fate = Arc::new(Fate::default());
                let (inner, writer) = stream.into_split();
                let reader = Watched {
                    inner,
                    frames: Frames::default(),
                    fate: Arc::clone(&fate),
                };
                let io = TokioIo::new(join(reader, writer));
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io)
                    .await
                    .map_err(|error| words(&error))?;
                let ended = drive(connection);
                Sender::Http2(Shared { sender, ended, fate })
            }
        })
    }

    /// Sends a request and reads the whole answer. The error says in few words what broke. The request is made once more
    /// only if the one before is known not to have been taken.
    pub(crate) async fn send(&self, request: MakeRequest<'_>) -> Result<Answered, String> {
        if let Ok(result) = tokio::time::timeout(TIMEOUT, self.exchange(request)).await {
            return result;
        }
        Err(LATE.to_owned())
    }

    async fn exchange(&self, request: MakeRequest<'_>) -> Result<Answered, String> {
        match self.protocol {
            Protocol::Http1 => self.exchange_http1(request).await,
            Protocol::Http2 => self.exchange_http2(request).await,
        }
    }

    async fn exchange_http1(&self, request: MakeRequest<'_>) -> Result<Answered, String> {
        let mut slot = self.sender.lock().await;
        for _ in 0..CONNECTIONS {
            let kept = match slot.take() {
                Some(Sender::Http1(mut sender, ended)) => {
                    let open = sender.ready().await.is_ok();
                    if !open {
                        self.closed_without_notice();
                    }
                    open.then_some((sender, ended))
                }
                _ => None,
            };
            let (mut sender, ended) = match kept {
                Some(kept) => kept,
                None => match self.connect().await? {
                    Sender::Http1(sender, ended) => (sender, ended),
                    Sender::Http2(_) => return Err("wrong protocol".to_owned()),
                },
            };
            let (request, mark) = marked(request()?);
            match outcome(sender.try_send_request(request), &mark, &ended).await {
                Ok(response) => {
                    let closing = says_close(&response);
                    let answered = read(response).await?;
                    if !closing {
                        *slot = Some(Sender::Http1(sender, ended));
                    }
                    return Ok(answered);
                }
                Err(Unanswered::NeverSent) => {
                    self.closed_without_notice();
                    self.events.never_sent.fetch_add(1, Ordering::Relaxed);
                }
                Err(Unanswered::Broken(error)) => return Err(words(&error)),
            }
        }
        Err("never sent".to_owned())
    }

    async fn exchange_http2(&self, request: MakeRequest<'_>) -> Result<Answered, String> {
        for _ in 0..CONNECTIONS {
            let (mut shared, _carried) = {
                let mut slot = self.sender.lock().await;
                let kept = match &*slot {
                    Some(Sender::Http2(kept)) => self.still_open(kept),
                    _ => None,
                };
                match kept {
                    Some(carried) => carried,
                    None => match self.connect().await? {
                        Sender::Http2(made) => {
                            *slot = Some(Sender::Http2(made.clone()));
                            let carried = Carried::on(&made.fate);
                            (made, carried)
                        }
                        Sender::Http1(..) => return Err("wrong protocol".to_owned()),
                    },
                }
            };
            let (request, mark) = marked(request()?);
            let sent = shared.sender.try_send_request(request);
            match outcome(sent, &mark, &shared.ended).await {
                Ok(response) => return read(response).await,
                Err(Unanswered::NeverSent) => {
                    self.events.never_sent.fetch_add(1, Ordering::Relaxed);
                    let announced = shared.fate.announced.load(Ordering::SeqCst);
                    if !announced && !shared.fate.counted.swap(true, Ordering::SeqCst) {
                        self.closed_without_notice();
                    }
                    self.sender.lock().await.take();
                }
                Err(Unanswered::Broken(error)) => return Err(words(&error)),
            }
        }
        Err("never sent".to_owned())
    }

    /// A connection that has been kept, for one more request, unless it has come to its end meanwhile.
    fn still_open(&self, kept: &Shared) -> Option<(Shared, Carried)> {
        // First, so that an end is seen either here or by the request.
        let carried = Carried::on(&kept.fate);
        if !kept.sender.is_closed() {
            return Some((kept.clone(), carried));
        }
        let forsaken = kept.fate.forsaken.load(Ordering::SeqCst);
        if forsaken && !kept.fate.counted.swap(true, Ordering::SeqCst) {
            self.closed_without_notice();
        }
        None
    }

    /// No more requests: what has become of the connection since the last one counts, too.
    pub(crate) async fn end(&self) {
        match self.sender.lock().await.take() {
            Some(Sender::Http1(sender, _)) if sender.is_closed() => self.closed_without_notice(),
            Some(Sender::Http2(kept)) => drop(self.still_open(&kept)),
            _ => {}
        }
    }

    /// A connection is only kept after an answer that did not announce its end.
    fn closed_without_notice(&self) {
        self.events.closed_without_notice.fetch_add(1, Ordering::Relaxed);
    }
}

/// Works for a connection. What it returns is cancelled when the connection takes no more requests.
fn drive(connection: impl Future + Send + 'static) -> CancellationToken {
    let ended = CancellationToken::new();
    let guard = ended.clone().drop_guard();
    tokio::spawn(async move {
        connection.await;
        drop(guard);
    });
    ended
}

/// A request with a mark that it loses when a connection takes it out of its queue.
fn marked(mut request: Request<Body>) -> (Request<Body>, Arc<()>) {
    let mark = Arc::new(());
    request.extensions_mut().insert(Arc::clone(&mark));
    (request, mark)
}

/// Why a request has no answer.
enum Unanswered {
    /// The server is known not to have taken it.
    NeverSent,
    Broken(hyper::Error),
}

/// What has come of a request.
async fn outcome(
    sent: impl Future<Output = Result<Response<Incoming>, TrySendError<Request<Body>>>>,
    mark: &Arc<()>,
    ended: &CancellationToken,
) -> Result<Response<Incoming>, Unanswered> {
    let result = unless_left(sent, mark, ended).await;
    result.ok_or(Unanswered::NeverSent)?.map_err(|error| {
        if error.message().is_some() || said_goodbye(error.error()) {
            return Unanswered::NeverSent;
        }
        Unanswered::Broken(error.into_error())
    })
}

/// The client library may leave a request in its queue for ever that is put there in the moment in which the connection ends:
/// of that one there is nothing.
async fn unless_left<T>(
    sent: impl Future<Output = T>,
    mark: &Arc<()>,
    ended: &CancellationToken,
) -> Option<T> {
    tokio::pin!(sent);
    tokio::select! {
        biased;
        result = sent.as_mut() => return Some(result),
        () = ended.cancelled() => {}
    }
    let is_left = Arc::strong_count(mark) > 1;
    if is_left { None } else { Some(sent.await) }
}

/// Whether the server has announced the end of the connection before it took this request (RFC 9113, section 6.8: the
/// streams that it still answers are those that it names, and these do not end with this error).
fn said_goodbye(error: &hyper::Error) -> bool {
    let source = error.source();
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
    let says_when = response.headers().contains_key(header::RETRY_AFTER);
    let fault = fault(response.status(), says_when);
    let body = response
        .into_body()
        .collect()
        .await
        .map_err(|error| words(&error))?
        .to_bytes();
    Ok(Answered {
        status,
        stack,
        body,
        fault,
    })
}

/// What is wrong with an answer of this status that says when to try again, or does not.
pub(crate) fn fault(status: StatusCode, says_when: bool) -> Option<&'static str> {
    (status == StatusCode::SERVICE_UNAVAILABLE && !says_when).then_some(NO_RETRY_AFTER)
}

/// Why a call had no good answer, in the words of a [`Link`].
pub(crate) fn failure(error: &CallError) -> String {
    match error {
        CallError::Transport { source, .. } if source.is_timeout() => LATE.to_owned(),
        CallError::Transport { source, .. } if source.is_connect() => {
            let cause = causes(source).last();
            format!(
                "{CONNECT}: {}",
                cause.map(ToString::to_string).unwrap_or_default()
            )
        }
        CallError::Transport { source, .. } => words(source),
        _ => error.to_string(),
    }
}

/// An error, what caused it, what caused that, and so on.
fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// A failure in words of which there are few, so that they can be counted.
fn words(error: &(dyn Error + 'static)) -> String {
    let text = causes(error)
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ");
    if causes(error).any(is_loss) {
        format!("{LOST}: {text}")
    } else {
        text
    }
}

/// Whether the connection has broken, and no rule of its protocol: what is not understood is another failure.
fn is_loss(error: &(dyn Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return !matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
        );
    }
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        return error.is_incomplete_message() || error.is_closed() || error.is_canceled();
    }
    error.downcast_ref::<h2::Error>().is_some_and(h2::Error::is_io)
}

/// The record of a request that has ended.
pub(crate) fn record(template: Record, result: &Result<Answered, String>) -> Record {
    match result {
        Ok(answered) => Record {
            status: Some(answered.status),
            stack: answered.stack.clone(),
            error: answered.fault.map(str::to_owned),
            ..template
        },
        Err(error) => Record {
            error: Some(error.clone()),
            ..template
        },
    }
}

#[cfg(test)]
mod tests {
    use hyper::{server::conn as server, service::service_fn};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpSocket},
        sync::Notify,
        time::sleep,
    };

    use super::*;

    fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
        let length = u8::try_from(content.len()).unwrap();
        [&[0, 0, length, kind, 0, 0, 0, 0, 0], content].concat()
    }

    #[test]
    fn an_end_is_announced_in_whatever_pieces_it_comes() {
        let goodbye = frame(GOAWAY, &[0; 8]);
        // One within another frame's content is none.
        let others = [frame(0, &goodbye), frame(4, &[])].concat();
        for size in [1, 2, 9, 100] {
            let mut frames = Frames::default();
            assert!(!others.chunks(size).any(|piece| frames.announce_an_end(piece)));
            assert!(goodbye.chunks(size).any(|piece| frames.announce_an_end(piece)));
        }
    }

    /// A server that ends each connection, announced or not, when it is told to. Returns its authority.
    async fn server(protocol: Protocol, announces: bool, part: Arc<Notify>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let service = service_fn(move |_| async move {
            let mut response = Response::new(Full::new(Bytes::new()));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            if announces && protocol == Protocol::Http1 {
                let close = http::HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, Infallible>(response)
        });
        tokio::spawn(async move {
            loop {
                let io = TokioIo::new(listener.accept().await.unwrap().0);
                let told = part.notified();
                if protocol == Protocol::Http1 {
                    let connection = server::http1::Builder::new().serve_connection(io, service);
                    tokio::select! { _ = connection => {}, () = told => {} }
                    continue;
                }
                let builder = server::http2::Builder::new(TokioExecutor::new());
                let mut connection = std::pin::pin!(builder.serve_connection(io, service));
                tokio::select! { _ = connection.as_mut() => {}, () = told => {} }
                if announces {
                    connection.as_mut().graceful_shutdown();
                    connection.await.unwrap();
                }
            }
        });
        authority
    }

    async fn has_ended(link: &Link) -> bool {
        match &*link.sender.lock().await {
            Some(Sender::Http1(sender, _)) => sender.is_closed(),
            Some(Sender::Http2(shared)) => shared.sender.is_closed(),
            None => true,
        }
    }

    #[tokio::test]
    async fn a_connection_that_ends_idle_has_to_be_announced() {
        for protocol in [Protocol::Http1, Protocol::Http2] {
            for (announces, expected, is_last) in [
                (true, 0, false),
                (false, 1, false),
                (true, 0, true),
                (false, 1, true),
            ] {
                let (events, part) = (Arc::new(Events::default()), Arc::new(Notify::new()));
                let authority = server(protocol, announces, Arc::clone(&part)).await;
                let link = Link::new(authority.clone(), protocol, Arc::clone(&events));
                let request = || {
                    let request = Request::get(format!("http://{authority}/")).body(body(Bytes::new(), None));
                    request.map_err(|error| error.to_string())
                };
                link.send(&request).await.unwrap();
                part.notify_waiters();
                while !has_ended(&link).await {
                    sleep(Duration::from_millis(1)).await;
                }
                if is_last {
                    link.end().await;
                } else {
                    let again = link.send(&request).await;
                    assert!(
                        again.is_ok(),
                        "{protocol:?}, announced: {announces}: {:?}",
                        again.err()
                    );
                }
                let closed = events.closed_without_notice.load(Ordering::Relaxed);
                let connects = events.connects.load(Ordering::Relaxed);
                assert_eq!(
                    (closed, connects),
                    (expected, if is_last { 1 } else { 2 }),
                    "{protocol:?}, announced: {announces}, last: {is_last}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_request_that_is_left_in_the_queue_of_a_connection_that_has_ended_was_never_sent() {
        let request = || marked(Request::get("/").body(body(Bytes::new(), None)).unwrap());
        let ended = CancellationToken::new();
        ended.cancel();
        let (left, mark) = request();
        assert_eq!(
            unless_left(std::future::pending::<()>(), &mark, &ended).await,
            None
        );
        drop(left);
        // One that was taken is answered, if later than the connection has ended.
        let (taken, mark) = request();
        let answered = async {
            drop(taken);
            tokio::task::yield_now().await;
            "answered"
        };
        assert_eq!(unless_left(answered, &mark, &ended).await, Some("answered"));
    }

    #[tokio::test]
    async fn whoever_is_told_to_try_again_has_to_be_told_when() {
        let authority = server(Protocol::Http1, false, Arc::new(Notify::new())).await;
        let link = Link::new(authority.clone(), Protocol::Http1, Arc::new(Events::default()));
        let request = || {
            let request = Request::get(format!("http://{authority}/")).body(body(Bytes::new(), None));
            request.map_err(|error| error.to_string())
        };
        let answered = link.send(&request).await.unwrap();
        assert_eq!((answered.status, answered.fault), (503, Some(NO_RETRY_AFTER)));
    }

    /// What is said of a request to a server that says this to whoever connects, and nothing more.
    async fn failure_after(protocol: Protocol, says: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut buffer = [0; 1_024];
                assert!(stream.read(&mut buffer).await.unwrap() > 0, "nobody has asked");
                stream.write_all(says).await.unwrap();
                stream.shutdown().await.unwrap();
                // Who hangs up on unread bytes resets the connection, and takes back what it has said.
                while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
            }
        });
        let link = Link::new(authority.clone(), protocol, Arc::new(Events::default()));
        let request = || {
            let request = Request::get(format!("http://{authority}/")).body(body(Bytes::new(), None));
            request.map_err(|error| error.to_string())
        };
        link.send(&request).await.err().unwrap()
    }

    #[tokio::test]
    async fn a_connection_that_breaks_is_told_from_an_answer_that_breaks_the_rules() {
        let lost = |text: &str| text.starts_with(LOST);
        let cut_off = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf";
        let cases: [(Protocol, &[u8], bool); 5] = [
            (Protocol::Http1, b"", true),
            (Protocol::Http1, cut_off, true),
            (Protocol::Http1, b"nonsense\r\n\r\n", false),
            (Protocol::Http2, b"", true),
            (Protocol::Http2, b"nonsense, and more of it", false),
        ];
        for (protocol, says, is_lost) in cases {
            let told = failure_after(protocol, says).await;
            assert_eq!(lost(&told), is_lost, "{protocol:?}: {told}");
        }
        // Taken, so that nobody else is given it, and nobody listens.
        let taken = TcpSocket::new_v4().unwrap();
        taken.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let nobody = taken.local_addr().unwrap().to_string();
        let link = Link::new(nobody.clone(), Protocol::Http2, Arc::new(Events::default()));
        let request = || Ok(Request::new(body(Bytes::new(), None)));
        let told = link.send(&request).await.err().unwrap();
        assert!(told.starts_with(CONNECT) && !lost(&told), "{told}");
        // A log-in, which is no link's, is told in the same words.
        _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let url = format!("http://{nobody}/login");
        let source = client.post(&url).send().await.unwrap_err();
        let method = reqwest::Method::POST;
        assert_eq!(failure(&CallError::Transport { method, url, source }), told);
    }
}
