//! Hands orders to the settlement function, book by book.
//!
//! The database serves one transaction per book at a time, so what arrives while one is under way goes together in the
//! next: an idle book's order goes alone and at once, and a busy book's batches grow as far as they need to.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};
use uuid::Uuid;

use crate::{
    db,
    error::{ApiError, TOO_MANY_REQUESTS, UNAVAILABLE},
    idempotency::KEY_REUSED,
    lane::Lane,
    money::{Amount, Price, Size},
    telemetry::TraceContext,
};

use super::{Counters, Side, TimeInForce, refused};

/// Orders per transaction, at most: further ones would wait longer for the answer than they gain.
const MOST_PER_BATCH: usize = 64;

/// Orders that may wait for one book; beyond, clients are asked to come back.
const MOST_WAITING: usize = 2048;

/// Those of one user among them: nobody may keep a book from all others.
const MOST_WAITING_OF_ONE: usize = 256;

/// When to try again what found no room, or somebody else's lock.
const COME_AGAIN: Duration = Duration::from_secs(1);

/// Attempts at a transaction that was undone for a passing reason.
const ATTEMPTS: usize = 4;

/// How long a transaction is tried again, and how long the orders of one that failed are tried alone: others wait behind
/// them. An account that is locked costs each attempt a second (see `lock_book_v1`).
const PATIENCE: Duration = Duration::from_secs(2);

/// How long one of those orders is tried again: not after it has waited for an account.
const PATIENCE_ALONE: Duration = Duration::from_millis(500);

/// For a transaction, with the wait for a connection: longer than PostgreSQL lets it take. A database host that has gone without a
/// word would keep its book from being worked on for ever.
const CALL: Duration = Duration::from_secs(20);

/// What the settlement function says of an order that belongs into the next transaction.
const DEFERRED: &str = "deferred";

/// An order as the settlement function takes it.
#[derive(Clone, Debug)]
pub(super) struct Submission {
    pub(super) id: Uuid,
    pub(super) user_id: Uuid,
    pub(super) client_order_id: String,
    pub(super) side: Side,
    /// None: a market order.
    pub(super) price: Option<Price>,
    pub(super) size: Size,
    pub(super) time_in_force: TimeInForce,
    pub(super) base_account_id: Uuid,
    pub(super) quote_account_id: Uuid,
    /// That of its request.
    pub(super) trace: TraceContext,
}

/// What the settlement function says about an order.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(super) struct Settled {
    outcome: String,
    field: Option<String>,
    pub(super) order_id: Uuid,
    pub(super) status: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) taken: Option<Amount>,
    pub(super) created_at: OffsetDateTime,
    pub(super) trade_ids: Option<Vec<i64>>,
    pub(super) trade_prices: Option<Vec<Price>>,
    pub(super) trade_sizes: Option<Vec<Size>>,
    pub(super) trade_fees: Option<Vec<Amount>>,
}

impl Settled {
    /// Whether this order was known, and this is the first answer once more.
    pub(super) fn is_replay(&self) -> bool {
        self.outcome == "replayed"
    }

    /// The same of an order that was taken; of another, why it was refused.
    fn or_refusal(self) -> Result<Self, ApiError> {
        match self.outcome.as_str() {
            "accepted" | "replayed" => Ok(self),
            "client_order_id_reused" => Err(ApiError::from(KEY_REUSED).field("client_order_id")),
            code => Err(refused(code, self.field.as_deref())),
        }
    }
}

/// The books that have orders waiting. Clones share them.
#[derive(Clone)]
pub(super) struct Books {
    db: PgPool,
    waiting: Arc<Mutex<HashMap<Book, VecDeque<Waiting>>>>,
    counters: Counters,
}

type Book = (Lane, String);

struct Waiting {
    submission: Submission,
    answer: oneshot::Sender<Result<Settled, ApiError>>,
}

impl Books {
    pub(super) fn new(db: PgPool, counters: Counters) -> Self {
        Self {
            db,
            waiting: Arc::default(),
            counters,
        }
    }

    /// Settles an order. It is settled, and counted, even if the caller goes away.
    pub(super) async fn submit(
        &self,
        lane: Lane,
        product: String,
        submission: Submission,
    ) -> Result<Settled, ApiError> {
        let answered = self
            .queue((lane, product), submission)
            .inspect_err(|refusal| self.counters.refused(refusal))?;
        answered.await.unwrap_or_else(|_| {
            let dropped = ApiError::internal("a batch of orders was dropped");
            self.counters.refused(&dropped);
            Err(dropped)
        })
    }

    /// Has an order wait for its book, and the book worked on. Returns where the answer will come.
    fn queue(
        &self,
        book: Book,
        submission: Submission,
    ) -> Result<oneshot::Receiver<Result<Settled, ApiError>>, ApiError> {
        let (answer, answered) = oneshot::channel();
        let mut waiting = self.lock();
        let idle = !waiting.contains_key(&book);
        let queue = waiting.entry(book.clone()).or_default();
        if queue.len() >= MOST_WAITING {
            return Err(ApiError::from(UNAVAILABLE).retry_after(COME_AGAIN));
        }
        if queue.len() >= MOST_WAITING_OF_ONE {
            let user = submission.user_id;
            let of_user = queue.iter().filter(|it| it.submission.user_id == user);
            if of_user.count() >= MOST_WAITING_OF_ONE {
                return Err(ApiError::from(TOO_MANY_REQUESTS).retry_after(COME_AGAIN));
            }
        }
        queue.push_back(Waiting { submission, answer });
        if idle {
            tokio::spawn(self.clone().supervise(book));
        }
        Ok(answered)
    }

    /// Has a book worked on. A panic there must not leave it busy with nobody at work.
    async fn supervise(self, book: Book) {
        let work = tokio::spawn(self.clone().work(book.clone()));
        if work.await.is_err() {
            self.lock().remove(&book);
        }
    }

    /// Settles what waits for a book until nothing does.
    async fn work(self, book: Book) {
        while let Some(batch) = self.next_batch(&book) {
            self.counters
                .batch_sizes
                .observe(f64::from(u32::try_from(batch.len()).unwrap_or(u32::MAX)));
            let (submissions, answers): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .map(|waiting| (waiting.submission, waiting.answer))
                .unzip();
            let results = self.settle(&book, &submissions).await;
            let mut deferred = Vec::new();
            for ((submission, answer), result) in submissions.into_iter().zip(answers).zip(results) {
                if result.as_ref().is_ok_and(|settled| settled.outcome == DEFERRED) {
                    deferred.push(Waiting { submission, answer });
                    continue;
                }
                let result = submission.trace.within(|| result.and_then(Settled::or_refusal));
                match &result {
                    Ok(settled) => self.counters.settled(settled),
                    Err(refusal) => self.counters.refused(refusal),
                }
                // A client that is gone will ask again.
                let _ = answer.send(result);
            }
            // Before all others, as they came.
            if let Some(queue) = self.lock().get_mut(&book) {
                for waiting in deferred.into_iter().rev() {
                    queue.push_front(waiting);
                }
            }
        }
    }

    /// The orders of the next transaction. Without any, the book is idle.
    fn next_batch(&self, book: &Book) -> Option<Vec<Waiting>> {
        let mut waiting = self.lock();
        let queue = waiting.get_mut(book)?;
        let mut keys = HashSet::new();
        let mut batch = Vec::new();
        // A client order id that occurs twice waits for the first one's answer, and lets the others pass.
        let mut repeated = VecDeque::new();
        while batch.len() < MOST_PER_BATCH
            && let Some(next) = queue.pop_front()
        {
            let submission = &next.submission;
            if keys.insert((submission.user_id, submission.client_order_id.clone())) {
                batch.push(next);
            } else {
                repeated.push_back(next);
            }
        }
        repeated.append(queue);
        *queue = repeated;
        if batch.is_empty() {
            waiting.remove(book);
            return None;
        }
        Some(batch)
    }

    /// The answers to a batch. If it fails for another reason than a lost database, each order is tried alone, as long as
    /// there is time: one of them may be at fault.
    async fn settle(&self, book: &Book, batch: &[Submission]) -> Vec<Result<Settled, ApiError>> {
        let error = match self.settle_together(book, batch, Instant::now() + PATIENCE).await {
            Ok(settled) => return settled.into_iter().map(Ok).collect(),
            Err(error) => error,
        };
        // Each request's own trace tells what has become of it.
        let failed =
            |submission: &Submission, error: &sqlx::Error| submission.trace.within(|| ApiError::from(error));
        if batch.len() == 1 || db::is_unavailable(&error) {
            return batch
                .iter()
                .map(|submission| Err(failed(submission, &error)))
                .collect();
        }
        let mut results = Vec::with_capacity(batch.len());
        let until = Instant::now() + PATIENCE;
        let mut locked = HashSet::new();
        for submission in batch {
            let accounts = [submission.base_account_id, submission.quote_account_id];
            if Instant::now() >= until || accounts.iter().any(|account| locked.contains(account)) {
                results.push(Err(ApiError::from(UNAVAILABLE).retry_after(COME_AGAIN)));
                continue;
            }
            let only = std::slice::from_ref(submission);
            let alone = self
                .settle_together(book, only, Instant::now() + PATIENCE_ALONE)
                .await;
            if alone.as_ref().is_err_and(db::is_lock_timeout) {
                locked.extend(accounts);
            }
            let alone = alone.and_then(|settled| settled.into_iter().next().ok_or(sqlx::Error::RowNotFound));
            results.push(alone.map_err(|error| failed(submission, &error)));
        }
        results
    }

    async fn settle_together(
        &self,
        book: &Book,
        batch: &[Submission],
        until: Instant,
    ) -> Result<Vec<Settled>, sqlx::Error> {
        let mut attempt = 1;
        loop {
            let called = timeout(CALL, self.call(book, batch)).await;
            match called.unwrap_or_else(|late| Err(sqlx::Error::Io(late.into()))) {
                // A client order id was used at this moment in another book; next time it is found there.
                Err(error)
                    if attempt < ATTEMPTS
                        && (is_duplicate(&error) || (db::is_retryable(&error) && Instant::now() < until)) =>
                {
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    async fn call(&self, (lane, product): &Book, batch: &[Submission]) -> Result<Vec<Settled>, sqlx::Error> {
        let column = |value: fn(&Submission) -> Uuid| batch.iter().map(value).collect::<Vec<_>>();
        sqlx::query_as(
            "select outcome, field, order_id, status, reason, taken, created_at, trade_ids, trade_prices, trade_sizes,
                    trade_fees
             from submit_orders_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        )
        .bind(lane)
        .bind(product)
        .bind(column(|order| order.id))
        .bind(column(|order| order.user_id))
        .bind(batch.iter().map(|order| order.client_order_id.as_str()).collect::<Vec<_>>())
        .bind(batch.iter().map(|order| order.side.as_str()).collect::<Vec<_>>())
        .bind(batch.iter().map(|order| order.price).collect::<Vec<_>>())
        .bind(batch.iter().map(|order| order.size).collect::<Vec<_>>())
        .bind(batch.iter().map(|order| order.time_in_force.as_str()).collect::<Vec<_>>())
        .bind(column(|order| order.base_account_id))
        .bind(column(|order| order.quote_account_id))
        .bind(batch.iter().map(|order| order.trace.headers()).collect::<Vec<_>>())
        .fetch_all(&self.db)
        .await
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Book, VecDeque<Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_duplicate(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::{counter::Counter, family::Family, histogram::Histogram};
    use sqlx::postgres::PgPoolOptions;

    use super::*;

    fn order(user_id: Uuid) -> Submission {
        Submission {
            id: Uuid::now_v7(),
            user_id,
            client_order_id: Uuid::now_v7().to_string(),
            side: Side::Buy,
            price: None,
            size: "1".parse().unwrap(),
            time_in_force: TimeInForce::Ioc,
            base_account_id: Uuid::now_v7(),
            quote_account_id: Uuid::now_v7(),
            trace: TraceContext::root(),
        }
    }

    #[tokio::test]
    async fn nobody_keeps_a_book_from_the_others() {
        let counters = Counters {
            orders: Family::default(),
            trades: Counter::default(),
            batch_sizes: Histogram::new([1.0]),
        };
        let db = PgPoolOptions::new()
            .connect_lazy("postgres://127.0.0.1:1/none")
            .unwrap();
        let books = Books::new(db, counters);
        let book = (Lane::live(), "BTC-USD".to_owned());
        // Somebody is at work on it, and does not come to the end of it.
        books.lock().insert(book.clone(), VecDeque::new());
        let place = |user| books.queue(book.clone(), order(user)).map_err(|it| it.problem);
        let ann = Uuid::now_v7();
        for _ in 0..MOST_WAITING_OF_ONE {
            place(ann).unwrap();
        }
        assert_eq!(place(ann).unwrap_err(), TOO_MANY_REQUESTS);
        for _ in MOST_WAITING_OF_ONE..MOST_WAITING {
            place(Uuid::now_v7()).unwrap();
        }
        assert_eq!(place(Uuid::now_v7()).unwrap_err(), UNAVAILABLE);
    }
}
