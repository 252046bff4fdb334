//! E-mail: notifications of live users, sent by SMTP when it is configured.
//!
//! An e-mail cannot be taken back or sent in a transaction, so it is sent at least once: a crash between the
//! server's answer and our mark sends it again, under the same `Message-ID`, by which mailboxes drop the second.

use std::{path::PathBuf, time::Duration};

use lettre::{
    AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor,
    message::Mailbox,
    transport::smtp::{
        self,
        client::{Certificate, Tls, TlsParameters},
    },
};
use secrecy::ExposeSecret;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};
use uuid::Uuid;

use crate::{config::StoreUrl, messages::MessageMetrics, outbox::rest};

/// E-mails taken at a time.
const BATCH: i64 = 20;
/// How often new e-mails are looked for.
const IDLE: Duration = Duration::from_millis(500);
/// Longer than a healthy server ever takes.
const TIMEOUT: Duration = Duration::from_secs(10);
/// After so many tries, over four hours, an e-mail is given up.
const MAX_ATTEMPTS: i32 = 8;

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
    Server(String),
    #[error("{0}")]
    Database(#[from] sqlx::Error),
}

#[derive(sqlx::FromRow)]
struct Due {
    user_id: Uuid,
    seq: i64,
    attempts: i32,
    address: Option<String>,
    title: String,
    data: serde_json::Value,
}

/// Sends e-mails as they become due until told to stop. Any number of processes may do it at once.
pub async fn run(db: &PgPool, config: &MailConfig, metrics: &MessageMetrics, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        match send_due(db, config, metrics).await {
            Ok(0) => rest(stop, IDLE).await,
            Ok(_) => {}
            Err(error) => {
                warn!(error.message = %error, "failed to send e-mails");
                rest(stop, Duration::from_secs(5)).await;
            }
        }
    }
}

async fn send_due(db: &PgPool, config: &MailConfig, metrics: &MessageMetrics) -> Result<usize, MailError> {
    // Taken by moving the due time: no transaction stays open while the mail server thinks.
    let due: Vec<Due> = sqlx::query_as(
        "with taken as (
             select user_id, seq from emails where due_at <= now()
             order by due_at limit $1 for update skip locked
         ), moved as (
             update emails set attempts = attempts + 1, due_at = now() + interval '1 minute' * 2 ^ attempts
             from taken where emails.user_id = taken.user_id and emails.seq = taken.seq
             returning emails.user_id, emails.seq, emails.attempts
         )
         select moved.user_id, moved.seq, attempts, users.email as address, title, data
         from moved
         join notifications on notifications.user_id = moved.user_id and notifications.seq = moved.seq
         join users on users.id = moved.user_id",
    )
    .bind(BATCH)
    .fetch_all(db)
    .await?;
    if due.is_empty() {
        return Ok(0);
    }
    let transport = transport(config).await?;
    for email in &due {
        let Some(message) = compose(&config.from, email) else {
            // Deleted in the meantime, or an address that no mail server would take.
            forget(db, email).await?;
            continue;
        };
        match transport.send(message).await {
            Ok(_) => {
                forget(db, email).await?;
                metrics.emails_sent.inc();
            }
            Err(cause) if cause.is_permanent() || email.attempts >= MAX_ATTEMPTS => {
                error!(user.id = %email.user_id, error.message = reason(&cause), "an e-mail was given up");
                forget(db, email).await?;
                metrics.emails_given_up.inc();
            }
            Err(cause) => {
                warn!(user.id = %email.user_id, error.message = reason(&cause), "failed to send an e-mail");
            }
        }
    }
    Ok(due.len())
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

async fn transport(config: &MailConfig) -> Result<AsyncSmtpTransport<Tokio1Executor>, MailError> {
    let unusable = |error: smtp::Error| MailError::Server(error.to_string());
    let url = config.url.read()?;
    let url = url.expose_secret();
    let mut builder = AsyncSmtpTransport::<Tokio1Executor>::from_url(url)
        .map_err(unusable)?
        .timeout(Some(TIMEOUT));
    if let Some(file) = &config.ca_file {
        let certificate = Certificate::from_pem(&tokio::fs::read(file).await?).map_err(unusable)?;
        let host = url
            .parse::<http::Uri>()
            .ok()
            .and_then(|uri| uri.host().map(ToOwned::to_owned));
        let host = host.ok_or_else(|| MailError::Server("no host".to_owned()))?;
        let parameters = TlsParameters::builder(host)
            .add_root_certificate(certificate)
            .build()
            .map_err(unusable)?;
        builder = builder.tls(if url.starts_with("smtps:") {
            Tls::Wrapper(parameters)
        } else {
            Tls::Required(parameters)
        });
    }
    Ok(builder.build())
}

fn compose(from: &Mailbox, email: &Due) -> Option<Message> {
    let to: Mailbox = email.address.as_ref()?.parse().ok()?;
    let facts = email
        .data
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| match value.as_str() {
            Some(text) => format!("{name}: {text}\n"),
            None => format!("{name}: {value}\n"),
        });
    Message::builder()
        .from(from.clone())
        .to(to)
        .subject(&email.title)
        .message_id(Some(format!(
            "<{}.{}@{}>",
            email.user_id,
            email.seq,
            from.email.domain()
        )))
        .body(format!("{}\n\n{}", email.title, facts.collect::<String>()))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(address: Option<&str>) -> Due {
        Due {
            user_id: Uuid::nil(),
            seq: 3,
            attempts: 1,
            address: address.map(ToOwned::to_owned),
            title: "Received 1 BTC".into(),
            data: serde_json::json!({"currency": "BTC", "amount": "1"}),
        }
    }

    #[test]
    fn the_same_notification_has_the_same_message_id() {
        let from: Mailbox = "Exchange <no-reply@exchange.example>".parse().unwrap();
        let message = compose(&from, &due(Some("ann@example.org"))).unwrap().formatted();
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
    fn nobody_is_written_to_without_a_usable_address() {
        let from: Mailbox = "no-reply@exchange.example".parse().unwrap();
        assert!(compose(&from, &due(None)).is_none());
        assert!(compose(&from, &due(Some("not an address"))).is_none());
        assert!(compose(&from, &due(Some("a@b\r\nBcc: c@d"))).is_none());
    }
}
