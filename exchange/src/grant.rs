//! `exchange grant`: gives a user a scope, or takes it back. Only the owner of the database may.

use anyhow::{Context, bail, ensure};
use secrecy::{ExposeSecret, SecretString};
use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tracing::info;

use crate::{auth::TREASURY, config::StoreUrl};

/// The flags of `exchange grant`.
#[derive(Clone, Debug, clap::Args)]
pub struct GrantArgs {
    /// What the user may do then: `treasury` credits accounts with money that has come in.
    #[arg(value_parser = [TREASURY])]
    scope: String,
    /// The user's e-mail address.
    #[arg(long)]
    email: String,
    /// Take the scope back. Access tokens keep it until they expire.
    #[arg(long)]
    revoke: bool,
    /// PostgreSQL, as the owner of the schema.
    #[arg(long, env = "EXCHANGE_DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// A file with that URL.
    #[arg(long, env = "EXCHANGE_DATABASE_URL_FILE", conflicts_with = "database_url")]
    database_url_file: Option<std::path::PathBuf>,
}

/// Gives or takes the scope of a user of the live lane.
pub async fn run(args: GrantArgs) -> anyhow::Result<()> {
    let url = match (args.database_url, args.database_url_file) {
        (Some(url), _) => StoreUrl::Given(SecretString::from(url)),
        (None, Some(path)) => StoreUrl::File(path),
        (None, None) => bail!("--database-url or --database-url-file is required"),
    };
    let options: PgConnectOptions = url
        .read()
        .context("failed to read the database URL")?
        .expose_secret()
        .parse()
        .context("--database-url")?;
    let mut connection = options
        .application_name("exchange-grant")
        .connect()
        .await
        .context("failed to connect to the database")?;
    let changed = sqlx::query(
        "update users set updated_at = now(),
             scopes = case when $3 then array_remove(scopes, $2) else array_append(array_remove(scopes, $2), $2) end
         where lane = 'live' and email = lower($1)",
    )
    .bind(&args.email)
    .bind(&args.scope)
    .bind(args.revoke)
    .execute(&mut connection)
    .await?;
    ensure!(changed.rows_affected() == 1, "no user has this e-mail address");
    info!(
        labels.scope = args.scope,
        "the scope has been {}",
        if args.revoke { "revoked" } else { "granted" }
    );
    Ok(())
}
