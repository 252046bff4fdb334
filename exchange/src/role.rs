//! The role of a stack, which it finds out by itself: it asks its live Service who answers.

use std::{fmt, time::Duration};

use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

/// The header that says which stack answered.
pub const STACK_HEADER: &str = "x-exchange-stack";

const ASK_EVERY: Duration = Duration::from_secs(1);
/// Who has heard another stack for the first time asks again after this: until a role is known, connections stay.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What a stack is for, now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Role {
    /// Answers whatever it is asked, starts nothing by itself outside its own test lanes.
    Standby,
    /// Traffic goes here.
    Live,
    /// Was live: finishes what it has, and asks its clients to connect anew.
    Draining,
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// Who answered at the live Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Own,
    Foreign,
    Unreachable,
}

/// The role, and how many foreign answers in a row speak against being live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Observed {
    role: Role,
    foreign: u8,
}

impl Observed {
    const START: Self = Self {
        role: Role::Standby,
        foreign: 0,
    };

    /// One foreign answer may be a connection that was made just before the switch reached this node; two are not.
    fn after(self, answer: Answer) -> Self {
        match (answer, self.role, self.foreign) {
            (Answer::Own, ..) => Self {
                role: Role::Live,
                foreign: 0,
            },
            (Answer::Foreign, Role::Live, 0) => Self { foreign: 1, ..self },
            (Answer::Foreign, Role::Live, _) => Self {
                role: Role::Draining,
                foreign: 0,
            },
            (Answer::Foreign | Answer::Unreachable, ..) => self,
        }
    }
}

/// Waits until this stack is live. False if the process ends before.
pub async fn until_live(role: &mut watch::Receiver<Role>, shutdown: &CancellationToken) -> bool {
    let live = shutdown.run_until_cancelled(role.wait_for(|role| *role == Role::Live));
    matches!(live.await, Some(Ok(_)))
}

/// Waits until this stack is not live any more, or the process ends.
pub async fn until_not_live(role: &mut watch::Receiver<Role>, shutdown: &CancellationToken) {
    let not_live = shutdown.run_until_cancelled(role.wait_for(|role| *role != Role::Live));
    let _ = not_live.await;
}

/// Asks the live Service at `url` each second, and sooner when it is in doubt, each time on a new connection, and publishes
/// the role of `stack`.
pub async fn follow(url: String, stack: String, role: watch::Sender<Role>, shutdown: CancellationToken) {
    let client = reqwest::Client::builder()
        .pool_max_idle_per_host(0)
        .timeout(ASK_EVERY)
        .no_proxy()
        // Plain HTTP: an image without certificates of authorities must not keep it from asking.
        .tls_certs_only([])
        .redirect(reqwest::redirect::Policy::none())
        .build();
    let client = match client {
        Ok(client) => client,
        Err(error) => {
            tracing::error!(error.message = %error, "failed to build the client that asks for the role");
            return;
        }
    };
    let url = format!("{}/version", url.trim_end_matches('/'));
    let mut observed = Observed::START;
    let mut tick = tokio::time::interval(ASK_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        let answer = match client.get(&url).send().await {
            Ok(response) => match response.headers().get(STACK_HEADER) {
                Some(name) if name == stack.as_str() => Answer::Own,
                Some(_) => Answer::Foreign,
                // Something in between answered, and says nothing about who is live.
                None => Answer::Unreachable,
            },
            Err(_) => Answer::Unreachable,
        };
        let next = observed.after(answer);
        if next.role != observed.role {
            info!(labels.role = %next.role, "{} -> {}", observed.role, next.role);
            role.send_replace(next.role);
        }
        if next.foreign > 0 {
            tick.reset_after(ASK_AGAIN);
        }
        observed = next;
    }
}

#[cfg(test)]
mod tests {
    use super::{Answer::*, Observed, Role};

    #[test]
    fn the_role_follows_the_answers() {
        let table: &[(&[super::Answer], Role)] = &[
            (&[], Role::Standby),
            (&[Unreachable], Role::Standby),
            (&[Foreign, Foreign, Foreign], Role::Standby),
            (&[Own], Role::Live),
            (&[Own, Unreachable, Unreachable, Unreachable], Role::Live),
            (&[Own, Foreign], Role::Live),
            (&[Own, Foreign, Own, Foreign], Role::Live),
            (&[Own, Foreign, Foreign], Role::Draining),
            (&[Own, Foreign, Unreachable, Foreign], Role::Draining),
            (&[Own, Foreign, Foreign, Foreign, Unreachable], Role::Draining),
            (&[Own, Foreign, Foreign, Own], Role::Live),
            (&[Own, Foreign, Foreign, Own, Foreign], Role::Live),
            (&[Own, Foreign, Foreign, Own, Foreign, Foreign], Role::Draining),
        ];
        for (answers, role) in table {
            let observed = answers
                .iter()
                .fold(Observed::START, |observed, answer| observed.after(*answer));
            assert_eq!(observed.role, *role, "after {answers:?}");
        }
    }
}
