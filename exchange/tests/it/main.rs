//! Integration tests: the binary and the library against real stores, started on free ports.

// As test code, in which clippy.toml allows unwrapping.
#[cfg(test)]
mod connections;
#[cfg(test)]
mod queue;
#[cfg(test)]
mod races;
#[cfg(test)]
mod rules;
#[cfg(test)]
mod secure;
#[cfg(test)]
mod servers;
#[cfg(test)]
mod start;
#[cfg(test)]
mod stores;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod trade;
#[cfg(test)]
mod traders;
#[cfg(test)]
mod user;
#[cfg(test)]
mod whole;
