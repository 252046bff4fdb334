//! Integration tests: the binary and the library against real stores, started on free ports.

// As test code, in which clippy.toml allows unwrapping.
#[cfg(test)]
mod api;
#[cfg(test)]
mod bench;
#[cfg(test)]
mod connections;
#[cfg(test)]
mod database;
#[cfg(test)]
mod disasters;
#[cfg(test)]
mod examples;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod migrate;
#[cfg(test)]
mod queries;
#[cfg(test)]
mod queue;
#[cfg(test)]
mod races;
#[cfg(test)]
mod releases;
#[cfg(test)]
mod roles;
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
mod tokens;
#[cfg(test)]
mod trade;
#[cfg(test)]
mod traders;
#[cfg(test)]
mod user;
#[cfg(test)]
mod whole;
