//! The test bed: a real Kubernetes on one machine, and what tests need to work with it.
//!
//! A cluster is a set of Linux namespaces (network, mount, process) that holds every component as an
//! ordinary process: no container engine, no virtual machine. See `docs/architecture.md`, "The test cluster".

pub mod addons;
pub mod alone;
pub mod broker;
pub mod cluster;
pub mod components;
pub mod demo;
pub mod exchange;
pub mod gate;
pub mod images;
pub mod kubectl;
pub mod operator;
pub mod pki;
pub mod preflight;
pub mod progress;
pub mod results;
pub mod rights;
pub mod room;
pub mod sandbox;
mod scratch;
pub mod story;
pub mod supervisor;
pub mod tools;
pub mod tunnel;
pub mod up;
