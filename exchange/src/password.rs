//! Password hashing, which is slow on purpose: a storm of log-ins waits in a line of its own, and is worked off with the
//! processor time that nobody else wants.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use rustix::process::setpriority_process;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::oneshot;
use tracing::warn;

use crate::error::ApiError;

/// How many may wait per hasher before further ones are told to come back.
const LINE: usize = 64;
/// The priority of a hasher, lowest of all: trading on the same machine, and this service's other requests, come first.
const NICENESS: i32 = 19;

type Job = Box<dyn FnOnce() + Send>;

/// Hashes passwords with Argon2id, a few at a time. Clones share the line.
#[derive(Clone)]
pub struct Passwords {
    line: SyncSender<Job>,
    nobodys: Arc<OnceLock<String>>,
}

impl Passwords {
    /// A line with so many hashers, which are threads of their own and end with it.
    pub fn new(hashers: usize) -> std::io::Result<Self> {
        let (line, jobs) = sync_channel(hashers.saturating_mul(LINE));
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..hashers {
            let jobs = Arc::clone(&jobs);
            thread::Builder::new()
                .name("hasher".to_owned())
                .spawn(move || work_off(&jobs))?;
        }
        Ok(Self {
            line,
            nobodys: Arc::default(),
        })
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
        let (answer, answered) = oneshot::channel();
        let job = move || {
            // Not for a client that has hung up while it waited.
            if !answer.is_closed() {
                let _ = answer.send(work());
            }
        };
        self.line
            .try_send(Box::new(job))
            .map_err(|_| ApiError::unavailable("too many passwords to hash"))?;
        answered.await.map_err(ApiError::internal)
    }
}

fn work_off(jobs: &Mutex<Receiver<Job>>) {
    // Of this thread only, on Linux.
    if let Err(error) = setpriority_process(None, NICENESS) {
        warn!(error.message = %error, "passwords are hashed at the priority of everything else");
    }
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        // Whoever asked learns of a panic from the answer that does not come; the next in line must not.
        let _ = catch_unwind(AssertUnwindSafe(job));
    }
}

fn hash(password: &str) -> Result<String, ApiError> {
    let hashed = Argon2::default()
        .hash_password(password.as_bytes())
        .map_err(ApiError::internal)?;
    Ok(hashed.to_string())
}

#[cfg(test)]
mod tests {
    use rustix::process::getpriority_process;

    use super::*;

    #[tokio::test]
    async fn hashers_come_last_and_nobody_else_does() {
        let passwords = Passwords::new(2).unwrap();
        let before = getpriority_process(None).unwrap();
        let theirs = passwords.in_line(|| getpriority_process(None)).await.unwrap();
        assert_eq!(theirs.unwrap(), NICENESS);
        assert_eq!(getpriority_process(None).unwrap(), before);
    }

    #[tokio::test]
    async fn a_line_that_is_full_says_so_and_moves_on() {
        let passwords = Passwords::new(1).unwrap();
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let (begin, started) = oneshot::channel();
        let first = passwords.clone();
        let first = tokio::spawn(async move {
            let wait = move || {
                begin.send(()).unwrap();
                gate.recv().is_ok()
            };
            first.in_line(wait).await
        });
        started.await.unwrap();
        for _ in 0..LINE {
            passwords.line.try_send(Box::new(|| ())).unwrap();
        }
        assert!(passwords.in_line(|| ()).await.is_err());
        open.send(()).unwrap();
        assert!(first.await.unwrap().unwrap());
        while passwords.in_line(|| ()).await.is_err() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_panic_is_the_failure_of_one() {
        let passwords = Passwords::new(1).unwrap();
        let fall: fn() = || panic!("on purpose");
        assert!(passwords.in_line(fall).await.is_err());
        assert!(passwords.in_line(|| ()).await.is_ok());
    }
}
