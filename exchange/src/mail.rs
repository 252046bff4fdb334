//! E-mail: notifications of live users, sent by SMTP when it is configured.
//!
//! An e-mail cannot be taken back or sent in a transaction, so it is sent at least once: a crash between the
//! server's answer and our mark, or a database that breaks there, sends it again, under the same `Message-ID`, by which
//! mailboxes drop the second. So does a server that has not answered two seconds after its stack was told to stop.

use std::{collections::VecDeque, fmt::Display, path::PathBuf, time::Duration};

use lettre::{
    Message,
    message::Mailbox,
    transport::smtp::{
        self, SMTP_PORT, SUBMISSION_PORT, SUBMISSIONS_PORT,
        authentication::{Credentials, Mechanism},
        client::{AsyncSmtpConnection, Certificate, TlsParameters},
        commands::{Mail, Rset},
        extension::ClientId,
    },
};
use percent_encoding::percent_decode_str;
use reqwest::Url;
use secrecy::ExposeSecret;
use sqlx::PgPool;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};
use uuid::Uuid;

use crate::{config::StoreUrl, messages::MessageMetrics, outbox::rest};

/// E-mails taken at a time.
const BATCH: i64 = 20;
/// How often new e-mails are looked for.
const IDLE: Duration = Duration::from_millis(500);
/// How long is waited after a failure of ours or of the mail server's, and at most after many in a row: a server that
/// refuses our password may lock us out if we insist.
const PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_mins(5);
/// Longer than a healthy server ever takes, to get to know us or to take an e-mail.
const TIMEOUT: Duration = Duration::from_secs(10);
/// After so many tries, over two hours, an e-mail is given up.
const MAX_ATTEMPTS: i32 = 8;
/// For how long e-mails are taken: longer than sending a batch to the slowest server that is still waited for. Those of a process
/// that has died are free again then.
const TAKEN_FOR: Duration = Duration::from_mins(5);
/// How long an e-mail that is under way when we are told to stop may take: given back, it would be sent twice.
const UNDER_WAY: Duration = Duration::from_secs(2);

/// How e-mail is sent.
#[derive(Clone, Debug)]
pub struct MailConfig {
    /// `smtps://user:password@host:port`, or `smtp://…?tls=required` for STARTTLS, read again for each batch.
    pub url: StoreUrl,
    /// PEM certificates to trust beside those of the system.
    pub ca_file: Option<PathBuf>,
    /// The sender.
    pub from: Mailbox,
}

/// What can go wrong with e-mail.
#[derive(Debug, thiserror::Error)]
enum MailError {
    #[error("failed to read how to reach the mail server: {0}")]
    Config(#[from] std::io::Error),
    #[error("the mail server's URL or certificate is not usable: {0}")]
    Unusable(String),
    #[error("the mail server does not take e-mails from here: {0}")]
    Server(String),
    #[error("the mail server has not answered for {} s", TIMEOUT.as_secs())]
    Silent(#[from] tokio::time::error::Elapsed),
    #[error("told to stop")]
    Stopped,
    #[error("{0}")]
    Database(#[from] sqlx::Error),
}

#[derive(Clone, sqlx::FromRow)]
struct Due {
    user_id: Uuid,
    seq: i64,
    /// That have failed.
    attempts: i32,
    kind: String,
    title: String,
    data: serde_json::Value,
}

/// Sends e-mails as they become due until told to stop. Any number of processes may do it at once.
pub async fn run(db: &PgPool, config: &MailConfig, metrics: &MessageMetrics, stop: &CancellationToken) {
    let mut pause = PAUSE;
    while !stop.is_cancelled() {
        match send_due(db, config, metrics, stop).await {
            Ok(sent) => {
                pause = PAUSE;
                if sent == 0 {
                    rest(stop, IDLE).await;
                }
            }
            Err(MailError::Stopped) => return,
            Err(error) => {
                warn!(error.message = %error, "failed to send e-mails");
                rest(stop, pause).await;
                pause = (2 * pause).min(LONGEST_PAUSE);
            }
        }
    }
}

async fn send_due(
    db: &PgPool,
    config: &MailConfig,
    metrics: &MessageMetrics,
    stop: &CancellationToken,
) -> Result<usize, MailError> {
    let any: bool = sqlx::query_scalar("select exists (select from emails where due_at <= now())")
        .fetch_one(db)
        .await?;
    if !any {
        return Ok(0);
    }
    // Before any is taken: what the server has against us is nothing that an e-mail should be given up for.
    let mut server = answer(stop, Duration::ZERO, connect(config)).await??;
    // Taken by moving the due time: no transaction stays open while the mail server thinks.
    let mut due: VecDeque<Due> = sqlx::query_as(
        "with taken as (
             select user_id, seq from emails where due_at <= now()
             order by due_at limit $1 for update skip locked
         ), moved as (
             update emails set due_at = now() + make_interval(secs => $2) from taken
             where emails.user_id = taken.user_id and emails.seq = taken.seq
             returning emails.user_id, emails.seq, emails.attempts
         )
         select moved.user_id, moved.seq, attempts, kind, title, data
         from moved
         join notifications on notifications.user_id = moved.user_id and notifications.seq = moved.seq",
    )
    .bind(BATCH)
    .bind(TAKEN_FOR.as_secs_f64())
    .fetch_all(db)
    .await?
    .into();
    let taken = due.len();
    let sent = send(db, config, metrics, stop, &mut server, &mut due).await;
    if sent.is_err() {
        // Nothing has come of the others, and nothing is held against them.
        give_back(db, &due).await?;
    }
    sent?;
    // It has taken them, however it takes leave.
    let _ = answer(stop, Duration::ZERO, server.quit()).await;
    Ok(taken)
}

/// Sends e-mails, until told to stop. Those that are left have not been sent, as far as we know.
async fn send(
    db: &PgPool,
    config: &MailConfig,
    metrics: &MessageMetrics,
    stop: &CancellationToken,
    server: &mut AsyncSmtpConnection,
    due: &mut VecDeque<Due>,
) -> Result<(), MailError> {
    while let Some(email) = due.front().cloned() {
        if stop.is_cancelled() {
            return Err(MailError::Stopped);
        }
        // Only now: while others were sent the user may have gone.
        let address: Option<Option<String>> = sqlx::query_scalar("select email from users where id = $1")
            .bind(email.user_id)
            .fetch_optional(db)
            .await?;
        let message = address
            .flatten()
            .and_then(|address| compose(&config.from, &address, &email));
        let Some(message) = message else {
            // Deleted in the meantime, or an address that no mail server would take.
            forget(db, &email).await?;
            due.pop_front();
            continue;
        };
        if server.has_broken() {
            *server = answer(stop, Duration::ZERO, connect(config)).await??;
        }
        let content = message.formatted();
        let answered = answer(stop, UNDER_WAY, server.send(message.envelope(), &content)).await;
        if matches!(answered, Err(MailError::Silent(_))) {
            // Perhaps it is this one that it cannot take: others come first.
            if email.attempts + 1 >= MAX_ATTEMPTS {
                error!(user.id = %email.user_id, error.message = "no answer", "an e-mail was given up");
                forget(db, &email).await?;
                metrics.emails_given_up.inc();
            } else {
                put_off(db, &email).await?;
            }
            due.pop_front();
        }
        match answered? {
            Ok(_) => {
                // Whatever becomes of the mark, it is not given back.
                due.pop_front();
                metrics.emails_sent.inc();
                forget(db, &email).await?;
                continue;
            }
            Err(cause) if is_final(&cause) || email.attempts + 1 >= MAX_ATTEMPTS => {
                error!(user.id = %email.user_id, error.message = reason(&cause), "an e-mail was given up");
                forget(db, &email).await?;
                metrics.emails_given_up.inc();
            }
            Err(cause) => {
                warn!(user.id = %email.user_id, error.message = reason(&cause), "failed to send an e-mail");
                put_off(db, &email).await?;
            }
        }
        due.pop_front();
    }
    Ok(())
}

/// Each failure doubles the time until the next attempt, up to an hour.
async fn put_off(db: &PgPool, email: &Due) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update emails set attempts = attempts + 1,
             due_at = now() + least(interval '1 minute' * 2 ^ least(attempts, 6), interval '1 hour')
         where user_id = $1 and seq = $2",
    )
    .bind(email.user_id)
    .bind(email.seq)
    .execute(db)
    .await
    .map(|_| ())
}

/// Makes e-mails due again that have not been sent.
async fn give_back(db: &PgPool, emails: &VecDeque<Due>) -> Result<(), sqlx::Error> {
    let (users, seqs): (Vec<Uuid>, Vec<i64>) = emails.iter().map(|email| (email.user_id, email.seq)).unzip();
    sqlx::query(
        "update emails set due_at = now() from unnest($1::uuid[], $2::bigint[]) as given (user_id, seq)
         where emails.user_id = given.user_id and emails.seq = given.seq",
    )
    .bind(users)
    .bind(seqs)
    .execute(db)
    .await
    .map(|_| ())
}

/// What the mail server answers, unless it takes too long, or longer than this after we are told to stop. An e-mail that it takes
/// after that is sent once more.
fn answer<T>(
    stop: &CancellationToken,
    patience: Duration,
    call: impl Future<Output = T>,
) -> impl Future<Output = Result<T, MailError>> {
    // Not within the future: it is large.
    let call = Box::pin(call);
    async move {
        let stopped = async {
            stop.cancelled().await;
            sleep(patience).await;
        };
        tokio::select! {
            answer = timeout(TIMEOUT, call) => Ok(answer?),
            () = stopped => Err(MailError::Stopped),
        }
    }
}

/// Whether the server will never take this e-mail: it has refused its recipient or its content, and not us, which it may
/// do as late as when it is told the recipient.
fn is_final(failure: &smtp::Error) -> bool {
    let ours = failure
        .status()
        .is_some_and(|code| matches!(u16::from(code), 530 | 534 | 535 | 538));
    failure.is_permanent() && !ours
}

/// What may be logged of a failure: the words of a mail server often repeat the address.
fn reason(failure: &smtp::Error) -> String {
    match failure.status() {
        Some(code) => format!("the mail server answered {code}"),
        None => failure.to_string(),
    }
}

async fn forget(db: &PgPool, email: &Due) -> Result<(), sqlx::Error> {
    sqlx::query("delete from emails where user_id = $1 and seq = $2")
        .bind(email.user_id)
        .bind(email.seq)
        .execute(db)
        .await
        .map(|_| ())
}

/// Connects to a mail server that knows us and takes us for the sender.
async fn connect(config: &MailConfig) -> Result<AsyncSmtpConnection, MailError> {
    let unusable = |error: &dyn Display| MailError::Unusable(error.to_string());
    let refused = |failure: smtp::Error| MailError::Server(reason(&failure));
    let url = config.url.read()?;
    let url = Url::parse(url.expose_secret()).map_err(|error| unusable(&error))?;
    let host = url.host_str().ok_or_else(|| unusable(&"no host"))?;
    let mut tls = TlsParameters::builder(host.to_owned());
    if let Some(file) = &config.ca_file {
        let certificate = Certificate::from_pem(&tokio::fs::read(file).await?);
        tls = tls.add_root_certificate(certificate.map_err(|error| unusable(&error))?);
    }
    let tls = tls.build().map_err(|error| unusable(&error))?;
    let encryption = url.query_pairs().find(|(name, _)| name == "tls");
    let encryption = encryption.as_ref().map(|(_, value)| &**value);
    let at_once = url.scheme() == "smtps";
    let usual_port = match encryption {
        _ if at_once => SUBMISSIONS_PORT,
        Some(_) => SUBMISSION_PORT,
        None => SMTP_PORT,
    };
    let name = match url.path().trim_matches('/') {
        "" => ClientId::default(),
        name => ClientId::Domain(name.to_owned()),
    };

    let address = (host, url.port().unwrap_or(usual_port));
    let wrapper = at_once.then(|| tls.clone());
    let mut server = AsyncSmtpConnection::connect_tokio1(address, Some(TIMEOUT), &name, wrapper, None)
        .await
        .map_err(refused)?;
    let on_request = encryption == Some("required") || config.ca_file.is_some();
    if !at_once && (on_request || encryption.is_some() && server.can_starttls()) {
        server.starttls(tls, &name).await.map_err(refused)?;
    }
    if let Some(password) = url.password() {
        let decoded = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let credentials = Credentials::new(decoded(url.username()), decoded(password));
        let mechanisms = [Mechanism::Plain, Mechanism::Login];
        server.auth(&mechanisms, &credentials).await.map_err(refused)?;
    }
    let sender = Mail::new(Some(config.from.email.clone()), Vec::new());
    server.command(sender).await.map_err(refused)?;
    server.command(Rset).await.map_err(refused)?;
    Ok(server)
}

/// What an e-mail says: nothing that a user has put into words. Nobody has confirmed that the address is the user's own, and
/// whoever registers somebody else's shall not write to it in our name.
fn content(email: &Due) -> (String, String) {
    let fact = |name| {
        let fact = email.data.get(name);
        fact.and_then(serde_json::Value::as_str).unwrap_or_default()
    };
    let subject = match email.kind.as_str() {
        "trade" | "deposit" | "withdrawal" | "sign_in" => email.title.clone(),
        "account" => format!("{} account was {}", fact("currency"), fact("change")),
        // Of a newer version, which knows what may be said.
        _ => return ("There is news about your account".to_owned(), String::new()),
    };
    let facts = email.data.as_object().into_iter().flatten();
    let facts = facts
        .filter(|(name, _)| *name != "name")
        .map(|(name, value)| match value.as_str() {
            Some(text) => format!("{name}: {text}\n"),
            None => format!("{name}: {value}\n"),
        });
    let facts = facts.collect();
    (subject, facts)
}

fn compose(from: &Mailbox, address: &str, email: &Due) -> Option<Message> {
    let to: Mailbox = address.parse().ok()?;
    let (subject, facts) = content(email);
    Message::builder()
        .from(from.clone())
        .to(to)
        .subject(&subject)
        .message_id(Some(format!(
            "<{}.{}@{}>",
            email.user_id,
            email.seq,
            from.email.domain()
        )))
        .body(format!("{subject}\n\n{facts}"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due() -> Due {
        Due {
            user_id: Uuid::nil(),
            seq: 3,
            attempts: 0,
            kind: "deposit".into(),
            title: "Received 1 BTC".into(),
            data: serde_json::json!({"currency": "BTC", "amount": "1"}),
        }
    }

    #[test]
    fn the_same_notification_has_the_same_message_id() {
        let from: Mailbox = "Exchange <no-reply@exchange.example>".parse().unwrap();
        let message = compose(&from, "ann@example.org", &due()).unwrap().formatted();
        let text = String::from_utf8(message).unwrap();
        assert!(
            text.contains("Message-ID: <00000000-0000-0000-0000-000000000000.3@exchange.example>"),
            "{text}"
        );
        assert!(
            text.contains("Subject: Received 1 BTC") && text.contains("amount: 1"),
            "{text}"
        );
    }

    #[test]
    fn no_mail_says_what_a_user_has_put_into_words() {
        let from: Mailbox = "no-reply@exchange.example".parse().unwrap();
        let words = "Win at http://evil.example";
        for (kind, subject) in [
            ("account", "Subject: USD account was updated\r\n"),
            ("not known yet", "Subject: There is news about your account\r\n"),
        ] {
            let email = Due {
                kind: kind.into(),
                title: format!("USD account {words} was updated"),
                data: serde_json::json!({"currency": "USD", "change": "updated", "name": words}),
                ..due()
            };
            let message = compose(&from, "ann@example.org", &email).unwrap().formatted();
            let text = String::from_utf8(message).unwrap();
            assert!(text.contains(subject) && !text.contains("evil"), "{text}");
        }
    }

    #[test]
    fn nobody_is_written_to_without_a_usable_address() {
        let from: Mailbox = "no-reply@exchange.example".parse().unwrap();
        assert!(compose(&from, "not an address", &due()).is_none());
        assert!(compose(&from, "a@b\r\nBcc: c@d", &due()).is_none());
    }
}
