//! TLS to all stores, and e-mail, against real servers with certificates of a private authority.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    servers::{eventually, free_port},
    stores::{Certificates, Nats, Redis, Stores},
};

/// A mail server that keeps what it is given.
struct MailSink {
    port: u16,
    received: Arc<Mutex<Vec<String>>>,
}

impl MailSink {
    async fn start(certificates: &Certificates) -> Self {
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
        let received = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&received);
        tokio::spawn(async move {
            loop {
                let (connection, _) = listener.accept().await.unwrap();
                let (acceptor, sink) = (acceptor.clone(), Arc::clone(&sink));
                tokio::spawn(async move {
                    if let Ok(connection) = acceptor.accept(connection).await {
                        // A client that is gone has said all that it had to.
                        let _ = converse(connection, &sink).await;
                    }
                });
            }
        });
        Self { port, received }
    }

    fn received(&self) -> Vec<String> {
        self.received.lock().unwrap().clone()
    }
}

async fn converse(
    connection: impl AsyncRead + AsyncWrite + Unpin,
    sink: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut connection = BufReader::new(connection);
    connection.write_all(b"220 sink\r\n").await?;
    connection.flush().await?;
    let mut line = String::new();
    loop {
        line.clear();
        if connection.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let answer = match line.split([' ', '\r']).next().unwrap_or_default() {
            "EHLO" => "250-sink\r\n250 AUTH PLAIN\r\n",
            "AUTH" => "235 welcome\r\n",
            "DATA" => {
                connection.write_all(b"354 go on\r\n").await?;
                connection.flush().await?;
                let mut mail = String::new();
                while !mail.ends_with("\r\n.\r\n") {
                    connection.read_line(&mut mail).await?;
                }
                sink.lock().unwrap().push(mail);
                "250 taken\r\n"
            }
            "QUIT" => "221 bye\r\n",
            _ => "250 fine\r\n",
        };
        connection.write_all(answer.as_bytes()).await?;
        connection.flush().await?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_pass_and_mails_go_out_over_tls_only_to_whom_we_trust() {
    let certificates = Certificates::new();
    let mut stores = Stores::start().await;
    stores.nats = Nats::start_on(free_port(), Some(&certificates));
    stores.redis = Redis::start(Some(&certificates));
    let sink = MailSink::start(&certificates).await;
    let mail = format!("smtps://user:secret@localhost:{}", sink.port);
    let (ann, bob) = (stores.user("live").await, stores.user("live").await);
    stores.trade("live", ann, bob, 100, "1").await;

    // Without the authority's certificate nothing is sent anywhere.
    let untrusting = stores.notification(&["--role", "live", "--mail-url", &mail]);
    eventually("the service has refused the broker's certificate", || async {
        let log = untrusting.log();
        log.contains("failed to look at the market data").then_some(())
    })
    .await;
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
    eventually("nothing waits to be sent", || async {
        (stores.count("select count(*) from emails").await == 0).then_some(())
    })
    .await;
}
