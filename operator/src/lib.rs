//! The exchange operator: stands up the other colour, migrates, tests, swaps, verifies, drains and retains.
//!
//! A reconcile is a pipeline: *observe* (the only reader) → [`decide`](https://en.wikipedia.org/wiki/Pure_function)
//! (pure) → *apply* (the only writer).

pub mod api;
pub mod status;
