//! Configuration by flags and environment variables, checked as a whole: every problem is listed at once.

use std::{
    fmt::{self, Display},
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use lettre::{AsyncSmtpTransport, Tokio1Executor};
use reqwest::Url;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgConnectOptions;

use crate::{mail::MailConfig, market::StoreConfig};

/// Something that a service works with, and reaches by a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// PostgreSQL. Nothing works without it.
    Database,
    /// The message queue.
    Queue,
    /// The market-data store.
    MarketData,
    /// The mail server.
    Mail,
}

impl Peer {
    fn flag(self) -> &'static str {
        match self {
            Self::Database => "database-url",
            Self::Queue => "queue-url",
            Self::MarketData => "market-data-url",
            Self::Mail => "mail-url",
        }
    }

    /// What its URL looks like.
    fn shape(self) -> &'static str {
        match self {
            Self::Database => "postgres://user:password@host:port/database?sslmode=verify-full",
            Self::Queue => "nats://user:password@host:port, or tls://… for TLS",
            Self::MarketData => "redis://user:password@host:port, or rediss://… for TLS",
            Self::Mail => "smtps://user:password@host:port, or smtp://…?tls=required for STARTTLS",
        }
    }

    fn schemes(self) -> &'static [&'static str] {
        match self {
            Self::Database => &["postgres", "postgresql"],
            Self::Queue => &["nats", "tls"],
            Self::MarketData => &["redis", "rediss"],
            Self::Mail => &["smtp", "smtps"],
        }
    }

    /// Checks a URL as the client library will read it. What is wrong is said in words that do not repeat the URL,
    /// which holds a password; those of the libraries may.
    fn check(self, text: &str) -> Result<(), String> {
        let url = Url::parse(text).map_err(|error| error.to_string())?;
        if !self.schemes().contains(&url.scheme()) {
            return Err("it begins with the wrong scheme".to_owned());
        }
        // A host that is left out means a local socket to PostgreSQL only.
        if self != Self::Database && url.host_str().is_none_or(str::is_empty) {
            return Err("it has no host".to_owned());
        }
        let usable = match self {
            Self::Database => {
                for (name, file) in url.query_pairs() {
                    if ["sslrootcert", "sslcert", "sslkey"].contains(&&*name) {
                        std::fs::metadata(&*file).map_err(|error| format!("{name}={file}: {error}"))?;
                    }
                }
                text.parse::<PgConnectOptions>().is_ok()
            }
            Self::Queue => text.parse::<async_nats::ServerAddr>().is_ok(),
            Self::MarketData => redis::Client::open(text).is_ok(),
            Self::Mail => AsyncSmtpTransport::<Tokio1Executor>::from_url(text).is_ok(),
        };
        if usable {
            Ok(())
        } else {
            Err("its path or a parameter is not one that is known".to_owned())
        }
    }
}

/// How to reach the database.
#[derive(Clone, Debug, clap::Args)]
struct DatabaseArgs {
    /// PostgreSQL: `postgres://user:password@host:port/database?sslmode=verify-full&sslrootcert=/path`.
    #[arg(long, env = "EXCHANGE_DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// A file with the database URL, read again when it changes.
    #[arg(long, env = "EXCHANGE_DATABASE_URL_FILE")]
    database_url_file: Option<PathBuf>,
}

impl DatabaseArgs {
    fn check(self, problems: &mut Problems) -> Option<StoreUrl> {
        problems.url(Peer::Database, true, self.database_url, self.database_url_file)
    }
}

/// How to reach the market-data store.
#[derive(Clone, Debug, clap::Args)]
#[expect(clippy::struct_field_names, reason = "they are named as the flags are")]
struct MarketDataArgs {
    /// A Redis-protocol store: `redis://` or `rediss://user:password@host:port`.
    #[arg(long, env = "EXCHANGE_MARKET_DATA_URL", hide_env_values = true)]
    market_data_url: Option<String>,
    /// A file with the market-data store's URL, read again on each reconnect.
    #[arg(long, env = "EXCHANGE_MARKET_DATA_URL_FILE")]
    market_data_url_file: Option<PathBuf>,
    /// PEM certificates to trust at the market-data store, instead of those of the system.
    #[arg(long, env = "EXCHANGE_MARKET_DATA_CA_FILE")]
    market_data_ca_file: Option<PathBuf>,
}

impl MarketDataArgs {
    fn check(self, problems: &mut Problems, required: bool) -> Option<StoreConfig> {
        let (url, file) = (self.market_data_url, self.market_data_url_file);
        let url = problems.url(Peer::MarketData, required, url, file);
        let ca_file = problems.certificates("market-data-ca-file", self.market_data_ca_file);
        url.map(|url| StoreConfig { url, ca_file })
    }
}

/// The flags of `exchange market rebuild`.
#[derive(Clone, Debug, clap::Args)]
pub struct RebuildArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    market_data: MarketDataArgs,
}

impl RebuildArgs {
    /// Checks everything, and reports everything that is wrong.
    pub fn validate(self) -> Result<(StoreUrl, StoreConfig), InvalidConfig> {
        let mut problems = Problems(Vec::new());
        let database = self.database.check(&mut problems);
        match (database, self.market_data.check(&mut problems, true)) {
            (Some(database), Some(market_data)) if problems.0.is_empty() => Ok((database, market_data)),
            _ => Err(InvalidConfig(problems.0)),
        }
    }
}

/// The flags of a service. Each is also read from `EXCHANGE_<FLAG>`. Durations are written like `1h30m` or `250ms`.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    /// Where clients connect; port 0 takes a free one and logs it.
    #[arg(long, env = "EXCHANGE_PUBLIC_ADDRESS", default_value = "0.0.0.0:8080")]
    public_address: String,
    /// Where /livez, /readyz, /metrics and /stack are served.
    #[arg(long, env = "EXCHANGE_ADMIN_ADDRESS", default_value = "0.0.0.0:9090")]
    admin_address: String,
    #[command(flatten)]
    database: DatabaseArgs,
    /// The most connections that this process opens to PostgreSQL.
    #[arg(long, env = "EXCHANGE_DATABASE_CONNECTIONS", default_value = "10")]
    database_connections: String,
    /// NATS: `nats://` or `tls://user:password@host:port`.
    #[arg(long, env = "EXCHANGE_QUEUE_URL", hide_env_values = true)]
    queue_url: Option<String>,
    /// A file with the queue's URL, read again on each reconnect.
    #[arg(long, env = "EXCHANGE_QUEUE_URL_FILE")]
    queue_url_file: Option<PathBuf>,
    #[command(flatten)]
    market_data: MarketDataArgs,
    /// PEM certificates to trust at the queue, beside those of the system.
    #[arg(long, env = "EXCHANGE_QUEUE_CA_FILE")]
    queue_ca_file: Option<PathBuf>,
    /// A mail server, if users are to be told by e-mail: `smtps://user:password@host:port`, or
    /// `smtp://…?tls=required` for STARTTLS.
    #[arg(long, env = "EXCHANGE_MAIL_URL", hide_env_values = true)]
    mail_url: Option<String>,
    /// A file with the mail server's URL, read again for each batch of e-mails.
    #[arg(long, env = "EXCHANGE_MAIL_URL_FILE")]
    mail_url_file: Option<PathBuf>,
    /// PEM certificates to trust at the mail server, beside those of the system.
    #[arg(long, env = "EXCHANGE_MAIL_CA_FILE")]
    mail_ca_file: Option<PathBuf>,
    /// The sender of e-mails, `Name <address>`.
    #[arg(
        long,
        env = "EXCHANGE_MAIL_FROM",
        default_value = "Exchange <no-reply@exchange.invalid>"
    )]
    mail_from: String,
    /// How long a stack is live before users are told of the release: longer than releases are verified.
    #[arg(long, env = "EXCHANGE_NOTICE_DELAY", default_value = "2m")]
    notice_delay: String,
    /// The colour of this stack.
    #[arg(long, env = "EXCHANGE_COLOUR", default_value = "blue")]
    colour: String,
    /// The revision of this stack.
    #[arg(long, env = "EXCHANGE_REVISION", default_value = "local")]
    revision: String,
    /// `follow` asks the live Service who is live; `live` is for running without one.
    #[arg(long, env = "EXCHANGE_ROLE", default_value = "follow")]
    role: String,
    /// The live Service of this service, asked each second who answers.
    #[arg(long, env = "EXCHANGE_LIVE_URL")]
    live_url: Option<String>,
    /// How long a draining stack waits for each of its clients before it closes the connection, one made later for as long.
    #[arg(long, env = "EXCHANGE_DRAIN_TIMEOUT", default_value = "5m")]
    drain_timeout: String,
    /// How long a terminating process waits for its clients before it exits.
    #[arg(long, env = "EXCHANGE_TERMINATION_DEADLINE", default_value = "1m30s")]
    termination_deadline: String,
    /// The age from which a connection is asked to close, give or take a tenth.
    #[arg(long, env = "EXCHANGE_MAX_CONNECTION_AGE", default_value = "10m")]
    max_connection_age: String,
    /// How long a client may take for the rest of a request's header, and for a body.
    #[arg(long, env = "EXCHANGE_REQUEST_TIMEOUT", default_value = "15s")]
    request_timeout: String,
    /// The largest request body, in bytes.
    #[arg(long, env = "EXCHANGE_MAX_BODY_SIZE", default_value = "65536")]
    max_body_size: String,
    /// Networks of proxies whose `X-Forwarded-For` is believed, separated by commas. Without those of an ingress,
    /// everybody behind it is limited as one address.
    #[arg(long, env = "EXCHANGE_TRUSTED_PROXIES", default_value = "")]
    trusted_proxies: String,
    /// A file with the secret that opens this stack's test lanes; without it there are none.
    #[arg(long, env = "EXCHANGE_LANE_SECRET_FILE")]
    lane_secret_file: Option<PathBuf>,
    /// The secret that opens this stack's test lanes, when it is not in a file.
    #[arg(long, env = "EXCHANGE_LANE_SECRET", hide_env_values = true)]
    lane_secret: Option<String>,
    /// Who issues access tokens: their `iss`.
    #[arg(long, env = "EXCHANGE_ISSUER", default_value = "exchange")]
    issuer: String,
    /// How long an access token is valid.
    #[arg(long, env = "EXCHANGE_ACCESS_TOKEN_LIFETIME", default_value = "5m")]
    access_token_lifetime: String,
    /// For how long the signing keys are trusted as they were read: a key that is deleted is refused after that.
    #[arg(long, env = "EXCHANGE_KEYS_REFRESH", default_value = "1m")]
    keys_refresh: String,
    /// How long a session lives without a refresh.
    #[arg(long, env = "EXCHANGE_REFRESH_TOKEN_LIFETIME", default_value = "720h")]
    refresh_token_lifetime: String,
    /// How long an export of a user's data waits for its reader to take the next part.
    #[arg(long, env = "EXCHANGE_EXPORT_PATIENCE", default_value = "10s")]
    export_patience: String,
    /// Exports per user in 15 minutes. Each may take five of them, and there are two at a time in a process.
    #[arg(long, env = "EXCHANGE_EXPORTS_PER_USER", default_value = "2")]
    exports_per_user: String,
    /// How often a live trade service audits the ledger.
    #[arg(long, env = "EXCHANGE_AUDIT_INTERVAL", default_value = "5m")]
    audit_interval: String,
    /// Log-ins per account in 15 minutes that may fail.
    #[arg(long, env = "EXCHANGE_LOGIN_ATTEMPTS_PER_ACCOUNT", default_value = "10")]
    login_attempts_per_account: String,
    /// Log-ins per client address in 15 minutes that may fail, and registrations.
    #[arg(long, env = "EXCHANGE_LOGIN_ATTEMPTS_PER_ADDRESS", default_value = "100")]
    login_attempts_per_address: String,
    /// Log-ins per account in 15 minutes that may succeed.
    #[arg(long, env = "EXCHANGE_LOGINS_PER_ACCOUNT", default_value = "100")]
    logins_per_account: String,
    /// Passwords hashed at the same time; further ones wait.
    #[arg(long, env = "EXCHANGE_PASSWORD_HASHERS", default_value = "1")]
    password_hashers: String,
}

/// A service's configuration, valid in itself.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients connect.
    pub public_address: SocketAddr,
    /// Where the admin port listens.
    pub admin_address: SocketAddr,
    /// The database.
    pub database: StoreUrl,
    /// The most connections in the pool.
    pub database_connections: u32,
    /// The message queue, if configured.
    pub queue: Option<StoreUrl>,
    /// The market-data store, if configured.
    pub market_data: Option<StoreConfig>,
    /// Whom to trust at the queue.
    pub queue_ca_file: Option<PathBuf>,
    /// E-mail, if configured.
    pub mail: Option<MailConfig>,
    /// From going live to telling the users of the release.
    pub notice_delay: Duration,
    /// The colour of this stack.
    pub colour: String,
    /// The revision of this stack.
    pub revision: String,
    /// How the role is found out.
    pub role: RoleSource,
    /// From Draining, or from its start if that is later, to closing a connection that is still open.
    pub drain_timeout: Duration,
    /// From SIGTERM to closing what is still open.
    pub termination_deadline: Duration,
    /// The age from which a connection is asked to close.
    pub max_connection_age: Duration,
    /// For the rest of a request's header, and for a body.
    pub request_timeout: Duration,
    /// The largest request body, in bytes.
    pub max_body_size: usize,
    /// Proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// What opens this stack's test lanes.
    pub lane_secret: Option<SecretString>,
    /// `iss` of access tokens.
    pub issuer: String,
    /// Validity of an access token.
    pub access_token_lifetime: Duration,
    /// How long a copy of the signing keys is trusted.
    pub keys_refresh: Duration,
    /// Validity of a refresh token.
    pub refresh_token_lifetime: Duration,
    /// How long an export waits for its reader.
    pub export_patience: Duration,
    /// Exports per user and window.
    pub exports_per_user: i32,
    /// How often the ledger is audited.
    pub audit_interval: Duration,
    /// Failed log-ins per account and window.
    pub login_attempts_per_account: i32,
    /// Failed log-ins per address and window.
    pub login_attempts_per_address: i32,
    /// Log-ins per account and window that may succeed.
    pub logins_per_account: i32,
    /// Passwords hashed at the same time.
    pub password_hashers: usize,
}

/// How a service learns its role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RoleSource {
    /// It is live, whatever happens.
    AlwaysLive,
    /// It asks the live Service at this URL.
    Ask(String),
}

/// The URL of a store, which holds its credentials.
#[derive(Clone, Debug)]
pub enum StoreUrl {
    /// Given by flag or environment.
    Given(SecretString),
    /// In a file, which may be rewritten while the service runs.
    File(PathBuf),
}

impl StoreUrl {
    /// The URL as it is now.
    pub fn read(&self) -> std::io::Result<SecretString> {
        match self {
            Self::Given(url) => Ok(url.clone()),
            Self::File(path) => read_secret(path),
        }
    }
}

/// Everything that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub struct InvalidConfig(pub Vec<String>);

impl Display for InvalidConfig {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the configuration is invalid:")?;
        self.0
            .iter()
            .try_for_each(|problem| write!(formatter, "\n  {problem}"))
    }
}

impl ConfigArgs {
    /// Checks everything, and reports everything that is wrong.
    pub fn validate(self) -> Result<Config, InvalidConfig> {
        self.validate_with(&[])
    }

    /// The same for what cannot work without these, beside the database.
    #[expect(clippy::too_many_lines, reason = "one line for each flag")]
    pub fn validate_with(self, needed: &[Peer]) -> Result<Config, InvalidConfig> {
        let mut problems = Problems(Vec::new());
        let database = self.database.check(&mut problems);
        let queue_is_needed = needed.contains(&Peer::Queue);
        let queue = problems.url(Peer::Queue, queue_is_needed, self.queue_url, self.queue_url_file);
        let queue_ca_file = problems.certificates("queue-ca-file", self.queue_ca_file);
        let store_is_needed = needed.contains(&Peer::MarketData);
        let market_data = self.market_data.check(&mut problems, store_is_needed);
        let mail_url = problems.url(Peer::Mail, false, self.mail_url, self.mail_url_file);
        let mail_ca_file = problems.certificates("mail-ca-file", self.mail_ca_file);
        let mail = problems.mail(mail_url, mail_ca_file, &self.mail_from);
        let notice_delay = problems.duration("notice-delay", &self.notice_delay);
        for (flag, word) in [("colour", &self.colour), ("revision", &self.revision)] {
            if word.is_empty()
                || !word
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            {
                problems.refuse::<()>(flag, &format!("{word:?}"), "use lower-case letters and digits");
            }
        }
        let role = match (self.role.as_str(), self.live_url) {
            ("live", _) => Some(RoleSource::AlwaysLive),
            ("follow", Some(url)) if url.starts_with("http://") => Some(RoleSource::Ask(url)),
            ("follow", Some(url)) => problems.refuse("live-url", &format!("{url:?}"), "use an http:// URL"),
            ("follow", None) => {
                let (live_url, role) = (named("live-url"), named("role"));
                problems.add(format!("{live_url} is required unless {role} is live"))
            }
            (other, _) => problems.refuse("role", &format!("{other:?}"), "use follow or live"),
        };
        let lane_secret = match (self.lane_secret, self.lane_secret_file) {
            (Some(_), Some(_)) => problems.exclude("lane-secret"),
            (Some(secret), None) => Some(("lane-secret", SecretString::from(secret))),
            (None, Some(path)) => problems
                .read("lane-secret-file", &path)
                .map(|secret| ("lane-secret-file", secret)),
            (None, None) => None,
        };
        let lane_secret = lane_secret.and_then(|(flag, secret)| {
            if secret.expose_secret().len() < 16 {
                return problems.add(format!("{}: use at least 16 characters", named(flag)));
            }
            Some(secret)
        });
        let proxies = self
            .trusted_proxies
            .split(',')
            .map(str::trim)
            .filter(|network| !network.is_empty());
        let trusted_proxies = proxies
            .filter_map(|network| problems.parse("trusted-proxies", network, "10.0.0.0/8"))
            .collect();

        let public_address = problems.parse("public-address", &self.public_address, "0.0.0.0:8080");
        let admin_address = problems.parse("admin-address", &self.admin_address, "0.0.0.0:9090");
        let database_connections = problems.positive("database-connections", &self.database_connections);
        let drain_timeout = problems.duration("drain-timeout", &self.drain_timeout);
        let termination_deadline = problems.duration("termination-deadline", &self.termination_deadline);
        let max_connection_age = problems.duration("max-connection-age", &self.max_connection_age);
        let request_timeout = problems.duration("request-timeout", &self.request_timeout);
        let max_body_size = problems.positive("max-body-size", &self.max_body_size);
        let access_token_lifetime = problems.duration("access-token-lifetime", &self.access_token_lifetime);
        let keys_refresh = problems.duration("keys-refresh", &self.keys_refresh);
        let refresh_token_lifetime =
            problems.duration("refresh-token-lifetime", &self.refresh_token_lifetime);
        let export_patience = problems.duration("export-patience", &self.export_patience);
        let exports_per_user = problems.positive("exports-per-user", &self.exports_per_user);
        let audit_interval = problems.duration("audit-interval", &self.audit_interval);
        let per_account = problems.positive("login-attempts-per-account", &self.login_attempts_per_account);
        let per_address = problems.positive("login-attempts-per-address", &self.login_attempts_per_address);
        let logins_per_account = problems.positive("logins-per-account", &self.logins_per_account);
        let password_hashers = problems.positive("password-hashers", &self.password_hashers);

        // Each `None` below has left a problem, except for the optional ones.
        let config = || {
            Some(Config {
                public_address: public_address?,
                admin_address: admin_address?,
                database: database?,
                database_connections: database_connections?,
                queue,
                market_data,
                queue_ca_file,
                mail,
                notice_delay: notice_delay?,
                colour: self.colour,
                revision: self.revision,
                role: role?,
                drain_timeout: drain_timeout?,
                termination_deadline: termination_deadline?,
                max_connection_age: max_connection_age?,
                request_timeout: request_timeout?,
                max_body_size: max_body_size?,
                trusted_proxies,
                lane_secret,
                issuer: self.issuer,
                access_token_lifetime: access_token_lifetime?,
                keys_refresh: keys_refresh?,
                refresh_token_lifetime: refresh_token_lifetime?,
                export_patience: export_patience?,
                exports_per_user: exports_per_user?,
                audit_interval: audit_interval?,
                login_attempts_per_account: per_account?,
                login_attempts_per_address: per_address?,
                logins_per_account: logins_per_account?,
                password_hashers: password_hashers?,
            })
        };
        match config() {
            Some(config) if problems.0.is_empty() => Ok(config),
            _ => Err(InvalidConfig(problems.0)),
        }
    }
}

/// A flag and its variable: people set either.
fn named(flag: &str) -> String {
    format!("--{flag} ({})", variable(flag))
}

fn variable(flag: &str) -> String {
    format!("EXCHANGE_{}", flag.to_uppercase().replace('-', "_"))
}

/// Collects what is wrong instead of stopping at the first thing.
struct Problems(Vec<String>);

impl Problems {
    fn add<T>(&mut self, problem: impl Into<String>) -> Option<T> {
        self.0.push(problem.into());
        None
    }

    /// Says what is wrong with a value that is no secret, or the way out.
    fn refuse<T>(&mut self, flag: &str, value: &dyn Display, why: impl Display) -> Option<T> {
        self.add(format!("{} {value}: {why}", named(flag)))
    }

    fn exclude<T>(&mut self, flag: &str) -> Option<T> {
        let (value, file) = (named(flag), named(&format!("{flag}-file")));
        self.add(format!(
            "{value} and {file} exclude each other: leave one of them out"
        ))
    }

    fn parse<T: FromStr<Err: Display>>(&mut self, flag: &str, value: &str, example: &str) -> Option<T> {
        match value.parse() {
            Ok(parsed) => Some(parsed),
            Err(error) => self.refuse(flag, &value, format!("{error}; write something like {example}")),
        }
    }

    fn positive<T: FromStr<Err: Display> + Default + PartialOrd>(
        &mut self,
        flag: &str,
        value: &str,
    ) -> Option<T> {
        match self.parse::<T>(flag, value, "10") {
            Some(number) if number <= T::default() => self.refuse(flag, &value, "must be positive"),
            parsed => parsed,
        }
    }

    fn duration(&mut self, flag: &str, value: &str) -> Option<Duration> {
        let duration = self.parse::<jiff::SignedDuration>(flag, value, "1h30m or 250ms")?;
        match Duration::try_from(duration) {
            Ok(duration) if !duration.is_zero() => Some(duration),
            _ => self.refuse(flag, &value, "must be positive"),
        }
    }

    fn read(&mut self, flag: &str, file: &Path) -> Option<SecretString> {
        match read_secret(file) {
            Ok(content) => Some(content),
            Err(error) => self.refuse(flag, &file.display(), error),
        }
    }

    /// A file in which there must be certificates.
    fn certificates(&mut self, flag: &str, file: Option<PathBuf>) -> Option<PathBuf> {
        let file = file?;
        let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(&file).and_then(Iterator::collect);
        match found {
            Ok(certificates) if certificates.is_empty() => {
                self.refuse(flag, &file.display(), "holds no certificate in PEM format")
            }
            Ok(_) => Some(file),
            Err(error) => self.refuse(flag, &file.display(), error),
        }
    }

    fn mail(&mut self, url: Option<StoreUrl>, ca_file: Option<PathBuf>, from: &str) -> Option<MailConfig> {
        let from = self.parse("mail-from", from, "Exchange <no-reply@exchange.example>")?;
        url.map(|url| MailConfig { url, ca_file, from })
    }

    fn url(
        &mut self,
        peer: Peer,
        required: bool,
        given: Option<String>,
        file: Option<PathBuf>,
    ) -> Option<StoreUrl> {
        let in_file = format!("{}-file", peer.flag());
        let (place, url, store) = match (given, file) {
            (Some(_), Some(_)) => return self.exclude(peer.flag()),
            (None, None) if required => {
                let (value, file) = (named(peer.flag()), named(&in_file));
                let problem = format!("{value} or {file} is required: {}", peer.shape());
                return self.add(problem);
            }
            (None, None) => return None,
            (Some(url), None) => {
                let url = SecretString::from(url);
                (named(peer.flag()), url.clone(), StoreUrl::Given(url))
            }
            (None, Some(path)) => {
                let url = self.read(&in_file, &path)?;
                let place = format!("{} {}", named(&in_file), path.display());
                (place, url, StoreUrl::File(path))
            }
        };
        match peer.check(url.expose_secret()) {
            Ok(()) => Some(store),
            Err(problem) => self.add(format!("{place}: not usable, {problem}; write {}", peer.shape())),
        }
    }
}

fn read_secret(path: &Path) -> std::io::Result<SecretString> {
    Ok(SecretString::from(std::fs::read_to_string(path)?.trim_end()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: ConfigArgs,
    }

    fn validate(flags: &[&str]) -> Result<Config, InvalidConfig> {
        Command::parse_from(std::iter::once(&"exchange").chain(flags))
            .args
            .validate()
    }

    #[test]
    fn every_problem_is_listed_at_once() {
        let InvalidConfig(problems) = validate(&[
            "--public-address=nowhere",
            "--database-url-file=/does/not/exist",
            "--drain-timeout=-5m",
            "--max-body-size=0",
            "--colour=Blue",
            "--lane-secret=short",
            "--trusted-proxies=10.0.0.0/8, here",
            "--queue-ca-file=/dev/null",
        ])
        .unwrap_err();
        let flags = [
            "--public-address (EXCHANGE_PUBLIC_ADDRESS) nowhere",
            "--database-url-file (EXCHANGE_DATABASE_URL_FILE) /does/not/exist",
            "--drain-timeout (EXCHANGE_DRAIN_TIMEOUT) -5m: must be positive",
            "--max-body-size (EXCHANGE_MAX_BODY_SIZE) 0: must be positive",
            "--colour (EXCHANGE_COLOUR) \"Blue\": use lower-case",
            "--lane-secret (EXCHANGE_LANE_SECRET): use at least 16",
            "--trusted-proxies (EXCHANGE_TRUSTED_PROXIES) here",
            "--queue-ca-file (EXCHANGE_QUEUE_CA_FILE) /dev/null: holds no certificate",
            "--live-url (EXCHANGE_LIVE_URL) is required unless --role",
        ];
        assert_listed(&problems, &flags);
    }

    #[test]
    fn urls_that_nothing_can_be_reached_by_are_listed_without_their_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("mail");
        std::fs::write(&file, "smtp://u:s3cr3t@mail.example?tls=maybe\n").unwrap();
        let mail_file = format!("--mail-url-file={}", file.display());
        let wrong = [
            (
                "--database-url=mysql://u:s3cr3t@db/x",
                "--queue-url=s3cr3t",
                "--market-data-url=redis://:s3cr3t@store:6379/first",
            ),
            (
                "--database-url=postgres://u:s3cr3t@db:port/x",
                "--queue-url=u:s3cr3t@queue:4222",
                "--market-data-url=http://:s3cr3t@store",
            ),
            (
                "--database-url=postgres://u:s3cr3t@db/x?sslmode=s3cr3t",
                "--queue-url=nats://u:s3cr3t@",
                "--market-data-url=",
            ),
            (
                "--database-url=postgres://u:s3cr3t@db/x?sslrootcert=/does/not/exist",
                "--queue-url=nats://u:s3cr3t@queue:99999",
                "--market-data-url=rediss://:s3cr3t@store#secure",
            ),
        ];
        for (database, queue, market_data) in wrong {
            let flags = [database, queue, market_data, &mail_file, "--role=live"];
            let InvalidConfig(problems) = validate(&flags).unwrap_err();
            assert!(!problems.join("").contains("s3cr3t"), "{problems:#?}");
            let named = [
                "--database-url (EXCHANGE_DATABASE_URL): not usable",
                "--queue-url (EXCHANGE_QUEUE_URL): not usable",
                "--market-data-url (EXCHANGE_MARKET_DATA_URL): not usable",
                &format!(
                    "--mail-url-file (EXCHANGE_MAIL_URL_FILE) {}: not usable",
                    file.display()
                ),
            ];
            assert_listed(&problems, &named);
            for shape in [
                "write postgres://",
                "write nats://",
                "write redis://",
                "write smtps://",
            ] {
                assert!(problems.join("").contains(shape), "{problems:#?}");
            }
        }
    }

    #[test]
    fn urls_of_all_kinds_are_accepted() {
        let database = [
            "--database-url=postgres://u:s%23@db.example:5432/x?sslmode=verify-full",
            "--database-url=postgresql:///x?host=/run/postgresql",
        ];
        let queue = ["--queue-url=tls://u:p%40@queue:4222", "--queue-url=nats://[::1]"];
        let market_data = [
            "--market-data-url=rediss://:p@store:6379/2",
            "--market-data-url=redis://store",
        ];
        let mail = [
            "--mail-url=smtps://u:p@mail.example:465",
            "--mail-url=smtp://mail?tls=required",
        ];
        for (at, database) in database.into_iter().enumerate() {
            let flags = [database, queue[at], market_data[at], mail[at], "--role=live"];
            let config = validate(&flags).unwrap();
            assert!(config.queue.is_some() && config.market_data.is_some() && config.mail.is_some());
        }
    }

    #[test]
    fn what_is_needed_is_asked_for_together() {
        let args = Command::parse_from(["exchange", "--role=live"]).args;
        let needed = [Peer::Queue, Peer::MarketData];
        let InvalidConfig(problems) = args.validate_with(&needed).unwrap_err();
        let required = |flag: &str| {
            let file = format!("{flag}-file");
            format!("{} or {} is required", named(flag), named(&file))
        };
        let expected = ["database-url", "queue-url", "market-data-url"].map(required);
        assert_listed(&problems, &expected.each_ref().map(String::as_str));
    }

    /// Fails unless the problems begin like this, in whatever order, and there are no others.
    fn assert_listed(problems: &[String], beginnings: &[&str]) {
        for beginning in beginnings {
            let found = problems.iter().any(|problem| problem.starts_with(beginning));
            assert!(found, "{beginning} is missing in {problems:#?}");
        }
        assert_eq!(problems.len(), beginnings.len(), "{problems:#?}");
    }

    #[test]
    fn every_flag_has_the_variable_that_problems_name() {
        for argument in <Command as clap::CommandFactory>::command().get_arguments() {
            if let (Some(flag), Some(name)) = (argument.get_long(), argument.get_env()) {
                assert_eq!(name.to_str().unwrap(), variable(flag));
            }
        }
    }

    #[test]
    fn the_defaults_need_a_database_and_a_role_only() {
        let config = validate(&["--database-url=postgres://localhost/exchange", "--role=live"]).unwrap();
        assert_eq!(config.drain_timeout, Duration::from_mins(5));
        assert_eq!(config.role, RoleSource::AlwaysLive);
    }
}
