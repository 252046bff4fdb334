//! Amounts, prices and sizes: exact decimals with checked arithmetic, written as decimal strings.
//!
//! A number from outside has at most 15 digits before the point and 9 after it, so that every product of a price and a
//! size still fits. A sum, such as a balance, may have 18 before the point. What reaches the ledger is a multiple of its currency's smallest unit (see the migrations); nothing but a fee
//! is ever rounded.

use std::{borrow::Cow, fmt, str::FromStr};

use rust_decimal::{Decimal, RoundingStrategy};
use serde::{Deserialize, Serialize};

/// Digits that a number from outside may have before the point.
const INTEGER_DIGITS: usize = 15;

/// Digits that a number from outside may have after the point: the largest scale of a currency.
const FRACTION_DIGITS: usize = 9;

/// Why a text is not a number that the exchange takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNumber {
    /// Signs, exponents, spaces, missing digits and all that.
    #[error("write a decimal number such as \"12.5\"")]
    Malformed,
    /// More digits than a number may have.
    #[error("at most 15 digits before the point and 9 after it")]
    TooLong,
    /// Zero, where there must be something.
    #[error("must be above zero")]
    Zero,
}

/// A calculation left the range of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the amount is out of range")]
pub struct OutOfRange;

fn parse(text: &str) -> Result<Decimal, InvalidNumber> {
    let (integer, fraction) = match text.split_once('.') {
        Some((_, "")) => return Err(InvalidNumber::Malformed),
        Some((integer, fraction)) => (integer, fraction),
        None => (text, ""),
    };
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if integer.is_empty() || !digits(integer) || !digits(fraction) {
        return Err(InvalidNumber::Malformed);
    }
    if integer.len() > INTEGER_DIGITS || fraction.len() > FRACTION_DIGITS {
        return Err(InvalidNumber::TooLong);
    }
    Decimal::from_str_exact(text).map_err(|_| InvalidNumber::Malformed)
}

/// The three kinds of number differ in what they may be combined with, not in how they are read and written.
macro_rules! number {
    ($(#[$meta:meta])* $name:ident, $example:literal, $pattern:literal, $check:expr) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, sqlx::Type)]
        #[serde(try_from = "Cow<'_, str>", into = "String")]
        #[sqlx(transparent)]
        pub struct $name(Decimal);

        impl FromStr for $name {
            type Err = InvalidNumber;

            fn from_str(text: &str) -> Result<Self, InvalidNumber> {
                let check: fn(Decimal) -> Result<Decimal, InvalidNumber> = $check;
                parse(text).and_then(check).map(Self)
            }
        }

        impl TryFrom<Cow<'_, str>> for $name {
            type Error = InvalidNumber;

            fn try_from(text: Cow<'_, str>) -> Result<Self, InvalidNumber> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(number: $name) -> Self {
                number.to_string()
            }
        }

        /// Without trailing zeros, never with an exponent.
        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "{}", self.0.normalize())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, formatter)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .pattern(Some($pattern))
                    .examples([$example])
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    };
}

fn above_zero(number: Decimal) -> Result<Decimal, InvalidNumber> {
    if number.is_zero() {
        Err(InvalidNumber::Zero)
    } else {
        Ok(number)
    }
}

number! {
    /// An amount of one currency, zero or more. What trades add up to may have more digits than a request.
    Amount, "250.75", r"^\d{1,18}(\.\d{1,9})?$", Ok
}
number! {
    /// What one unit of the base currency costs in the quote currency; above zero.
    Price, "61250.01", r"^\d{1,15}(\.\d{1,9})?$", above_zero
}
number! {
    /// How much of the base currency; above zero.
    Size, "0.25", r"^\d{1,15}(\.\d{1,9})?$", above_zero
}

impl Amount {
    /// Nothing.
    pub const ZERO: Self = Self(Decimal::ZERO);

    /// Whether there is anything.
    pub fn is_zero(self) -> bool {
        self.0.is_zero()
    }

    /// The sum.
    pub fn plus(self, other: Self) -> Result<Self, OutOfRange> {
        self.0.checked_add(other.0).map(Self).ok_or(OutOfRange)
    }

    /// The difference, if it is not below zero.
    pub fn minus(self, other: Self) -> Result<Self, OutOfRange> {
        match self.0.checked_sub(other.0) {
            Some(rest) if !rest.is_sign_negative() || rest.is_zero() => Ok(Self(rest)),
            _ => Err(OutOfRange),
        }
    }

    /// This share of it, rounded up to `scale` digits: what a taker is charged.
    pub fn share_rounded_up(self, rate: Decimal, scale: u32) -> Result<Self, OutOfRange> {
        self.share(rate, scale, RoundingStrategy::AwayFromZero)
    }

    /// This share of it, rounded down to `scale` digits: what a maker is charged.
    pub fn share_rounded_down(self, rate: Decimal, scale: u32) -> Result<Self, OutOfRange> {
        self.share(rate, scale, RoundingStrategy::ToZero)
    }

    fn share(self, rate: Decimal, scale: u32, rounding: RoundingStrategy) -> Result<Self, OutOfRange> {
        let share = self.0.checked_mul(rate).ok_or(OutOfRange)?;
        Ok(Self(share.round_dp_with_strategy(scale, rounding)))
    }
}

impl From<Size> for Amount {
    fn from(size: Size) -> Self {
        Self(size.0)
    }
}

impl Price {
    /// What so much costs: exact, as products are declared so that it has no more digits than the quote currency.
    pub fn value_of(self, size: Amount) -> Result<Amount, OutOfRange> {
        let value = self.0.checked_mul(size.0).ok_or(OutOfRange)?;
        // A product of more than 28 digits would have been rounded.
        if value.scale() < self.0.scale() + size.0.scale() && !value.is_zero() {
            return Err(OutOfRange);
        }
        Ok(Amount(value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_plain_decimals_are_read() {
        for (text, shown) in [
            ("0.1", "0.1"),
            ("10.500", "10.5"),
            ("007", "7"),
            ("999999999999999.999999999", "999999999999999.999999999"),
            ("0.000000001", "0.000000001"),
        ] {
            assert_eq!(text.parse::<Price>().unwrap().to_string(), shown);
        }
        for bad in [
            "", ".", "1.", ".5", "-1", "+1", "1e3", "1,5", " 1", "1 ", "0x1", "NaN", "inf", "１", "1.2.3",
            "1_000",
        ] {
            assert_eq!(bad.parse::<Amount>(), Err(InvalidNumber::Malformed), "{bad}");
        }
        for long in ["1000000000000000", "0.0000000001", "00000000000000001"] {
            assert_eq!(long.parse::<Amount>(), Err(InvalidNumber::TooLong), "{long}");
        }
        for zero in ["0", "0.0", "000.000"] {
            assert_eq!(zero.parse::<Size>(), Err(InvalidNumber::Zero), "{zero}");
            assert!(zero.parse::<Amount>().unwrap().is_zero());
        }
    }

    #[test]
    fn json_takes_strings_only() {
        assert_eq!(
            serde_json::to_string(&"1.50".parse::<Amount>().unwrap()).unwrap(),
            r#""1.5""#
        );
        assert!(serde_json::from_str::<Amount>("1.5").is_err());
        assert!(serde_json::from_str::<Amount>(r#""1.5""#).is_ok());
    }

    /// Numbers of any length that is allowed, as digits and scale.
    fn number() -> impl Strategy<Value = Decimal> {
        (0u32..=9, 1u32..=24).prop_flat_map(|(scale, digits)| {
            let most = 10_i128.pow(digits.min(15 + scale)) - 1;
            (1..=most).prop_map(move |mantissa| Decimal::from_i128_with_scale(mantissa, scale))
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(number in number()) {
            let amount: Amount = number.to_string().parse().unwrap();
            prop_assert_eq!(amount.to_string().parse::<Amount>().unwrap(), amount);
        }

        #[test]
        fn adding_and_taking_away_is_exact(one in number(), two in number()) {
            let (one, two) = (Amount(one), Amount(two));
            prop_assert_eq!(one.plus(two).unwrap().minus(two).unwrap(), one);
            if one < two {
                prop_assert_eq!(one.minus(two), Err(OutOfRange));
            }
        }

        /// Against integers: the value of a size is exact, or refused.
        #[test]
        fn a_value_is_exact_or_refused(price in number(), size in number()) {
            let exact = price.mantissa().checked_mul(size.mantissa());
            match Price(price).value_of(Amount(size)) {
                Ok(value) => prop_assert_eq!(value.0, Decimal::from_i128_with_scale(exact.unwrap(), price.scale() + size.scale())),
                Err(OutOfRange) => prop_assert!(exact.is_none_or(|exact| exact >= 10_i128.pow(28) / 2)),
            }
        }

        /// A fee is rounded by less than one unit, and exact fees stay as they are.
        #[test]
        fn fees_are_rounded_to_the_next_unit(units in 1_i128..10_i128.pow(15), rate in 0_i64..=100_000, scale in 0_u32..=9) {
            let rate = Decimal::new(rate, 6);
            let value = Amount(Decimal::from_i128_with_scale(units, scale));
            let up = value.share_rounded_up(rate, scale).unwrap().0;
            let down = value.share_rounded_down(rate, scale).unwrap().0;
            let (exact, unit) = (value.0 * rate, Decimal::new(1, scale));
            prop_assert!(down <= exact && exact < down + unit);
            prop_assert!(up >= exact && up < exact + unit);
            prop_assert!(up <= value.0, "a rate below one never takes more than the value");
        }
    }
}
