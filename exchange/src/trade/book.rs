//! The rules of the order book, in memory: what the settlement function in the database must do.
//!
//! Nothing here serves a request. The database is the only place where orders are serialised; this is the
//! specification, short enough to be checked by eye, against which tests compare every answer and balance of the
//! database's.

use std::{cmp::Reverse, collections::BTreeMap};

use rust_decimal::Decimal;

use crate::money::{Amount, OutOfRange, Price, Size};

use super::{Side, TimeInForce};

/// The trades of an arriving order, at most.
const MOST_TRADES: usize = 500;

/// What is traded, and at which fees.
#[derive(Clone, Debug)]
pub struct Market {
    /// The part of a trade's value that the resting order pays.
    pub maker_fee_rate: Decimal,
    /// The part of a trade's value that the arriving order pays.
    pub taker_fee_rate: Decimal,
    /// Digits of the quote currency, to which fees are rounded: a taker's up, a maker's down.
    pub quote_scale: u32,
}

/// An order as it arrives. `price` is `None` for a market order.
#[derive(Clone, Debug)]
pub struct NewOrder {
    /// Whose order; each user has one account per currency here.
    pub user: u32,
    /// Buy or sell.
    pub side: Side,
    /// The limit.
    pub price: Option<Price>,
    /// How much.
    pub size: Size,
    /// Whether a rest stays in the book.
    pub time_in_force: TimeInForce,
}

/// What has become of an order when it has been matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Traded in full.
    Filled,
    /// The rest is in the book.
    Open,
    /// The rest, or all of it, is cancelled, for this reason.
    Cancelled(&'static str),
    /// Not covered: nothing has happened.
    InsufficientFunds,
    /// One of its accounts is closed: nothing has happened.
    AccountNotFound,
}

/// One trade of an arriving order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The number of the resting order.
    pub maker: usize,
    /// At the price of the resting order.
    pub price: Price,
    /// How much.
    pub size: Amount,
    /// What the arriving order pays.
    pub taker_fee: Amount,
    /// What the resting order pays.
    pub maker_fee: Amount,
}

/// One user's money in one currency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    /// All of it.
    pub balance: Amount,
    /// What open orders have reserved of it.
    pub hold: Amount,
    /// Whether it has been deleted.
    pub closed: bool,
}

impl Account {
    /// Nothing in it.
    pub const EMPTY: Self = Self {
        balance: Amount::ZERO,
        hold: Amount::ZERO,
        closed: false,
    };

    fn available(self) -> Result<Amount, OutOfRange> {
        self.balance.minus(self.hold)
    }
}

/// A user's two accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wallet {
    /// In the currency that is bought and sold.
    pub base: Account,
    /// In the currency that it is paid in.
    pub quote: Account,
}

#[derive(Clone, Debug)]
struct Resting {
    number: usize,
    user: u32,
    side: Side,
    price: Price,
    /// What was left when it came to rest.
    rested: Amount,
    left: Amount,
}

impl Resting {
    /// Value, and fee so far, of what it has traded as maker.
    fn paid(&self, market: &Market) -> Result<(Amount, Amount), OutOfRange> {
        let value = self.price.value_of(self.rested.minus(self.left)?)?;
        Ok((
            value,
            value.share_rounded_down(market.maker_fee_rate, market.quote_scale)?,
        ))
    }

    /// What it keeps on hold.
    fn hold(&self, market: &Market) -> Result<Amount, OutOfRange> {
        if self.side == Side::Sell {
            return Ok(self.left);
        }
        let all = self.price.value_of(self.rested)?;
        let fee = all.share_rounded_down(market.maker_fee_rate, market.quote_scale)?;
        let (value, paid) = self.paid(market)?;
        all.plus(fee)?.minus(value)?.minus(paid)
    }
}

/// A book and the wallets of its users.
#[derive(Clone, Debug)]
pub struct Book {
    market: Market,
    orders: usize,
    resting: Vec<Resting>,
    /// By user.
    pub wallets: BTreeMap<u32, Wallet>,
    /// What the exchange has earned.
    pub fees: Amount,
}

impl Book {
    /// An empty book.
    pub fn new(market: Market, wallets: BTreeMap<u32, Wallet>) -> Self {
        Self {
            market,
            orders: 0,
            resting: Vec::new(),
            wallets,
            fees: Amount::ZERO,
        }
    }

    /// Matches an order and settles its trades. Orders are numbered from 0 in the order of their arrival.
    pub fn submit(&mut self, order: &NewOrder) -> Result<(Outcome, Vec<Fill>), OutOfRange> {
        let number = self.orders;
        self.orders += 1;
        if self.account(order.user, Side::Sell).closed || self.account(order.user, Side::Buy).closed {
            return Ok((Outcome::AccountNotFound, Vec::new()));
        }
        if !self.is_covered(order)? {
            return Ok((Outcome::InsufficientFunds, Vec::new()));
        }
        let mut left = Amount::from(order.size);
        let mut value = Amount::ZERO;
        let mut fills: Vec<Fill> = Vec::new();
        let mut stopped = None;
        while !left.is_zero()
            && stopped.is_none()
            && let Some(mut maker) = self.take_best_against(order)
        {
            if maker.user == order.user {
                stopped = Some("self_trade");
            } else if fills.len() == MOST_TRADES {
                stopped = Some("trade_limit");
            } else {
                match self.trade(order, value, left, &mut maker)? {
                    Some(fill) => {
                        left = left.minus(fill.size)?;
                        value = value.plus(fill.price.value_of(fill.size)?)?;
                        fills.push(fill);
                    }
                    None => stopped = Some("insufficient_funds"),
                }
            }
            if !maker.left.is_zero() {
                self.resting.push(maker);
            }
        }
        let outcome = match (stopped, order.price) {
            _ if left.is_zero() => Outcome::Filled,
            (Some("insufficient_funds"), _) if fills.is_empty() => Outcome::InsufficientFunds,
            (Some(reason), _) => Outcome::Cancelled(reason),
            (None, Some(price)) if order.time_in_force == TimeInForce::Gtc => {
                let resting = Resting {
                    number,
                    user: order.user,
                    side: order.side,
                    price,
                    rested: left,
                    left,
                };
                let hold = resting.hold(&self.market)?;
                let account = self.account(order.user, order.side);
                account.hold = account.hold.plus(hold)?;
                // What covered the order is enough for its trades and its rest.
                account.available()?;
                self.resting.push(resting);
                Outcome::Open
            }
            (None, _) => Outcome::Cancelled("no_more_matches"),
        };
        Ok((outcome, fills))
    }

    /// Takes an order out of the book and releases its hold. Says whether it was there.
    pub fn cancel(&mut self, number: usize) -> Result<bool, OutOfRange> {
        let Some(at) = self.resting.iter().position(|order| order.number == number) else {
            return Ok(false);
        };
        let order = self.resting.swap_remove(at);
        let hold = order.hold(&self.market)?;
        let account = self.account(order.user, order.side);
        account.hold = account.hold.minus(hold)?;
        Ok(true)
    }

    /// Deletes an account that is empty and that no resting order names. Says whether it is one.
    pub fn close(&mut self, user: u32, side: Side) -> bool {
        let named = self.resting.iter().any(|order| order.user == user);
        let account = self.account(user, side);
        if named || *account != Account::EMPTY {
            return false;
        }
        account.closed = true;
        true
    }

    /// The best prices at which somebody buys, and sells.
    pub fn best_prices(&self) -> (Option<Price>, Option<Price>) {
        let prices = |side| {
            self.resting
                .iter()
                .filter(move |order| order.side == side)
                .map(|order| order.price)
        };
        (prices(Side::Buy).max(), prices(Side::Sell).min())
    }

    /// A limit order is covered at its own price and the higher fee; a market order to buy is checked at each trade.
    fn is_covered(&mut self, order: &NewOrder) -> Result<bool, OutOfRange> {
        let size = Amount::from(order.size);
        let needed = match (order.side, order.price) {
            (Side::Sell, _) => size,
            (Side::Buy, Some(price)) => {
                let value = price.value_of(size)?;
                value.plus(value.share_rounded_up(self.market.taker_fee_rate, self.market.quote_scale)?)?
            }
            (Side::Buy, None) => Amount::ZERO,
        };
        Ok(self.account(order.user, order.side).available()? >= needed)
    }

    /// Takes the order out that the new one meets first: best price, then first come.
    fn take_best_against(&mut self, order: &NewOrder) -> Option<Resting> {
        let meets = |resting: &Resting| {
            resting.side != order.side
                && match (order.side, order.price) {
                    (_, None) => true,
                    (Side::Buy, Some(limit)) => resting.price <= limit,
                    (Side::Sell, Some(limit)) => resting.price >= limit,
                }
        };
        let matching = self
            .resting
            .iter()
            .enumerate()
            .filter(|(_, resting)| meets(resting));
        let best = match order.side {
            Side::Buy => matching.min_by_key(|(_, resting)| (resting.price, resting.number)),
            Side::Sell => matching.min_by_key(|(_, resting)| (Reverse(resting.price), resting.number)),
        };
        best.map(|(at, _)| at).map(|at| self.resting.swap_remove(at))
    }

    /// Trades as much as both want, unless a market order to buy cannot pay for it. `value` is what the order has
    /// traded so far, and `left` what it still wants.
    fn trade(
        &mut self,
        order: &NewOrder,
        value: Amount,
        left: Amount,
        maker: &mut Resting,
    ) -> Result<Option<Fill>, OutOfRange> {
        let market = self.market.clone();
        let fee = |value: Amount| value.share_rounded_up(market.taker_fee_rate, market.quote_scale);
        let size = left.min(maker.left);
        let price = maker.price;
        let paid = price.value_of(size)?;
        let taker_fee = fee(value.plus(paid)?)?.minus(fee(value)?)?;
        let cost = paid.plus(taker_fee)?;
        if order.side == Side::Buy && self.account(order.user, Side::Buy).available()? < cost {
            return Ok(None);
        }
        let (hold_before, (_, fee_before)) = (maker.hold(&market)?, maker.paid(&market)?);
        maker.left = maker.left.minus(size)?;
        let (hold_after, (_, fee_after)) = (maker.hold(&market)?, maker.paid(&market)?);
        let maker_fee = fee_after.minus(fee_before)?;

        let held = self.account(maker.user, maker.side);
        held.hold = held.hold.minus(hold_before.minus(hold_after)?)?;
        let (buyer, seller, buyer_fee, seller_fee) = match order.side {
            Side::Buy => (order.user, maker.user, taker_fee, maker_fee),
            Side::Sell => (maker.user, order.user, maker_fee, taker_fee),
        };
        let account = self.account(buyer, Side::Buy);
        account.balance = account.balance.minus(paid)?.minus(buyer_fee)?;
        let account = self.account(buyer, Side::Sell);
        account.balance = account.balance.plus(size)?;
        let account = self.account(seller, Side::Sell);
        account.balance = account.balance.minus(size)?;
        let account = self.account(seller, Side::Buy);
        account.balance = account.balance.plus(paid)?.minus(seller_fee)?;
        self.fees = self.fees.plus(taker_fee)?.plus(maker_fee)?;
        Ok(Some(Fill {
            maker: maker.number,
            price,
            size,
            taker_fee,
            maker_fee,
        }))
    }

    /// The account out of which a user pays for an order of this side.
    fn account(&mut self, user: u32, side: Side) -> &mut Account {
        let wallet = self.wallets.entry(user).or_insert(Wallet {
            base: Account::EMPTY,
            quote: Account::EMPTY,
        });
        match side {
            Side::Sell => &mut wallet.base,
            Side::Buy => &mut wallet.quote,
        }
    }
}
