//! TLS to all stores, and e-mail, against real servers with certificates of a private authority.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;
use uuid::Uuid;

use crate::{
    servers::{Port, Service, eventually, temporary_directory},
    stores::{Certificates, Nats, Redis, Stores},
};

/// When a mail server encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encrypts {
    /// From the first byte on.
    AtOnce,
    /// When the client asks for it.
    OnRequest,
    /// It cannot.
    Never,
}

/// A mail server that keeps what it is given.
struct MailSink {
    port: u16,
    received: Arc<Mutex<Vec<String>>>,
    /// How often a client has named itself, and gone on or not.
    greetings: Arc<AtomicUsize>,
    refuses: Arc<Mutex<Option<Refusal>>>,
}

/// What a client says and a mail server refuses for good, whoever the mail is for; or, with no words,
/// does not answer as long as it stands.
type Refusal = (&'static str, &'static str);

/// What a mail server knows of its clients.
#[derive(Clone)]
struct Mailroom {
    encrypts: Encrypts,
    /// Addresses of this domain do not exist here.
    unknown_domain: &'static str,
    received: Arc<Mutex<Vec<String>>>,
    greetings: Arc<AtomicUsize>,
    refuses: Arc<Mutex<Option<Refusal>>>,
}

impl MailSink {
    async fn start(certificates: &Certificates, encrypts: Encrypts, unknown_domain: &'static str) -> Self {
        let chain = CertificateDer::pem_file_iter(&certificates.certificate)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let key = PrivateKeyDer::from_pem_file(&certificates.key).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let room = Mailroom {
            encrypts,
            unknown_domain,
            received: Arc::default(),
            greetings: Arc::default(),
            refuses: Arc::default(),
        };
        let (received, greetings) = (Arc::clone(&room.received), Arc::clone(&room.greetings));
        let refuses = Arc::clone(&room.refuses);
        tokio::spawn(async move {
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                let (acceptor, room) = (acceptor.clone(), room.clone());
                // A client that is gone has said all that it had to.
                tokio::spawn(async move {
                    if encrypts == Encrypts::AtOnce {
                        let mut connection = BufReader::new(acceptor.accept(connection).await?);
                        say(&mut connection, "220 sink").await?;
                        return room.converse(connection, true).await.map(|_| ());
                    }
                    let mut connection = BufReader::new(connection);
                    say(&mut connection, "220 sink").await?;
                    if let Some(connection) = room.converse(connection, false).await? {
                        let connection = acceptor.accept(connection.into_inner()).await?;
                        room.converse(BufReader::new(connection), true).await?;
                    }
                    Ok(())
                });
            }
        });
        Self {
            port,
            received,
            greetings,
            refuses,
        }
    }

    fn received(&self) -> Vec<String> {
        self.received.lock().unwrap().clone()
    }
}

async fn say(connection: &mut (impl AsyncWrite + Unpin), line: &str) -> std::io::Result<()> {
    connection.write_all(format!("{line}\r\n").as_bytes()).await?;
    connection.flush().await
}

impl Mailroom {
    /// Waits as long as this is not answered.
    async fn answers(&self, line: &str) {
        let silent = |&(refused, words): &Refusal| words.is_empty() && line.starts_with(refused);
        while self.refuses.lock().unwrap().as_ref().is_some_and(silent) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Talks until the client leaves, or asks for encryption: then the connection is given back.
    async fn converse<C: AsyncRead + AsyncWrite + Unpin>(
        &self,
        mut connection: BufReader<C>,
        encrypted: bool,
    ) -> std::io::Result<Option<BufReader<C>>> {
        loop {
            let mut line = String::new();
            if connection.read_line(&mut line).await? == 0 {
                return Ok(None);
            }
            self.answers(&line).await;
            let refusal = *self.refuses.lock().unwrap();
            let answer = match line.split([' ', '\r']).next().unwrap_or_default() {
                word if refusal.is_some_and(|(refused, _)| refused == word) => refusal.unwrap().1,
                "EHLO" => {
                    self.greetings.fetch_add(1, Ordering::Relaxed);
                    if !encrypted && self.encrypts == Encrypts::OnRequest {
                        "250-sink\r\n250 STARTTLS"
                    } else {
                        "250-sink\r\n250 AUTH PLAIN"
                    }
                }
                "STARTTLS" => {
                    say(&mut connection, "220 go on").await?;
                    return Ok(Some(connection));
                }
                "AUTH" => "235 welcome",
                "RCPT" if line.contains(self.unknown_domain) => {
                    let answer = format!("550 {}: nobody here", line.trim());
                    say(&mut connection, &answer).await?;
                    continue;
                }
                "DATA" => {
                    say(&mut connection, "354 go on").await?;
                    let mut mail = String::new();
                    while !mail.ends_with("\r\n.\r\n") {
                        if connection.read_line(&mut mail).await? == 0 {
                            return Ok(None);
                        }
                    }
                    self.received.lock().unwrap().push(mail);
                    self.answers(".").await;
                    "250 taken"
                }
                "QUIT" => "221 bye",
                _ => "250 fine",
            };
            say(&mut connection, answer).await?;
        }
    }
}

/// Waits until the service, too, knows that every mail has been sent: killed before, it would send it once more.
async fn none_waits(stores: &Stores) {
    eventually("no mail waits to be sent", || async {
        (stores.count("select count(*) from emails").await == 0).then_some(())
    })
    .await;
}

/// What is never the domain of an address here.
const NOWHERE: &str = "nowhere.invalid";

#[tokio::test(flavor = "multi_thread")]
async fn mails_wait_for_a_server_that_encrypts_and_addresses_stay_out_of_the_log() {
    let certificates = Certificates::new();
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    stores.trade("live", ann, bob, 100, "1").await;
    let authority = certificates.authority.to_str().unwrap();
    let serve = |port: u16| {
        let url = format!("smtp://user:secret@localhost:{port}?tls=required");
        stores.notification(&["--role", "live", "--mail-url", &url, "--mail-ca-file", authority])
    };

    let plain = MailSink::start(&certificates, Encrypts::Never, NOWHERE).await;
    let service = serve(plain.port).ready().await;
    eventually("the mail server has been asked twice", || async {
        (plain.greetings.load(Ordering::Relaxed) >= 2).then_some(())
    })
    .await;
    assert_eq!(plain.received(), Vec::<String>::new());
    drop(service);
    sqlx::query("update emails set due_at = now()")
        .execute(&stores.owner)
        .await
        .unwrap();

    let starttls = MailSink::start(&certificates, Encrypts::OnRequest, NOWHERE).await;
    let service = serve(starttls.port).ready().await;
    eventually("both have mail", || async {
        (starttls.received().len() >= 2).then_some(())
    })
    .await;
    none_waits(&stores).await;
    drop(service);

    // A refusal for good, in words that repeat the address, as those of most servers do.
    let refusing = MailSink::start(&certificates, Encrypts::OnRequest, "example.org").await;
    let service = serve(refusing.port).ready().await;
    stores.trade("live", ann, bob, 101, "1").await;
    let log = service.logged("was given up", 2).await;
    assert_eq!(log.matches("was given up").count(), 2, "{log}");
    assert!(log.contains("the mail server answered 550"), "{log}");
    assert!(!log.contains("example.org"), "{log}");
    assert_eq!(refusing.received(), Vec::<String>::new());
}

/// Two users whose trades are told by mail, and the mail server.
struct Post {
    certificates: Certificates,
    stores: Stores,
    users: [Uuid; 2],
    sink: MailSink,
}

impl Post {
    async fn new() -> Self {
        let certificates = Certificates::new();
        let stores = Stores::start().await;
        let users = [stores.user("live").await, stores.user("live").await];
        let sink = MailSink::start(&certificates, Encrypts::AtOnce, NOWHERE).await;
        Self {
            certificates,
            stores,
            users,
            sink,
        }
    }

    /// A service that sends the mails.
    async fn service(&self) -> Service {
        let url = format!("smtps://user:secret@localhost:{}", self.sink.port);
        let authority = self.certificates.authority.to_str().unwrap();
        let flags = ["--role", "live", "--mail-url", &url, "--mail-ca-file", authority];
        self.stores.notification(&flags).ready().await
    }

    /// A trade, which both are told of.
    async fn trade(&self, price: u32) {
        let [ann, bob] = self.users;
        self.stores.trade("live", ann, bob, price, "1").await;
    }

    /// What the mail server refuses from now on.
    fn refuse(&self, refusal: impl Into<Option<Refusal>>) {
        *self.sink.refuses.lock().unwrap() = refusal.into();
    }

    /// With nothing refused any more, what was not sent is due at once.
    async fn sends_two_after_all(&self, sent: usize) {
        self.refuse(None);
        eventually("both have been sent after all", || async {
            // Again and again: the failure of the last one may be told before that one is put off.
            sqlx::query("update emails set due_at = now()")
                .execute(&self.stores.owner)
                .await
                .unwrap();
            (self.sink.received().len() == sent + 2).then_some(())
        })
        .await;
        none_waits(&self.stores).await;
    }
}

/// What a server has against us, and not against a mail, passes when somebody has mended it.
#[tokio::test(flavor = "multi_thread")]
async fn no_mail_is_lost_to_a_server_that_refuses_us() {
    let post = Post::new().await;
    for (price, refusal) in (100..).zip([
        ("AUTH", "535 the password has changed"),
        ("EHLO", "554 not from where you are"),
        ("AUTH", "504 not like this"),
        ("MAIL", "550 not from whom you are"),
        ("RCPT", "530 who are you"),
    ]) {
        let sent = post.sink.received().len();
        post.refuse(refusal);
        let service = post.service().await;
        post.trade(price).await;
        let code = format!("the mail server answered {}", &refusal.1[..3]);
        service.logged(&code, 1).await;
        post.sends_two_after_all(sent).await;
        assert!(!service.log().contains("was given up"), "{}", service.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mails_wait_no_longer_than_needed_for_a_server_that_falls_silent() {
    let post = Post::new().await;
    for (price, word) in (100..).zip(["EHLO", "DATA"]) {
        let sent = post.sink.received().len();
        post.refuse((word, ""));
        let service = post.service().await;
        post.trade(price).await;
        service
            .logged("the mail server has not answered for 10 s", 1)
            .await;
        // The one that it fell silent at is put off, the other one is as it was.
        eventually("the other one is given back", || async {
            let put_off = "select count(*) from emails where attempts = 1 and due_at > now()";
            let as_it_was = "select count(*) from emails where attempts = 0 and due_at <= now()";
            let (put_off, as_it_was) = (
                post.stores.count(put_off).await,
                post.stores.count(as_it_was).await,
            );
            match word {
                "EHLO" => (as_it_was == 2).then_some(()),
                _ => (put_off == 1 && as_it_was == 1).then_some(()),
            }
        })
        .await;
        post.sends_two_after_all(sent).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_written_to_so_many_times_an_hour_and_told_of_everything() {
    let stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    // Nobody listens there: the mails wait.
    let flags = ["--role", "live", "--mail-url", "smtp://localhost:1"];
    let _service = stores.notification(&flags).ready().await;
    let trade = async |number: u32| {
        for _ in 0..number {
            stores.trade("live", ann, bob, 100, "1").await;
        }
        stores.settled("live").await;
    };
    trade(3).await;
    trade(22).await;
    assert_eq!(stores.count("select count(*) from notifications").await, 50);
    assert_eq!(
        stores.count("select count(*) from emails where seq <= 20").await,
        40
    );
    assert_eq!(stores.count("select count(*) from emails").await, 40);
    // In another hour there may be more again.
    sqlx::query("update notification_counters set hour_began_at = hour_began_at - interval '1 hour'")
        .execute(&stores.owner)
        .await
        .unwrap();
    trade(1).await;
    assert_eq!(
        stores.count("select count(*) from emails where seq = 26").await,
        2
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_who_has_left_is_written_to() {
    let post = Post::new().await;
    post.refuse(("DATA", ""));
    let _service = post.service().await;
    post.trade(100).await;
    eventually("both have been taken", || async {
        (post
            .stores
            .count("select count(*) from emails where due_at > now()")
            .await
            == 2)
            .then_some(())
    })
    .await;
    sqlx::query("update users set email = null, password_hash = null, deleted_at = now()")
        .execute(&post.stores.owner)
        .await
        .unwrap();
    post.refuse(None);
    none_waits(&post.stores).await;
    // The first of them may have been under way.
    assert!(post.sink.received().len() <= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_told_to_stop_does_not_wait_for_a_silent_mail_server() {
    let post = Post::new().await;
    post.refuse(("DATA", ""));
    let service = post.service().await;
    post.trade(100).await;
    eventually("it waits for the server", || async {
        (post.sink.greetings.load(Ordering::Relaxed) > 0).then_some(())
    })
    .await;
    service.signal("TERM");
    let log = service.logged("no longer consuming live messages", 1).await;
    assert!(!log.contains("the mail server has not answered"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_is_under_way_when_its_stack_is_told_to_stop_is_not_sent_twice() {
    let post = Post::new().await;
    post.refuse((".", ""));
    let service = post.service().await;
    post.trade(100).await;
    eventually("the server has a mail that it has not answered", || async {
        (post.sink.received().len() == 1).then_some(())
    })
    .await;
    service.signal("TERM");
    service.logged("terminating", 1).await;
    post.refuse(None);
    service.logged("no longer consuming live messages", 1).await;
    assert_eq!(post.sink.received().len(), 1);
    // The other one is the successor's, and nothing else.
    let _successor = post.service().await;
    none_waits(&post.stores).await;
    assert_eq!(post.sink.received().len(), 2, "{:?}", post.sink.received());
}

#[tokio::test(flavor = "multi_thread")]
async fn events_pass_and_mails_go_out_over_tls_only_to_whom_we_trust() {
    let certificates = Certificates::new();
    let mut stores = Stores::start().await;
    stores.nats = Nats::start_on(Port::free(), Some(&certificates));
    stores.redis = Redis::start(Some(&certificates));
    let sink = MailSink::start(&certificates, Encrypts::AtOnce, NOWHERE).await;
    let mail = format!("smtps://user:secret@localhost:{}", sink.port);
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    stores.trade("live", ann, bob, 100, "1").await;

    // Without the authority's certificate nothing is sent anywhere.
    let untrusting = stores.notification(&["--role", "live", "--mail-url", &mail]);
    untrusting.logged("failed to restore the market data", 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        stores
            .count("select count(*) from outbox where published_at is not null")
            .await,
        0
    );
    drop(untrusting);

    let authority = certificates.authority.to_str().unwrap();
    let flags = [
        "--role",
        "live",
        "--mail-url",
        &mail,
        "--mail-from",
        "Exchange <desk@exchange.example>",
        "--queue-ca-file",
        authority,
        "--market-data-ca-file",
        authority,
        "--mail-ca-file",
        authority,
    ];
    let _service = stores.notification(&flags).ready().await;
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    let mails = eventually("both have mail", || async {
        let mails = sink.received();
        (mails.len() >= 2).then_some(mails)
    })
    .await;
    for user in [ann, bob] {
        let mine: Vec<_> = mails
            .iter()
            .filter(|mail| mail.contains(&format!("To: {user}@example.org")))
            .collect();
        assert_eq!(mine.len(), 1, "{mails:?}");
        assert!(
            mine[0].contains("From: Exchange <desk@exchange.example>"),
            "{}",
            mine[0]
        );
        assert!(
            mine[0].contains(&format!("Message-ID: <{user}.1@exchange.example>")),
            "{}",
            mine[0]
        );
        assert!(
            mine[0].contains("1 BTC-USD at 100") && mine[0].contains("price: 100"),
            "{}",
            mine[0]
        );
    }
    none_waits(&stores).await;
}

/// Like an administrator who changes the passwords of queue and market data, and ends what was connected with the old ones.
#[tokio::test(flavor = "multi_thread")]
async fn new_passwords_of_queue_and_market_data_are_picked_up() {
    let mut stores = Stores::start().await;
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    let directory = temporary_directory("urls");
    let [queue, market] = ["queue", "market"].map(|name| directory.path().join(name));
    std::fs::write(&queue, stores.nats.url()).unwrap();
    std::fs::write(&market, stores.redis.url()).unwrap();
    let [queue_file, market_file] = [&queue, &market].map(|file| file.to_str().unwrap());
    let market_flags = ["--market-data-url-file", market_file];
    let flags = [&market_flags[..], &["--queue-url-file", queue_file]].concat();
    let notification = Service::live("notification", &stores.database, &flags)
        .ready()
        .await;
    let trade = Service::live("trade", &stores.database, &market_flags)
        .ready()
        .await;
    let ticker = || async {
        let answer = trade.get("/market/ticker?product=BTC-USD").await;
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    stores.trade("live", ann, bob, 100, "1").await;
    stores.settled("live").await;
    assert_eq!(ticker().await.0, 200);

    stores.redis.change_password("another").await;
    let port = stores.nats.port();
    drop(std::mem::replace(&mut stores.nats, Nats::start()));
    stores.nats = Nats::start_with(port, "another", None);
    eventually("the old password of the market data is refused", || async {
        (ticker().await.0 == 503).then_some(())
    })
    .await;
    stores.trade("live", ann, bob, 101, "1").await;
    eventually("the old password of the queue is refused", || async {
        stores
            .nats
            .server
            .log()
            .contains("authentication error")
            .then_some(())
    })
    .await;
    assert!(stores.nats.stream("exchange-live").await.is_none());

    std::fs::write(&queue, stores.nats.url()).unwrap();
    std::fs::write(&market, stores.redis.url()).unwrap();
    stores.settled("live").await;
    stores.assert_told_once("live").await;
    eventually("the last price is the new one", || async {
        let (status, body) = ticker().await;
        (status == 200 && body.contains(r#""price":"101""#)).then_some(())
    })
    .await;
    for log in [notification.log(), trade.log()] {
        assert!(!log.contains("another") && !log.contains("secret"), "{log}");
    }
}
