//! Password hashing, which is slow on purpose and therefore bounded: a storm of log-ins waits in its own line.

use std::sync::{Arc, OnceLock};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Semaphore;

use crate::error::ApiError;

/// How many may wait per hasher before further ones are told to come back.
const LINE: usize = 64;

/// Hashes passwords with Argon2id, a few at a time. Clones share the line.
#[derive(Clone)]
pub struct Passwords {
    hashers: Arc<Semaphore>,
    line: Arc<Semaphore>,
    nobodys: Arc<OnceLock<String>>,
}

impl Passwords {
    /// A line with so many hashers.
    pub fn new(hashers: usize) -> Self {
        Self {
            hashers: Arc::new(Semaphore::new(hashers)),
            line: Arc::new(Semaphore::new(hashers.saturating_mul(LINE))),
            nobodys: Arc::default(),
        }
    }

    /// Hashes a password, as a PHC string.
    pub async fn hash(&self, password: SecretString) -> Result<String, ApiError> {
        self.in_line(move || hash(password.expose_secret())).await?
    }

    /// Whether the password belongs to the hash. Without a hash it takes just as long, and the answer is no.
    pub async fn verify(&self, password: SecretString, hashed: Option<String>) -> Result<bool, ApiError> {
        let nobodys = Arc::clone(&self.nobodys);
        self.in_line(move || {
            let password = password.expose_secret();
            let (hashed, somebodys) = match (hashed, nobodys.get()) {
                (Some(hashed), _) => (hashed, true),
                (None, Some(nobodys)) => (nobodys.clone(), false),
                (None, None) => (
                    nobodys
                        .get_or_init(|| hash("nobody's").unwrap_or_default())
                        .clone(),
                    false,
                ),
            };
            let hashed = PasswordHash::new(&hashed).map_err(ApiError::internal)?;
            Ok(Argon2::default()
                .verify_password(password.as_bytes(), &hashed)
                .is_ok()
                && somebodys)
        })
        .await?
    }

    async fn in_line<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let _place = self
            .line
            .try_acquire()
            .map_err(|_| ApiError::unavailable("too many passwords to hash"))?;
        // The permit goes along: a client that hangs up does not stop its hashing, and makes no room for another.
        let hasher = Arc::clone(&self.hashers)
            .acquire_owned()
            .await
            .map_err(ApiError::internal)?;
        let work = tokio::task::spawn_blocking(move || {
            let _hasher = hasher;
            work()
        });
        work.await.map_err(ApiError::internal)
    }
}

fn hash(password: &str) -> Result<String, ApiError> {
    let hashed = Argon2::default()
        .hash_password(password.as_bytes())
        .map_err(ApiError::internal)?;
    Ok(hashed.to_string())
}
