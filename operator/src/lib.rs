//! The exchange operator: stands up the other colour, migrates, tests, swaps, verifies, drains and retains.
//!
//! A reconcile is a pipeline: *observe* (the only reader) → *decide* (pure) → *apply* (the only writer). What has been
//! decided is recorded in the object's status before it is done. Modules that ask neither clock nor environment deny it.

#[deny(clippy::disallowed_methods)]
mod actions;
pub mod api;
pub mod apply;
pub mod controller;
#[deny(clippy::disallowed_methods)]
pub mod decide;
pub mod error;
#[deny(clippy::disallowed_methods)]
pub mod guard;
pub mod http;
pub mod lease;
pub mod metrics;
pub mod observe;
#[deny(clippy::disallowed_methods)]
pub mod plan;
pub mod proxy;
#[deny(clippy::disallowed_methods)]
mod release;
#[deny(clippy::disallowed_methods)]
pub mod report;
pub mod resources;
pub mod revision;
#[deny(clippy::disallowed_methods)]
pub mod status;
#[deny(clippy::disallowed_methods)]
mod swap;
pub mod telemetry;
pub mod watch;
