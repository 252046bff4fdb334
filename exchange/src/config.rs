//! Configuration by flags and environment variables, checked as a whole: every problem is listed at once.

use std::{
    fmt::{self, Display},
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use secrecy::{ExposeSecret, SecretString};

use crate::mail::MailConfig;

/// The flags of a service. Each is also read from `EXCHANGE_<FLAG>`. Durations are written like `1h30m` or `250ms`.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    /// Where clients connect; port 0 takes a free one and logs it.
    #[arg(long, env = "EXCHANGE_PUBLIC_ADDRESS", default_value = "0.0.0.0:8080")]
    public_address: String,
    /// Where /livez, /readyz, /metrics and /stack are served.
    #[arg(long, env = "EXCHANGE_ADMIN_ADDRESS", default_value = "0.0.0.0:9090")]
    admin_address: String,
    /// PostgreSQL: `postgres://user:password@host:port/database?sslmode=verify-full&sslrootcert=/path`.
    #[arg(long, env = "EXCHANGE_DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// A file with the database URL, read again when it changes.
    #[arg(long, env = "EXCHANGE_DATABASE_URL_FILE")]
    database_url_file: Option<PathBuf>,
    /// The most connections that this process opens to PostgreSQL.
    #[arg(long, env = "EXCHANGE_DATABASE_CONNECTIONS", default_value = "10")]
    database_connections: String,
    /// NATS: `nats://` or `tls://user:password@host:port`.
    #[arg(long, env = "EXCHANGE_QUEUE_URL", hide_env_values = true)]
    queue_url: Option<String>,
    /// A file with the queue's URL, read again on each reconnect.
    #[arg(long, env = "EXCHANGE_QUEUE_URL_FILE")]
    queue_url_file: Option<PathBuf>,
    /// A Redis-protocol store: `redis://` or `rediss://user:password@host:port`.
    #[arg(long, env = "EXCHANGE_MARKET_DATA_URL", hide_env_values = true)]
    market_data_url: Option<String>,
    /// A file with the market-data store's URL, read again on each reconnect.
    #[arg(long, env = "EXCHANGE_MARKET_DATA_URL_FILE")]
    market_data_url_file: Option<PathBuf>,
    /// PEM certificates to trust at the queue, beside those of the system.
    #[arg(long, env = "EXCHANGE_QUEUE_CA_FILE")]
    queue_ca_file: Option<PathBuf>,
    /// PEM certificates to trust at the market-data store, instead of those of the system.
    #[arg(long, env = "EXCHANGE_MARKET_DATA_CA_FILE")]
    market_data_ca_file: Option<PathBuf>,
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
    /// How long a draining stack waits for its clients before it closes their connections.
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
    /// Networks of proxies whose `X-Forwarded-For` is believed, separated by commas.
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
    /// How long a session lives without a refresh.
    #[arg(long, env = "EXCHANGE_REFRESH_TOKEN_LIFETIME", default_value = "720h")]
    refresh_token_lifetime: String,
    /// Log-ins per account in 15 minutes that may fail.
    #[arg(long, env = "EXCHANGE_LOGIN_ATTEMPTS_PER_ACCOUNT", default_value = "10")]
    login_attempts_per_account: String,
    /// Log-ins per client address in 15 minutes that may fail, and registrations.
    #[arg(long, env = "EXCHANGE_LOGIN_ATTEMPTS_PER_ADDRESS", default_value = "100")]
    login_attempts_per_address: String,
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
    pub market_data: Option<StoreUrl>,
    /// Whom to trust at the queue.
    pub queue_ca_file: Option<PathBuf>,
    /// Whom to trust at the market-data store.
    pub market_data_ca_file: Option<PathBuf>,
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
    /// From Draining to closing what is still open.
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
    /// Validity of a refresh token.
    pub refresh_token_lifetime: Duration,
    /// Failed log-ins per account and window.
    pub login_attempts_per_account: i32,
    /// Failed log-ins per address and window.
    pub login_attempts_per_address: i32,
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
    #[expect(clippy::too_many_lines, reason = "one line for each flag")]
    pub fn validate(self) -> Result<Config, InvalidConfig> {
        let mut problems = Problems(Vec::new());
        let database = problems.store("database-url", self.database_url, self.database_url_file);
        if database.is_none() && problems.0.is_empty() {
            problems
                .0
                .push("--database-url or --database-url-file is required".to_owned());
        }
        let queue = problems.store("queue-url", self.queue_url, self.queue_url_file);
        let market_data = problems.store("market-data-url", self.market_data_url, self.market_data_url_file);
        let queue_ca_file = problems.file("queue-ca-file", self.queue_ca_file);
        let market_data_ca_file = problems.file("market-data-ca-file", self.market_data_ca_file);
        let mail_url = problems.store("mail-url", self.mail_url, self.mail_url_file);
        let mail_ca_file = problems.file("mail-ca-file", self.mail_ca_file);
        let mail = problems.mail(mail_url, mail_ca_file, &self.mail_from);
        let notice_delay = problems.duration("notice-delay", &self.notice_delay);
        for (flag, word) in [("colour", &self.colour), ("revision", &self.revision)] {
            if word.is_empty()
                || !word
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            {
                problems
                    .0
                    .push(format!("--{flag} {word:?}: use lower-case letters and digits"));
            }
        }
        let role = match (self.role.as_str(), self.live_url) {
            ("live", _) => Some(RoleSource::AlwaysLive),
            ("follow", Some(url)) if url.starts_with("http://") => Some(RoleSource::Ask(url)),
            ("follow", Some(url)) => problems.add(format!("--live-url {url:?}: an http:// URL is needed")),
            ("follow", None) => problems.add("--live-url is required unless --role is live"),
            (other, _) => problems.add(format!("--role {other:?}: use follow or live")),
        };
        let lane_secret = match (self.lane_secret, self.lane_secret_file) {
            (Some(_), Some(_)) => problems.add("--lane-secret and --lane-secret-file exclude each other"),
            (Some(secret), None) => Some(SecretString::from(secret)),
            (None, Some(path)) => problems.check("lane-secret-file", &path.display(), read_secret(&path)),
            (None, None) => None,
        };
        if lane_secret
            .as_ref()
            .is_some_and(|secret| secret.expose_secret().len() < 16)
        {
            problems
                .0
                .push("the lane secret needs at least 16 characters".to_owned());
        }
        let proxies = self
            .trusted_proxies
            .split(',')
            .map(str::trim)
            .filter(|network| !network.is_empty());
        let trusted_proxies = proxies
            .filter_map(|network| problems.parse("trusted-proxies", network))
            .collect();

        let public_address = problems.parse("public-address", &self.public_address);
        let admin_address = problems.parse("admin-address", &self.admin_address);
        let database_connections = problems.positive("database-connections", &self.database_connections);
        let drain_timeout = problems.duration("drain-timeout", &self.drain_timeout);
        let termination_deadline = problems.duration("termination-deadline", &self.termination_deadline);
        let max_connection_age = problems.duration("max-connection-age", &self.max_connection_age);
        let request_timeout = problems.duration("request-timeout", &self.request_timeout);
        let max_body_size = problems.positive("max-body-size", &self.max_body_size);
        let access_token_lifetime = problems.duration("access-token-lifetime", &self.access_token_lifetime);
        let refresh_token_lifetime =
            problems.duration("refresh-token-lifetime", &self.refresh_token_lifetime);
        let per_account = problems.positive("login-attempts-per-account", &self.login_attempts_per_account);
        let per_address = problems.positive("login-attempts-per-address", &self.login_attempts_per_address);
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
                market_data_ca_file,
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
                refresh_token_lifetime: refresh_token_lifetime?,
                login_attempts_per_account: per_account?,
                login_attempts_per_address: per_address?,
                password_hashers: password_hashers?,
            })
        };
        match config() {
            Some(config) if problems.0.is_empty() => Ok(config),
            _ => Err(InvalidConfig(problems.0)),
        }
    }
}

/// Collects what is wrong instead of stopping at the first thing.
struct Problems(Vec<String>);

impl Problems {
    fn add<T>(&mut self, problem: impl Into<String>) -> Option<T> {
        self.0.push(problem.into());
        None
    }

    fn check<T, E: Display>(&mut self, flag: &str, value: &dyn Display, result: Result<T, E>) -> Option<T> {
        result
            .map_err(|error| self.0.push(format!("--{flag} {value}: {error}")))
            .ok()
    }

    fn parse<T: FromStr<Err: Display>>(&mut self, flag: &str, value: &str) -> Option<T> {
        self.check(flag, &value, value.parse())
    }

    fn positive<T: FromStr<Err: Display> + Default + PartialOrd>(
        &mut self,
        flag: &str,
        value: &str,
    ) -> Option<T> {
        match self.parse::<T>(flag, value) {
            Some(number) if number <= T::default() => self.add(format!("--{flag} {value}: must be positive")),
            parsed => parsed,
        }
    }

    fn duration(&mut self, flag: &str, value: &str) -> Option<Duration> {
        let duration = self.parse::<jiff::SignedDuration>(flag, value)?;
        match Duration::try_from(duration) {
            Ok(duration) if !duration.is_zero() => Some(duration),
            _ => self.add(format!("--{flag} {value}: must be positive")),
        }
    }

    fn file(&mut self, flag: &str, file: Option<PathBuf>) -> Option<PathBuf> {
        let file = file?;
        self.check(flag, &file.display(), std::fs::metadata(&file))?;
        Some(file)
    }

    fn mail(&mut self, url: Option<StoreUrl>, ca_file: Option<PathBuf>, from: &str) -> Option<MailConfig> {
        let from = self.parse("mail-from", from)?;
        url.map(|url| MailConfig { url, ca_file, from })
    }

    fn store(&mut self, flag: &str, url: Option<String>, file: Option<PathBuf>) -> Option<StoreUrl> {
        match (url, file) {
            (Some(_), Some(_)) => self.add(format!("--{flag} and --{flag}-file exclude each other")),
            (Some(url), None) => Some(StoreUrl::Given(SecretString::from(url))),
            (None, Some(path)) => {
                self.check(&format!("{flag}-file"), &path.display(), read_secret(&path))?;
                Some(StoreUrl::File(path))
            }
            (None, None) => None,
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
        ])
        .unwrap_err();
        let said = problems.join("\n");
        let flags = [
            "public-address",
            "database-url-file",
            "drain-timeout",
            "max-body-size",
            "colour",
            "live-url",
        ];
        for flag in flags.iter().chain(&["trusted-proxies here", "lane secret"]) {
            assert!(said.contains(flag), "{flag} is missing in\n{said}");
        }
        assert_eq!(problems.len(), 8, "{said}");
    }

    #[test]
    fn the_defaults_need_a_database_and_a_role_only() {
        let config = validate(&["--database-url=postgres://localhost/exchange", "--role=live"]).unwrap();
        assert_eq!(config.drain_timeout, Duration::from_mins(5));
        assert_eq!(config.role, RoleSource::AlwaysLive);
    }
}
