//! What a pass comes to: a record, and what the record allows.

use std::time;

use crate::{
    api::Service,
    observe::{Fence, Job, Part},
    status::{ExchangeDeploymentStatus as Status, Stack},
};

/// Between two passes over the same object at the most: references are not watched, and events can be lost.
pub const AT_LEAST_EVERY: time::Duration = time::Duration::from_mins(1);

/// What to record, to do, to tell, and when to look again.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The record to write first, if it differs from the one that was observed.
    pub status: Option<Status>,
    /// What to do after that, in this order, until one fails.
    pub actions: Vec<Action>,
    /// What to tell people, after the record is written.
    pub events: Vec<Event>,
    /// When to look again at the latest: after [`AT_LEAST_EVERY`] at the most.
    pub requeue: time::Duration,
}

/// One write. What exists is changed or deleted only in the state in which it was observed; what has no fence is
/// created only if it does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Create a live Service that points at nothing. (Created pointing at a stack, it could not be fenced.)
    CreateLive {
        /// Which one.
        service: Service,
    },
    /// Point a live Service at a stack, or at nothing.
    Point {
        /// Which one.
        service: Service,
        /// As it was observed.
        fence: Fence,
        /// Where to.
        to: Option<Stack>,
        /// Number of this move.
        epoch: u32,
        /// What for.
        intent: Intent,
    },
    /// Create the rendered stack, and after it what is missing of that which its pods need: the copies of ConfigMaps and
    /// Secrets, the ServiceAccounts, the lane's secret.
    Render {
        /// Which stack.
        stack: Stack,
        /// For which attempt.
        attempt: u32,
        /// Its version.
        version: String,
    },
    /// Make a stack that belongs to nobody the object's: all that was rendered for it or named by it, its Jobs, and last
    /// the rendered stack.
    Adopt {
        /// Which stack.
        stack: Stack,
        /// As it was observed.
        fence: Fence,
    },
    /// Create an object of a stack, or make it again what was rendered.
    Apply {
        /// Which stack.
        stack: Stack,
        /// Which service.
        service: Service,
        /// Which object.
        part: Part,
        /// Replicas of a workload.
        replicas: u32,
        /// As it was observed.
        fence: Option<Fence>,
    },
    /// Delete an object of a stack.
    Delete {
        /// Which stack.
        stack: Stack,
        /// Which service.
        service: Service,
        /// Which object.
        part: Part,
        /// As it was observed.
        fence: Fence,
    },
    /// Delete what a stack's pods needed, and last the rendered stack.
    Unrender {
        /// Which stack.
        stack: Stack,
        /// As it was observed.
        fence: Fence,
    },
    /// Create a Job.
    Run(Job),
    /// Delete a Job and its pods.
    DeleteJob(Job, Fence),
}

impl Action {
    /// Whether it is a part of a move of the traffic, of which all parts are done or none.
    pub fn is_move(&self) -> bool {
        matches!(self, Self::Point { intent, .. } if *intent != Intent::Repair)
    }

    /// Whether it has to wait if the other, which comes before it, cannot be done: of a move all parts are done or none, and
    /// pods do not start without what was to be rendered for them.
    pub fn needs(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Apply {
                    stack, fence: None, ..
                },
                Self::Render { stack: of, .. },
            ) => stack == of,
            _ => self.is_move() && other.is_move(),
        }
    }

    /// Whether it writes a live Service.
    pub const fn is_about_traffic(&self) -> bool {
        matches!(self, Self::CreateLive { .. } | Self::Point { .. })
    }
}

/// What a live Service is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// The swap.
    Promote,
    /// The swap back.
    RollBack,
    /// Somebody else has changed the selector.
    Repair,
}

/// Something that people are told once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Whether it is bad news.
    pub warning: bool,
    /// What happened, as one word.
    pub reason: &'static str,
    /// What happened, as a sentence.
    pub note: String,
}
