//! The releases that are built from this tree. Each binary is linked with one of them; all share this library.

/// A version of the exchange, and what it does differently from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// The version, as `/version` and `/stack` show it.
    pub version: &'static str,
    /// The expand that it needs, which is also its level as a reader: `exchange migrate` goes no further.
    pub level: i64,
    /// Whether freezes of accounts are periods of their own, told apart from other changes and shown as `frozen_at`.
    /// Otherwise `accounts.state` is all that is known.
    pub has_freezes: bool,
}

/// The first release.
pub const V1: Release = Release {
    version: "1.0.0",
    level: 10,
    has_freezes: false,
};

/// Says since when an account is frozen.
pub const V2: Release = Release {
    version: "2.0.0",
    level: 20,
    has_freezes: true,
};
