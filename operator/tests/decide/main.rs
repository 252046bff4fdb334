//! `decide` in a simulated world: histories in which everything goes wrong at any time, each phase and each way out of
//! it, and stories of operators that wake too late.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on panics"
)]

mod histories;
mod objects;
mod transitions;
mod verdicts;
mod world;
