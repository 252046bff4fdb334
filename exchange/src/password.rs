//! Password hashing, which is slow on purpose: a storm of log-ins waits in a line of its own, and is worked off with the
//! processor time that nobody else wants.

use std::{
    collections::HashMap,
    net::IpAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use argon2::{
    Argon2,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use secrecy::{ExposeSecret, SecretString};
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
    thread_native_id,
};
use tokio::sync::oneshot;
use tracing::warn;

use crate::error::{ApiError, TOO_MANY_REQUESTS};

/// How many may wait per hasher before further ones are told to come back.
const LINE: usize = 64;
/// How many of them may be of one address: it takes several to shut others out.
const LINE_OF_ADDRESS: usize = 16;
/// When to come again for whoever has as many in the line.
const SOON: Duration = Duration::from_secs(1);
/// How hashers are scheduled, after all else: trading on the same machine, and this service's other requests, come first. Beside
/// a thread that hashes without end the p99 of trades was a third lower than beside one of the lowest niceness.
const LAST: ThreadSchedulePolicy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);

type Job = Box<dyn FnOnce() + Send>;

/// Hashes passwords with Argon2id, a few at a time. Clones share the line.
#[derive(Clone)]
pub struct Passwords {
    line: SyncSender<Job>,
    places: Arc<Places>,
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
            places: Arc::new(Places {
                of_each: hashers.saturating_mul(LINE_OF_ADDRESS),
                taken: Mutex::default(),
            }),
            nobodys: Arc::default(),
        })
    }

    /// Hashes a password that has come from this address, as a PHC string.
    pub async fn hash(&self, from: IpAddr, password: SecretString) -> Result<String, ApiError> {
        self.in_line(from, move || hash(password.expose_secret())).await?
    }

    /// Whether the password, which has come from this address, belongs to the hash. Without a hash it takes just as long, and
    /// the answer is no.
    pub async fn verify(
        &self,
        from: IpAddr,
        password: SecretString,
        hashed: Option<String>,
    ) -> Result<bool, ApiError> {
        let nobodys = Arc::clone(&self.nobodys);
        self.in_line(from, move || {
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
        from: IpAddr,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let place = Places::take(&self.places, from)?;
        let (answer, answered) = oneshot::channel();
        let job = move || {
            // Until it leaves the line, also for a client that has hung up: others are not let in for it.
            let _place = place;
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

/// How many places in the line each address has taken.
struct Places {
    of_each: usize,
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// One of them, which is free again when this is dropped.
struct Place {
    of: IpAddr,
    places: Arc<Places>,
}

impl Places {
    fn take(places: &Arc<Self>, of: IpAddr) -> Result<Place, ApiError> {
        let mut taken = places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(of).or_default();
        if *count >= places.of_each {
            return Err(ApiError::from(TOO_MANY_REQUESTS).retry_after(SOON));
        }
        *count += 1;
        Ok(Place {
            of,
            places: Arc::clone(places),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.of);
            }
        }
    }
}

fn work_off(jobs: &Mutex<Receiver<Job>>) {
    if let Err(error) = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, LAST) {
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
    use std::net::Ipv4Addr;

    use thread_priority::thread_schedule_policy;

    use super::*;

    const SOMEBODY: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[tokio::test]
    async fn hashers_come_last_and_nobody_else_does() {
        let passwords = Passwords::new(2).unwrap();
        let before = thread_schedule_policy().unwrap();
        let theirs = passwords.in_line(SOMEBODY, thread_schedule_policy).await.unwrap();
        assert_eq!(theirs.unwrap(), LAST);
        assert_eq!(thread_schedule_policy().unwrap(), before);
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
            first.in_line(SOMEBODY, wait).await
        });
        started.await.unwrap();
        for _ in 0..LINE {
            passwords.line.try_send(Box::new(|| ())).unwrap();
        }
        assert!(passwords.in_line(SOMEBODY, || ()).await.is_err());
        open.send(()).unwrap();
        assert!(first.await.unwrap().unwrap());
        while passwords.in_line(SOMEBODY, || ()).await.is_err() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn one_address_cannot_fill_the_line() {
        let passwords = Passwords::new(1).unwrap();
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let mut waiting = Vec::new();
        for _ in 0..LINE_OF_ADDRESS {
            let (passwords, gate) = (passwords.clone(), Arc::clone(&gate));
            waiting.push(Box::pin(async move {
                let wait = move || gate.lock().unwrap().recv().is_ok();
                passwords.in_line(SOMEBODY, wait).await
            }));
        }
        // All of them stand in line, and half of the clients hang up there.
        for one in &mut waiting {
            assert!(futures::poll!(one).is_pending());
        }
        waiting.truncate(LINE_OF_ADDRESS / 2);
        let refused = passwords.in_line(SOMEBODY, || ()).await.unwrap_err();
        assert_eq!(
            (refused.problem, refused.retry_after),
            (TOO_MANY_REQUESTS, Some(SOON))
        );
        let mut another = Box::pin(passwords.in_line([203, 0, 113, 7].into(), || ()));
        assert!(futures::poll!(&mut another).is_pending());
        drop(open);
        assert!(another.await.is_ok());
        assert!(passwords.in_line(SOMEBODY, || ()).await.is_ok());
    }

    #[tokio::test]
    async fn a_panic_is_the_failure_of_one() {
        let passwords = Passwords::new(1).unwrap();
        let fall: fn() = || panic!("on purpose");
        assert!(passwords.in_line(SOMEBODY, fall).await.is_err());
        assert!(passwords.in_line(SOMEBODY, || ()).await.is_ok());
    }
}
