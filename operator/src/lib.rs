//! The exchange operator: stands up the other colour, migrates, tests, swaps, verifies, drains and retains.
//!
//! A reconcile is a pipeline: *observe* (the only reader) → *decide* (pure) → *apply* (the only writer). What has been
//! decided is recorded in the object's status before it is done.

mod actions;
pub mod api;
pub mod apply;
pub mod controller;
pub mod decide;
pub mod error;
pub mod guard;
pub mod http;
pub mod lease;
pub mod metrics;
pub mod observe;
pub mod plan;
mod release;
pub mod report;
pub mod resources;
pub mod revision;
pub mod status;
mod swap;
pub mod telemetry;
pub mod watch;
