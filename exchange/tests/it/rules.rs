//! The settlement function in the database does what the rules of the book say: same answers, same money.

use std::collections::BTreeMap;

use exchange::{
    money::{Amount, Price, Size},
    trade::{
        Side, TimeInForce,
        book::{Account, Book, Fill, Market, NewOrder, Outcome, Wallet},
    },
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};
use rust_decimal::Decimal;
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    servers::{Database, Postgres},
    traders::assert_clean,
};

const USERS: u32 = 4;
const PRODUCT: &str = "BTC-USD";

/// What happens to the book.
#[derive(Clone, Debug)]
enum Step {
    /// Orders that go in one call.
    Batch(Vec<NewOrder>),
    /// A purchase at the price at which somebody sells, of a user who has just what covers it, and whose rest stays.
    Exact(NewOrder),
    /// The cancelling of the order with this number, counted round the ones placed so far.
    Cancel(usize),
    /// The deletion of the account out of which this user pays for such orders.
    Close(u32, Side),
}

fn order() -> impl Strategy<Value = NewOrder> {
    let price = prop_oneof![8 => (0_i64..5).prop_map(Some), 2 => Just(None)];
    (0..USERS, any::<bool>(), price, 0_i64..12, any::<bool>()).prop_map(|(user, buys, price, size, rests)| {
        NewOrder {
            user,
            side: if buys { Side::Buy } else { Side::Sell },
            // So that fees need rounding, and the smallest size is among the sizes.
            price: price.map(|step| Decimal::new(101 + step, 2).to_string().parse().unwrap()),
            size: Decimal::new(10 + size * 3, 6).to_string().parse().unwrap(),
            time_in_force: if rests && price.is_some() {
                TimeInForce::Gtc
            } else {
                TimeInForce::Ioc
            },
        }
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let batch = proptest::collection::vec(order(), 1..10).prop_map(Step::Batch);
    let close = (0..USERS, any::<bool>())
        .prop_map(|(user, buys)| Step::Close(user, if buys { Side::Buy } else { Side::Sell }));
    let exact = order().prop_map(|order| {
        Step::Exact(NewOrder {
            side: Side::Buy,
            time_in_force: TimeInForce::Gtc,
            ..order
        })
    });
    let step = prop_oneof![10 => batch, 10 => exact, 2 => (0_usize..100).prop_map(Step::Cancel), 3 => close];
    proptest::collection::vec(step, 1..14)
}

/// The rates differ by so little that what rests saves next to nothing.
fn market() -> Market {
    Market {
        maker_fee_rate: Decimal::new(19, 4),
        taker_fee_rate: Decimal::new(2, 3),
        quote_scale: 8,
    }
}

/// What a purchase at a limit must be covered by.
fn cover(price: Price, size: Size) -> Amount {
    let value = price.value_of(size.into()).unwrap();
    let fee = value.share_rounded_up(market().taker_fee_rate, market().quote_scale);
    value.plus(fee.unwrap()).unwrap()
}

/// What a user begins with: little enough that some orders are not covered, and some accounts are empty.
fn wallet(user: u32) -> Wallet {
    let with = |amount: &str| Account {
        balance: amount.parse().unwrap(),
        ..Account::EMPTY
    };
    Wallet {
        base: with(if user == 0 { "0" } else { "0.0003" }),
        quote: with(if user == 1 { "0" } else { "0.0003" }),
    }
}

#[derive(sqlx::FromRow)]
struct Answered {
    outcome: String,
    status: Option<String>,
    reason: Option<String>,
    trade_ids: Option<Vec<i64>>,
    trade_prices: Option<Vec<Price>>,
    trade_sizes: Option<Vec<Size>>,
    trade_fees: Option<Vec<Amount>>,
}

async fn move_money(db: &PgPool, lane: &str, kind: &str, (user, account): (Uuid, Uuid), amount: Amount) {
    let (outcome,): (String,) =
        sqlx::query_as("select outcome from move_external_v1($1, $2, $3, $4, $5, null, null)")
            .bind(lane)
            .bind(kind)
            .bind(account)
            .bind(user)
            .bind(amount)
            .fetch_one(db)
            .await
            .unwrap();
    assert_eq!(outcome, "posted");
}

/// One lane of the database, driven like the book.
struct Lane<'a> {
    db: &'a PgPool,
    name: String,
    users: Vec<(Uuid, Uuid, Uuid)>,
    orders: Vec<(Uuid, u32)>,
}

impl<'a> Lane<'a> {
    async fn new(db: &'a PgPool) -> Self {
        let name = format!("test-blue-rules.{}", Uuid::now_v7().simple());
        let mut users = Vec::new();
        for number in 0..USERS {
            let user = Uuid::now_v7();
            let wallet = wallet(number);
            let mut accounts = Vec::new();
            for (currency, begins_with) in [("BTC", wallet.base), ("USD", wallet.quote)] {
                let account = Uuid::now_v7();
                sqlx::query("insert into accounts (id, lane, user_id, currency, name) values ($1, $2, $3, $4, 'main')")
                    .bind(account)
                    .bind(&name)
                    .bind(user)
                    .bind(currency)
                    .execute(db)
                    .await
                    .unwrap();
                accounts.push(account);
                if begins_with == Account::EMPTY {
                    continue;
                }
                move_money(db, &name, "deposit", (user, account), begins_with.balance).await;
            }
            users.push((user, accounts[0], accounts[1]));
        }
        Self {
            db,
            name,
            users,
            orders: Vec::new(),
        }
    }

    /// Brings the balance in the quote currency from one amount to another.
    async fn set_balance(&self, user: u32, from: Amount, to: Amount) {
        let (user, _, account) = self.users[user as usize];
        let (kind, amount) = match to.minus(from) {
            Ok(more) => ("deposit", more),
            Err(_) => ("withdrawal", from.minus(to).unwrap()),
        };
        if !amount.is_zero() {
            move_money(self.db, &self.name, kind, (user, account), amount).await;
        }
    }

    async fn submit(&mut self, batch: &[NewOrder]) -> Vec<Answered> {
        let ids: Vec<Uuid> = batch.iter().map(|_| Uuid::now_v7()).collect();
        self.orders
            .extend(ids.iter().copied().zip(batch.iter().map(|order| order.user)));
        let user = |order: &NewOrder| self.users[order.user as usize];
        sqlx::query_as(
            "select outcome, status, reason, trade_ids, trade_prices, trade_sizes, trade_fees
             from submit_orders_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        )
        .bind(&self.name)
        .bind(PRODUCT)
        .bind(&ids)
        .bind(batch.iter().map(|order| user(order).0).collect::<Vec<_>>())
        .bind(ids.iter().map(Uuid::to_string).collect::<Vec<_>>())
        .bind(batch.iter().map(|order| order.side.as_str()).collect::<Vec<_>>())
        .bind(batch.iter().map(|order| order.price).collect::<Vec<_>>())
        .bind(batch.iter().map(|order| order.size).collect::<Vec<_>>())
        .bind(
            batch
                .iter()
                .map(|order| order.time_in_force.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(batch.iter().map(|order| user(order).1).collect::<Vec<_>>())
        .bind(batch.iter().map(|order| user(order).2).collect::<Vec<_>>())
        .bind(vec![None::<serde_json::Value>; batch.len()])
        .fetch_all(self.db)
        .await
        .unwrap()
    }

    async fn cancel(&self, number: usize) -> bool {
        let (id, user) = self.orders[number];
        // Cancelling a cancelled order is answered the same, so look before.
        let before: Option<(String,)> = sqlx::query_as("select status from orders where id = $1")
            .bind(id)
            .fetch_optional(self.db)
            .await
            .unwrap();
        let (outcome,): (String,) = sqlx::query_as("select outcome from cancel_order_v1($1, $2, $3)")
            .bind(&self.name)
            .bind(self.users[user as usize].0)
            .bind(id)
            .fetch_one(self.db)
            .await
            .unwrap();
        match before.as_ref().map(|(status,)| status.as_str()) {
            None => assert_eq!(outcome, "order_not_found"),
            Some("filled") => assert_eq!(outcome, "order_filled"),
            Some(_) => assert_eq!(outcome, "cancelled"),
        }
        before.is_some_and(|(status,)| status == "open")
    }

    /// Deletes an account, which the database refuses if there is something in it, or an open order names it.
    async fn close(&self, user: u32, side: Side) -> bool {
        let (_, base, quote) = self.users[user as usize];
        let closed =
            sqlx::query("update accounts set deleted_at = now() where id = $1 and deleted_at is null")
                .bind(if side == Side::Sell { base } else { quote })
                .execute(self.db)
                .await;
        match closed {
            Ok(closed) => closed.rows_affected() == 1,
            Err(error) => {
                let code = error.as_database_error().unwrap().code().unwrap();
                assert!(["23514", "23001"].contains(&&*code), "{error}");
                false
            }
        }
    }

    /// The trades of an answer; each with the number of the resting order and its fee from the table of trades.
    async fn fills(&self, answered: &Answered) -> Vec<Fill> {
        let mut fills = Vec::new();
        let ids = answered.trade_ids.iter().flatten();
        for (at, id) in ids.enumerate() {
            let (maker, maker_fee): (Uuid, Amount) =
                sqlx::query_as("select maker_order_id, maker_fee from trades where id = $1")
                    .bind(id)
                    .fetch_one(self.db)
                    .await
                    .unwrap();
            fills.push(Fill {
                maker: self.orders.iter().position(|(order, _)| *order == maker).unwrap(),
                price: answered.trade_prices.as_ref().unwrap()[at],
                size: answered.trade_sizes.as_ref().unwrap()[at].into(),
                taker_fee: answered.trade_fees.as_ref().unwrap()[at],
                maker_fee,
            });
        }
        fills
    }

    async fn wallets(&self) -> BTreeMap<u32, Wallet> {
        let mut wallets = BTreeMap::new();
        for (number, (user, ..)) in (0..).zip(&self.users) {
            let accounts: Vec<(Amount, Amount, bool)> = sqlx::query_as(
                "select balance, hold, deleted_at is not null from accounts where user_id = $1 order by currency",
            )
            .bind(user)
            .fetch_all(self.db)
            .await
            .unwrap();
            let account = |at: usize| Account {
                balance: accounts[at].0,
                hold: accounts[at].1,
                closed: accounts[at].2,
            };
            let wallet = Wallet {
                base: account(0),
                quote: account(1),
            };
            wallets.insert(number, wallet);
        }
        wallets
    }

    async fn fees(&self) -> Amount {
        let (fees,): (Amount,) = sqlx::query_as(
            "select coalesce(sum(amount), 0) from entries join accounts on id = account_id
             where entries.lane = $1 and accounts.kind = 'fee'",
        )
        .bind(&self.name)
        .fetch_one(self.db)
        .await
        .unwrap();
        fees
    }
}

/// Places orders in both, which must answer the same. Those that are deferred come after the others of their batch.
async fn place(lane: &mut Lane<'_>, book: &mut Book, batch: &[NewOrder]) -> Result<(), TestCaseError> {
    let mut batch = batch.to_vec();
    while !batch.is_empty() {
        let placed = lane.orders.len();
        let answers = lane.submit(&batch).await;
        prop_assert_eq!(answers.len(), batch.len());
        let ids = lane.orders.split_off(placed);
        let (deferred, answered): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .zip(answers)
            .zip(ids)
            .partition(|((_, answered), _)| answered.outcome == "deferred");
        // Nothing comes before the first one.
        prop_assert!(!answered.is_empty());
        lane.orders.extend(answered.iter().map(|(_, id)| *id));
        for ((order, answered), _) in answered {
            let (outcome, fills) = book.submit(&order).unwrap();
            let actual = match (answered.outcome.as_str(), answered.status.as_deref()) {
                ("accepted", Some("filled")) => "filled",
                ("accepted", Some("open")) => "open",
                ("accepted", Some("cancelled")) => answered.reason.as_deref().unwrap(),
                (refused, _) => &format!("refused: {refused}"),
            };
            let expected = match outcome {
                Outcome::Filled => "filled",
                Outcome::Open => "open",
                Outcome::Cancelled(reason) => reason,
                Outcome::InsufficientFunds => "refused: insufficient_funds",
                Outcome::AccountNotFound => "refused: account_not_found",
            };
            prop_assert_eq!(actual, expected, "{:?}", order);
            prop_assert_eq!(lane.fills(&answered).await, fills, "{:?}", order);
        }
        batch = deferred.into_iter().map(|((order, _), _)| order).collect();
    }
    Ok(())
}

async fn compare(db: &PgPool, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut book = Book::new(market(), (0..USERS).map(|user| (user, wallet(user))).collect());
    let mut lane = Lane::new(db).await;
    for step in steps {
        match step {
            Step::Batch(batch) => place(&mut lane, &mut book, &batch).await?,
            Step::Exact(mut order) => {
                let (_, asked) = book.best_prices();
                order.price = asked.or(order.price);
                let account = &mut book.wallets.get_mut(&order.user).unwrap().quote;
                if let Some(price) = order.price
                    && !account.closed
                {
                    let needed = account.hold.plus(cover(price, order.size)).unwrap();
                    lane.set_balance(order.user, account.balance, needed).await;
                    account.balance = needed;
                    place(&mut lane, &mut book, &[order]).await?;
                }
            }
            Step::Cancel(choice) => {
                if lane.orders.is_empty() {
                    continue;
                }
                let number = choice % lane.orders.len();
                prop_assert_eq!(lane.cancel(number).await, book.cancel(number).unwrap());
            }
            Step::Close(user, side) => {
                prop_assert_eq!(lane.close(user, side).await, book.close(user, side));
            }
        }
        prop_assert_eq!(lane.wallets().await, book.wallets.clone());
        if let (Some(bid), Some(ask)) = book.best_prices() {
            prop_assert!(bid < ask, "the book is crossed");
        }
    }
    prop_assert_eq!(lane.fees().await, book.fees);
    assert_clean(db, &lane.name).await;
    Ok(())
}

#[test]
fn the_database_settles_by_the_rules_of_the_book() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(async {
        let database = Database::migrated(Postgres::shared()).await;
        let db = PgPool::connect(&database.owner_url).await.unwrap();
        sqlx::query("update products set maker_fee_rate = $1, taker_fee_rate = $2 where symbol = $3")
            .bind(market().maker_fee_rate)
            .bind(market().taker_fee_rate)
            .bind(PRODUCT)
            .execute(&db)
            .await
            .unwrap();
        db
    });
    let config = Config {
        cases: 100,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&steps(), |steps| runtime.block_on(compare(&db, steps)))
        .unwrap();
}
