//! The exchange: user, trade and notification services of one binary per release, on PostgreSQL.
//!
//! Every service is an axum router that [`service::serve`] puts behind the accept loop of [`server`] and beside the
//! admin port of [`admin`]. What the services share is in [`app::App`].

pub mod admin;
pub mod app;
pub mod auth;
pub mod bus;
pub mod cli;
pub mod config;
pub mod db;
pub mod error;
pub mod extract;
pub mod grant;
pub mod idempotency;
pub mod inbox;
pub mod lane;
pub mod limit;
pub mod load;
pub mod mail;
pub mod market;
pub mod messages;
pub mod metrics;
pub mod migrate;
#[deny(clippy::float_arithmetic)]
pub mod money;
pub mod notice;
pub mod notification;
pub mod openapi;
pub mod outbox;
pub mod password;
pub mod personal;
pub mod release;
pub mod role;
pub mod server;
pub mod service;
pub mod session;
pub mod smoke;
pub mod stream;
pub mod telemetry;
#[deny(clippy::float_arithmetic)]
pub mod trade;
pub mod trader;
pub mod user;
