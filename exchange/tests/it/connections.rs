//! The accept loop over real sockets: no request is lost by a connection that the server closes.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    routing::{get, post},
};
use exchange::server::{self, Closing, Counts, Options};
use futures::{StreamExt, stream};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::servers::eventually;

/// Long enough to notice a connection that is closed at once.
const A_WHILE: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_mins(1);

const OPTIONS: Options = Options {
    max_connection_age: LONG,
    request_timeout: LONG,
    max_body_size: 64 * 1024,
};

/// A server of which the test decides when it closes, and when `/slow` answers.
struct Running {
    address: SocketAddr,
    closing: watch::Sender<Closing>,
    counts: Counts,
    release: Arc<Notify>,
    stop: CancellationToken,
}

impl Running {
    async fn start(options: Options) -> Self {
        let release = Arc::new(Notify::new());
        let (slow, streamed) = (Arc::clone(&release), Arc::clone(&release));
        let router = Router::new()
            .route(
                "/",
                get(|| async { "hello" }).post(|body: Bytes| async move { body }),
            )
            .route("/ignores-body", post(|| async { StatusCode::IM_A_TEAPOT }))
            .route(
                "/slow",
                get(async move || {
                    slow.notified().await;
                    "at last"
                }),
            )
            .route(
                "/stream",
                get(async move || {
                    let rest = stream::once(async move {
                        streamed.notified().await;
                        Ok::<_, std::io::Error>("end")
                    });
                    Body::from_stream(stream::iter([Ok("begin ")]).chain(rest))
                }),
            );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (closing, receiver) = watch::channel(Closing::No);
        let (counts, stop) = (Counts::default(), CancellationToken::new());
        let stack = HeaderValue::from_static("blue-test");
        tokio::spawn(server::serve(
            listener,
            router,
            stack,
            options,
            counts.clone(),
            receiver,
            stop.clone(),
        ));
        Self {
            address,
            closing,
            counts,
            release,
            stop,
        }
    }

    fn drain(&self) {
        self.closing.send_replace(Closing::within(LONG));
    }

    /// Draining has begun so long ago that what was open then has been cut.
    fn drained(&self) {
        self.closing.send_replace(Closing::Asked {
            since: Instant::now() - 2 * LONG,
            patience: LONG,
        });
    }

    async fn connect(&self) -> Client {
        Client(BufReader::new(TcpStream::connect(self.address).await.unwrap()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// An HTTP/1.1 client that sees everything.
struct Client(BufReader<TcpStream>);

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn closes(&self) -> bool {
        self.head.contains("connection: close\r\n")
    }
}

impl Client {
    async fn send(&mut self, request: &str) {
        self.0.write_all(request.as_bytes()).await.unwrap();
    }

    /// The next response, or none if the server closes instead.
    async fn receive(&mut self) -> std::io::Result<Option<Answer>> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.0.read_line(&mut head).await? == 0 {
                return Ok(None);
            }
        }
        head.make_ascii_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.0.read_exact(&mut body).await?;
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Ok(Some(Answer {
            status,
            head,
            body: String::from_utf8(body).unwrap(),
        }))
    }

    async fn get(&mut self, path: &str) -> Answer {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"))
            .await;
        self.receive()
            .await
            .unwrap()
            .expect("the server closed the connection under a request")
    }

    async fn post(&mut self, path: &str, body: &str) -> Answer {
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
        self.receive()
            .await
            .unwrap()
            .expect("the server closed the connection under a request")
    }

    async fn assert_open(&mut self) {
        let closed = timeout(A_WHILE, self.0.fill_buf()).await;
        assert!(
            closed.is_err(),
            "the server closed an idle connection: {closed:?}"
        );
    }

    async fn assert_closed(&mut self) {
        let end = timeout(LONG, self.0.fill_buf())
            .await
            .expect("the server keeps the connection");
        assert!(end.is_err() || end.is_ok_and(<[u8]>::is_empty));
    }
}

#[tokio::test]
async fn every_response_names_the_stack() {
    let server = Running::start(OPTIONS).await;
    let mut client = server.connect().await;
    for (path, status) in [("/", 200), ("/nowhere", 404), ("/ignores-body", 405)] {
        let answer = client.get(path).await;
        assert_eq!(answer.status, status, "{path}");
        assert!(
            answer.head.contains("x-exchange-stack: blue-test\r\n"),
            "{path}: {}",
            answer.head
        );
    }
    // Also what no handler has seen.
    client.send("this is not HTTP\r\n\r\n").await;
    let answer = client.receive().await.unwrap().unwrap();
    assert_eq!(answer.status, 400);
    assert!(
        answer.head.contains("\r\nx-exchange-stack: blue-test\r\n"),
        "{}",
        answer.head
    );
    client.assert_closed().await;
}

#[tokio::test]
async fn draining_asks_idle_connections_to_close_with_their_next_response() {
    let server = Running::start(OPTIONS).await;
    let (mut used, mut unused) = (server.connect().await, server.connect().await);
    assert!(!used.get("/").await.closes());
    server.drain();
    used.assert_open().await;
    unused.assert_open().await;
    for client in [&mut used, &mut unused, &mut server.connect().await] {
        assert!(client.get("/").await.closes());
        client.assert_closed().await;
    }
    eventually("no connection is counted", || async {
        (server.counts.connections() == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_stack_that_is_live_again_keeps_its_connections() {
    let server = Running::start(OPTIONS).await;
    let mut client = server.connect().await;
    server.drain();
    server.closing.send_replace(Closing::No);
    assert!(!client.get("/").await.closes());
    client.assert_open().await;
}

#[tokio::test]
async fn a_response_that_began_before_draining_is_completed_and_asks_to_close() {
    let server = Running::start(OPTIONS).await;
    let mut client = server.connect().await;
    client.send("GET /slow HTTP/1.1\r\nhost: test\r\n\r\n").await;
    eventually("it is in flight", || async {
        (server.counts.in_flight() == 1).then_some(())
    })
    .await;
    server.drain();
    server.release.notify_one();
    let answer = client.receive().await.unwrap().unwrap();
    assert_eq!(answer.body, "at last");
    assert!(answer.closes());
    eventually("nothing is in flight", || async {
        (server.counts.in_flight() == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_response_is_in_flight_until_its_body_has_been_sent() {
    let server = Running::start(OPTIONS).await;
    let mut client = server.connect().await;
    client.send("GET /stream HTTP/1.1\r\nhost: test\r\n\r\n").await;
    client.receive().await.unwrap().unwrap();
    assert_eq!((server.counts.connections(), server.counts.in_flight()), (1, 1));
    server.release.notify_one();
    eventually("it has been sent", || async {
        (server.counts.in_flight() == 0).then_some(())
    })
    .await;
    assert_eq!(server.counts.connections(), 1);
}

#[tokio::test]
async fn what_is_open_at_the_deadline_is_cut() {
    let server = Running::start(OPTIONS).await;
    let (mut idle, mut busy) = (server.connect().await, server.connect().await);
    idle.get("/").await;
    busy.send("GET /slow HTTP/1.1\r\nhost: test\r\n\r\n").await;
    server.closing.send_replace(Closing::within(A_WHILE));
    idle.assert_closed().await;
    busy.assert_closed().await;
    // Whoever comes later has as long.
    let began = Instant::now();
    server.connect().await.assert_closed().await;
    assert!(began.elapsed() >= A_WHILE, "cut after {:?}", began.elapsed());
}

#[tokio::test]
async fn whoever_connects_after_the_deadline_is_served_and_asked_to_close() {
    let server = Running::start(OPTIONS).await;
    server.drained();
    let mut late = server.connect().await;
    late.assert_open().await;
    assert!(late.get("/").await.closes());
    late.assert_closed().await;
    let (mut sender, ended) = http2(&server).await;
    assert_eq!(sender.send_request(request("/")).await.unwrap().status(), 200);
    drop(sender);
    ended.await.unwrap().expect("the connection ends in order");
    let mut kept = server.connect().await;
    server.closing.send_replace(Closing::No);
    assert!(!kept.get("/").await.closes());
    kept.assert_open().await;
}

#[tokio::test]
async fn an_old_connection_is_asked_to_close_with_its_next_response() {
    let server = Running::start(Options {
        max_connection_age: Duration::from_millis(50),
        ..OPTIONS
    })
    .await;
    let mut client = server.connect().await;
    client.assert_open().await;
    assert!(client.get("/").await.closes());
    client.assert_closed().await;
}

#[tokio::test]
async fn a_header_may_not_stall_but_an_idle_connection_may_wait() {
    let options = Options {
        request_timeout: Duration::from_millis(100),
        ..OPTIONS
    };
    let server = Running::start(options).await;
    let (mut idle, mut stalls) = (server.connect().await, server.connect().await);
    idle.get("/").await;
    stalls.get("/").await;
    stalls.send("GET / HTTP/1.1\r\nho").await;
    stalls.assert_closed().await;
    let mut stalls_at_once = server.connect().await;
    stalls_at_once.send("PRI * HT").await;
    stalls_at_once.assert_closed().await;
    idle.assert_open().await;
    assert!(!idle.get("/").await.closes());
}

#[tokio::test]
async fn a_body_that_nobody_reads_does_not_cost_the_next_request() {
    let server = Running::start(OPTIONS).await;
    let mut client = server.connect().await;
    // The body arrives after the answer could have been given.
    client
        .send("POST /ignores-body HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\n")
        .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.send("late").await;
    let answer = client.receive().await.unwrap().unwrap();
    assert_eq!(answer.status, 418);
    assert!(!answer.closes());
    assert_eq!(client.post("/", "echo").await.body, "echo");

    let answer = client.post("/ignores-body", &"x".repeat(4 * 1024 * 1024)).await;
    assert_eq!(answer.status, 418);
    assert!(
        answer.closes(),
        "a body too large to be skipped ends the connection, which must be said"
    );
    client.assert_closed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_while_draining_comes_and_goes() {
    let server = Arc::new(Running::start(OPTIONS).await);
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..32)
        .map(|number| {
            let (server, over) = (Arc::clone(&server), Arc::clone(&over));
            tokio::spawn(async move {
                let mut client = server.connect().await;
                let (mut answered, mut closed) = (0, 0);
                while !over.load(Ordering::Relaxed) || answered <= 50 || closed <= 5 {
                    let answer = if number % 2 == 0 {
                        client.get("/").await
                    } else {
                        client.post("/", "hello").await
                    };
                    assert_eq!(answer.body, "hello");
                    answered += 1;
                    if answer.closes() {
                        client = server.connect().await;
                        closed += 1;
                    }
                    tokio::time::sleep(Duration::from_micros(rand::random_range(0..2000))).await;
                }
            })
        })
        .collect();
    let mut rounds = 0;
    // On a busy machine until every client has seen enough of it.
    while rounds < 100 || !clients.iter().all(JoinHandle::is_finished) {
        server.drain();
        tokio::time::sleep(Duration::from_millis(10)).await;
        server.closing.send_replace(Closing::No);
        tokio::time::sleep(Duration::from_millis(10)).await;
        rounds += 1;
        over.store(rounds >= 100, Ordering::Relaxed);
    }
    for client in clients {
        client.await.unwrap();
    }
}

#[tokio::test]
async fn http2_is_told_to_go_away_and_loses_nothing() {
    let server = Running::start(OPTIONS).await;
    let (mut sender, ended) = http2(&server).await;
    let slow = sender.send_request(request("/slow"));
    eventually("it is in flight", || async {
        (server.counts.in_flight() == 1).then_some(())
    })
    .await;
    server.drain();
    let told = || {
        // The client library keeps a request that it may not send any more.
        let attempt = timeout(A_WHILE, sender.send_request(request("/")));
        async { (!matches!(attempt.await, Ok(Ok(_)))).then_some(()) }
    };
    eventually("the client opens no more streams", told).await;
    server.release.notify_one();
    let response = slow.await.unwrap();
    assert_eq!(response.headers()["x-exchange-stack"], "blue-test");
    assert!(!response.headers().contains_key("connection"));
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes(),
        "at last"
    );
    drop(sender);
    ended.await.unwrap().expect("the connection ends in order");
}

#[tokio::test]
async fn http2_opened_while_draining_has_its_first_request_served() {
    let server = Running::start(OPTIONS).await;
    server.drain();
    loop {
        let opened = Instant::now();
        let (mut sender, ended) = http2(&server).await;
        // Longer than a farewell needs that is said at once.
        tokio::time::sleep(A_WHILE).await;
        let answer = sender.send_request(request("/")).await;
        drop(sender);
        ended.await.unwrap().expect("the connection ends in order");
        // A machine that stalls for longer than is waited for the first request has shown nothing.
        if opened.elapsed() < Duration::from_secs(1) {
            assert_eq!(answer.unwrap().status(), 200);
            break;
        }
    }
    let (_unused, ended) = http2(&server).await;
    ended.await.unwrap().expect("the connection ends in order");
}

#[tokio::test]
async fn http2_is_told_to_go_away_when_it_is_old() {
    let server = Running::start(Options {
        max_connection_age: Duration::from_millis(50),
        ..OPTIONS
    })
    .await;
    let (sender, ended) = http2(&server).await;
    eventually("the client has been told", || async {
        sender.is_closed().then_some(())
    })
    .await;
    ended.await.unwrap().expect("the connection ends in order");
}

/// A frame of HTTP/2 (RFC 9113, 4.1).
fn frame(kind: u8, flags: u8, stream: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).unwrap();
    [&[0, 0, length, kind, flags, 0, 0, 0, stream], content].concat()
}

#[tokio::test]
async fn http2_that_has_ended_is_not_reset_by_what_the_client_still_sends() {
    const HEADERS: u8 = 1;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;
    let server = Running::start(OPTIONS).await;
    server.drain();
    let mut client = TcpStream::connect(server.address).await.unwrap();
    // GET http://test/ in indexes of HPACK's static table.
    let get = frame(HEADERS, 5, 1, b"\x82\x86\x84\x41\x04test");
    let hello = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(SETTINGS, 0, 0, &[]),
        get,
    ];
    client.write_all(&hello.concat()).await.unwrap();
    let mut answered = false;
    let mut header = [0; 9];
    while client.read_exact(&mut header).await.is_ok() {
        let mut content = vec![0; usize::from(header[1]) << 8 | usize::from(header[2])];
        client.read_exact(&mut content).await.unwrap();
        answered |= header[3] == HEADERS;
        if header[3] == PING {
            client.write_all(&frame(PING, 1, 0, &content)).await.unwrap();
        }
    }
    assert!(answered);
    client
        .write_all(&frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]))
        .await
        .unwrap();
    let reset = timeout(A_WHILE, client.ready(Interest::ERROR)).await;
    assert!(reset.is_err(), "the connection was reset: {reset:?}");
    drop(client);
    eventually("the connection is over", || async {
        (server.counts.connections() == 0).then_some(())
    })
    .await;
}

type Sender = hyper::client::conn::http2::SendRequest<Empty<Bytes>>;

async fn http2(server: &Running) -> (Sender, JoinHandle<hyper::Result<()>>) {
    let stream = TcpStream::connect(server.address).await.unwrap();
    let io = TokioIo::new(stream);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    (sender, tokio::spawn(connection))
}

fn request(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://test{path}"))
        .body(Empty::new())
        .unwrap()
}
