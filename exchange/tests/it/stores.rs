//! The queue and the market-data store, and what tests put into the database for them.

use std::{path::PathBuf, process::Command, sync::OnceLock, time::Duration};

use exchange::{auth::Keys, config::ConfigArgs, lane::Lane};
use redis::AsyncCommands;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::PgPool;
use tempfile::TempDir;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::servers::{Database, Port, Server, Service, binary, client, eventually, temporary_directory};

/// Files for TLS: a certificate for `localhost`, its key, and the authority to trust.
pub(crate) struct Certificates {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) authority: PathBuf,
    _directory: TempDir,
}

impl Certificates {
    pub(crate) fn new() -> Self {
        let directory = temporary_directory("certificates");
        let authority_key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new([]).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = rcgen::CertifiedIssuer::self_signed(parameters, authority_key).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let certificate = rcgen::CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &authority)
            .unwrap();
        let write = |name: &str, content: String| {
            let path = directory.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        Self {
            certificate: write("certificate.pem", certificate.pem()),
            key: write("key.pem", key.serialize_pem()),
            authority: write("authority.pem", authority.pem()),
            _directory: directory,
        }
    }
}

/// A NATS server with JetStream.
pub(crate) struct Nats {
    pub(crate) server: Server,
    port: Port,
    monitor: Port,
    password: &'static str,
    tls: bool,
}

impl Nats {
    pub(crate) fn start() -> Self {
        Self::start_on(Port::free(), None)
    }

    /// A server that a client of the one before on this port takes for the same, come back without its store.
    pub(crate) fn start_on(port: Port, tls: Option<&Certificates>) -> Self {
        Self::start_with(port, "secret", tls)
    }

    /// The same with another password.
    pub(crate) fn start_with(port: Port, password: &'static str, tls: Option<&Certificates>) -> Self {
        let directory = temporary_directory("nats");
        let monitor = Port::free();
        let secure = tls.map_or_else(String::new, |tls| {
            format!(
                "tls {{ cert_file: {:?}, key_file: {:?} }}",
                tls.certificate, tls.key
            )
        });
        let config = format!(
            "listen: \"127.0.0.1:{port}\"\nhttp: \"127.0.0.1:{monitor}\"\n{secure}\n\
             authorization {{ user: exchange, password: {password} }}\n\
             jetstream {{ store_dir: {:?}, sync_interval: always }}\n",
            directory.path().join("store")
        );
        let file = directory.path().join("nats.conf");
        std::fs::write(&file, config).unwrap();
        let server = Server::start(directory, &["nats-server", "-c", file.to_str().unwrap()]);
        server.await_port(&port);
        Self {
            server,
            port,
            monitor,
            password,
            tls: tls.is_some(),
        }
    }

    pub(crate) fn port(&self) -> Port {
        self.port.clone()
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls { "tls" } else { "nats" };
        format!("{scheme}://exchange:{}@localhost:{}", self.password, self.port)
    }

    /// What the broker says about a stream and its consumers.
    pub(crate) async fn stream(&self, name: &str) -> Option<Value> {
        let url = format!(
            "http://127.0.0.1:{}/jsz?consumers=true&streams=true",
            self.monitor
        );
        let answer = client().get(url).send().await.unwrap();
        let report: Value = answer.json().await.unwrap();
        let streams = report["account_details"][0]["stream_detail"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        streams.into_iter().find(|stream| stream["name"] == name)
    }

    pub(crate) async fn jetstream(&self) -> async_nats::jetstream::Context {
        let options = async_nats::ConnectOptions::with_user_and_password(
            "exchange".to_owned(),
            self.password.to_owned(),
        );
        async_nats::jetstream::new(options.connect(self.url()).await.unwrap())
    }
}

/// A Redis-protocol server.
pub(crate) struct Redis {
    server: Server,
    port: Port,
    password: &'static str,
    tls: bool,
}

impl Redis {
    /// The server of services that are not tested for what is in it.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Redis> = OnceLock::new();
        SHARED.get_or_init(|| Self::start(None))
    }

    pub(crate) fn start(tls: Option<&Certificates>) -> Self {
        Self::start_on(Port::free(), tls)
    }

    pub(crate) fn start_on(port: Port, tls: Option<&Certificates>) -> Self {
        let directory = temporary_directory("redis");
        let port_text = port.to_string();
        let files = directory.path().to_str().unwrap().to_owned();
        let mut command = vec![
            "redis-server",
            "--save",
            "",
            "--requirepass",
            "secret",
            "--dir",
            &files,
        ];
        if let Some(tls) = tls {
            let [certificate, key, authority] =
                [&tls.certificate, &tls.key, &tls.authority].map(|path| path.to_str().unwrap());
            command.extend([
                "--port",
                "0",
                "--tls-port",
                &port_text,
                "--tls-auth-clients",
                "no",
            ]);
            command.extend([
                "--tls-cert-file",
                certificate,
                "--tls-key-file",
                key,
                "--tls-ca-cert-file",
                authority,
            ]);
        } else {
            command.extend(["--port", &port_text]);
        }
        let server = Server::start(directory, &command);
        server.await_port(&port);
        Self {
            server,
            port,
            password: "secret",
            tls: tls.is_some(),
        }
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls { "rediss" } else { "redis" };
        format!("{scheme}://:{}@localhost:{}", self.password, self.port)
    }

    /// Keeps what is in the store now, for the next start.
    pub(crate) async fn save(&self) {
        let mut connection = self.connect().await;
        // Not SAVE: a busy disk takes longer than the client waits for an answer.
        redis::cmd("BGSAVE").exec_async(&mut connection).await.unwrap();
        eventually("it is saved", || async {
            let mut connection = connection.clone();
            let state: String = redis::cmd("INFO")
                .arg("persistence")
                .query_async(&mut connection)
                .await
                .ok()?;
            state.contains("rdb_changes_since_last_save:0\r").then_some(())
        })
        .await;
    }

    /// Kills the server and starts it again with what was last saved.
    pub(crate) fn kill_and_restart(&mut self) {
        self.server.kill_and_restart();
        self.server.await_port(&self.port);
    }

    /// Changes the password, and ends all connections.
    pub(crate) async fn change_password(&mut self, password: &'static str) {
        let mut connection = self.connect().await;
        self.password = password;
        let mut change = redis::pipe();
        change.cmd("CONFIG").arg(&["SET", "requirepass", password]);
        change.cmd("CLIENT").arg(&["KILL", "TYPE", "normal"]);
        let _: Vec<redis::Value> = change.query_async(&mut connection).await.unwrap();
    }

    pub(crate) async fn connect(&self) -> redis::aio::MultiplexedConnection {
        redis::Client::open(self.url())
            .unwrap()
            .get_multiplexed_async_connection()
            .await
            .unwrap()
    }

    /// Everything in the store, in an order of its own.
    pub(crate) async fn dump(&self) -> Vec<String> {
        let mut connection = self.connect().await;
        let keys: Vec<String> = connection.keys("*").await.unwrap();
        let mut dump = Vec::new();
        for key in keys {
            let kind: String = redis::cmd("TYPE")
                .arg(&key)
                .query_async(&mut connection)
                .await
                .unwrap();
            let expiry: i64 = redis::cmd("EXPIRETIME")
                .arg(&key)
                .query_async(&mut connection)
                .await
                .unwrap();
            match kind.as_str() {
                "zset" => {
                    let members: Vec<String> = connection.zrange(&key, 0, -1).await.unwrap();
                    dump.extend(
                        members
                            .into_iter()
                            .map(|member| format!("{key} {expiry} {member}")),
                    );
                }
                "hash" => {
                    let fields: Vec<(String, String)> = connection.hgetall(&key).await.unwrap();
                    dump.extend(
                        fields
                            .into_iter()
                            .map(|(field, value)| format!("{key} {expiry} {field} {value}")),
                    );
                }
                _ => dump.push(key),
            }
        }
        dump.sort();
        dump
    }
}

/// A database with a queue and a market-data store beside it.
pub(crate) struct Stores {
    pub(crate) database: Database,
    pub(crate) owner: PgPool,
    pub(crate) nats: Nats,
    pub(crate) redis: Redis,
}

impl Stores {
    pub(crate) async fn start() -> Self {
        Self::beside(Database::migrated(crate::servers::Postgres::shared()).await).await
    }

    /// A queue and a market-data store for a database.
    pub(crate) async fn beside(database: Database) -> Self {
        let owner = PgPool::connect(&database.owner_url).await.unwrap();
        Self {
            database,
            owner,
            nats: Nats::start(),
            redis: Redis::start(None),
        }
    }

    /// A notification service with these flags.
    pub(crate) fn notification(&self, flags: &[&str]) -> Service {
        self.notification_by(&mut Command::new(binary()), flags)
    }

    /// The same by a binary of another version.
    pub(crate) fn notification_by(&self, binary: &mut Command, flags: &[&str]) -> Service {
        let (queue, market) = (self.nats.url(), self.redis.url());
        let stores = ["--queue-url", &queue, "--market-data-url", &market];
        Service::start_by(binary, "notification", &self.database, &[&stores, flags].concat())
    }

    pub(crate) async fn user(&self, lane: &str) -> Uuid {
        let id = Uuid::now_v7();
        sqlx::query("insert into users (id, lane, email, password_hash) values ($1, $2, $3, 'none')")
            .bind(id)
            .bind(lane)
            .bind(format!("{id}@example.org"))
            .execute(&self.owner)
            .await
            .unwrap();
        id
    }

    /// A trade as the settlement writes it, as far as messages are concerned.
    pub(crate) async fn trade(&self, lane: &str, buyer: Uuid, seller: Uuid, price: u32, size: &str) -> i64 {
        let now = OffsetDateTime::now_utc();
        self.trade_at(now, lane, buyer, seller, price, size).await
    }

    /// The same at another time.
    pub(crate) async fn trade_at(
        &self,
        at: OffsetDateTime,
        lane: &str,
        buyer: Uuid,
        seller: Uuid,
        price: u32,
        size: &str,
    ) -> i64 {
        let mut transaction = self.owner.begin().await.unwrap();
        let (id,): (i64,) = sqlx::query_as(
            "with transferred as (
                 insert into transfers (id, lane, kind, created_at)
                 values (nextval('transfer_ids'), $1, 'trade', now()) returning id)
             select id from transferred",
        )
        .bind(lane)
        .fetch_one(&mut *transaction)
        .await
        .unwrap();
        let orders = (Uuid::now_v7(), Uuid::now_v7());
        sqlx::query(
            "insert into trades (id, lane, product, price, size, taker_side, taker_user_id, taker_order_id,
                                 taker_fee, maker_user_id, maker_order_id, maker_fee, executed_at)
             values ($1, $2, 'BTC-USD', $3, $4::numeric, 'buy', $5, $6, 0.2, $7, $8, 0.1, $9)",
        )
        .bind(id)
        .bind(lane)
        .bind(i64::from(price))
        .bind(size)
        .bind(buyer)
        .bind(orders.0)
        .bind(seller)
        .bind(orders.1)
        .bind(at)
        .execute(&mut *transaction)
        .await
        .unwrap();
        let payload = json!({
            "trade_id": id.to_string(), "product": "BTC-USD", "price": price.to_string(), "size": size,
            "taker_side": "buy", "executed_at": "2026-11-23T10:00:00Z",
            "buyer": {"user_id": buyer, "order_id": orders.0, "fee": "0.2"},
            "seller": {"user_id": seller, "order_id": orders.1, "fee": "0.1"},
        });
        sqlx::query("insert into outbox (id, lane, topic, key, payload) values ($1, $2, 'trade.executed', 'BTC-USD', $3)")
            .bind(Uuid::now_v7())
            .bind(lane)
            .bind(payload)
            .execute(&mut *transaction)
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        id
    }

    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        let (count,): (i64,) = sqlx::query_as(sql).fetch_one(&self.owner).await.unwrap();
        count
    }

    /// Waits until every event of the lane has been handled by all its consumers.
    pub(crate) async fn settled(&self, lane: &str) {
        eventually("all events are done", || async {
            let (open,): (i64,) =
                sqlx::query_as("select count(*) from outbox where done_at is null and lane = $1")
                    .bind(lane)
                    .fetch_one(&self.owner)
                    .await
                    .unwrap();
            (open == 0).then_some(())
        })
        .await;
    }

    /// Has the broker deliver every message of the live lane once more: a new consumer of the same name begins at the first.
    pub(crate) async fn deliver_again(&self) {
        let jetstream = self.nats.jetstream().await;
        for consumer in ["notification", "market"] {
            jetstream
                .delete_consumer_from_stream(consumer, "exchange-live")
                .await
                .unwrap();
        }
    }

    /// Fails unless each trade of the lane was told exactly once to exactly its two sides.
    pub(crate) async fn assert_told_once(&self, lane: &str) {
        let wrong: Vec<(String,)> = sqlx::query_as(
            "select coalesce(told.trade, expected.trade)
             from (select data ->> 'trade_id' as trade, user_id, count(*) as times from notifications
                   where lane = $1 and kind = 'trade' group by 1, 2) told
             full join (select id::text as trade, taker_user_id as user_id from trades where lane = $1
                        union all select id::text, maker_user_id from trades where lane = $1) expected
               on expected.trade = told.trade and expected.user_id = told.user_id
             where told.times is distinct from 1 or expected.trade is null",
        )
        .bind(lane)
        .fetch_all(&self.owner)
        .await
        .unwrap();
        assert!(wrong.is_empty(), "not told once: {wrong:?}");
    }

    /// Loses the market data.
    pub(crate) async fn flush_market_data(&self) {
        let mut connection = self.redis.connect().await;
        redis::cmd("FLUSHALL").exec_async(&mut connection).await.unwrap();
    }

    /// Waits until the live market data are complete, and returns everything in the store.
    pub(crate) async fn complete_market_data(&self) -> Vec<String> {
        eventually("the market data are complete", || async {
            let dump = self.redis.dump().await;
            let complete = dump.iter().any(|line| line == "exchange:live:complete");
            complete.then_some(dump)
        })
        .await
    }

    /// Runs `exchange market rebuild`.
    pub(crate) fn rebuild_market_data(&self) {
        let output = Command::new(binary())
            .args(["market", "rebuild"])
            .args(["--database-url", &self.database.app_url])
            .args(["--market-data-url", &self.redis.url()])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }

    /// An access token of a user.
    pub(crate) async fn token(&self, user: Uuid, lane: &str) -> String {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            args: ConfigArgs,
        }
        let flags = [
            "exchange",
            "--role=live",
            "--database-url",
            &self.database.owner_url,
        ];
        let config = <Command as clap::Parser>::parse_from(flags)
            .args
            .validate()
            .unwrap();
        let lane: Lane = lane.parse().unwrap();
        let issued = Keys::new(self.owner.clone(), &config)
            .issue(user, Uuid::now_v7(), lane, &[])
            .await
            .unwrap();
        issued.token.expose_secret().to_owned()
    }
}

/// How long something that must not happen is waited for.
pub(crate) const QUIET: Duration = Duration::from_secs(3);
