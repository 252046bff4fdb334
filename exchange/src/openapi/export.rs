//! What `/user/export` answers. The topics and their rows are made by queries that migrations have registered in the
//! table `user_data`; a test compares this description with them.

use utoipa::openapi::{
    Schema, SchemaFormat,
    schema::{ArrayBuilder, KnownFormat, ObjectBuilder, SchemaType, Type},
};

use crate::release::Release;

/// What a field holds.
#[derive(Clone, Copy)]
enum Field {
    Text,
    Id,
    Time,
    Number,
    Texts,
    Object,
}

use Field::{Id, Number, Object, Text, Texts, Time};

/// A topic: its name, what it is about, and name and kind of each field of a row; a `?` follows the name of what may be
/// null.
type Topic = (&'static str, &'static str, &'static [(&'static str, Field)]);

const TOPICS: &[Topic] = &[
    (
        "profile",
        "Who the caller is: one row.",
        &[
            ("id", Id),
            ("email", Text),
            ("display_name?", Text),
            ("locale", Text),
            ("scopes", Texts),
            ("created_at", Time),
            ("updated_at", Time),
        ],
    ),
    (
        "sessions",
        "Sessions, also those that have ended.",
        &[
            ("id", Id),
            ("created_at", Time),
            ("expires_at", Time),
            ("revoked_at?", Time),
        ],
    ),
    (
        "refresh tokens",
        "When the refresh tokens of the sessions were issued and used.",
        &[("session_id", Id), ("created_at", Time), ("used_at?", Time)],
    ),
    (
        "accounts",
        "Accounts, also deleted ones.",
        &[
            ("id", Id),
            ("currency", Text),
            ("name", Text),
            ("state", Text),
            ("balance", Text),
            ("hold", Text),
            ("created_at", Time),
            ("updated_at", Time),
            ("deleted_at?", Time),
        ],
    ),
    (
        "orders",
        "Orders, whatever has become of them. A market order has no price. `taken` was traded when the order arrived, in \
         `taken_trades`; `taken_reason` is why it went no further.",
        &[
            ("id", Id),
            ("client_order_id", Text),
            ("product", Text),
            ("type", Text),
            ("price?", Text),
            ("size", Text),
            ("remaining", Text),
            ("time_in_force", Text),
            ("status", Text),
            ("base_account_id", Id),
            ("quote_account_id", Id),
            ("maker_fee_rate", Text),
            ("taken", Text),
            ("taken_trades", Texts),
            ("taken_reason?", Text),
            ("created_at", Time),
            ("closed_at?", Time),
        ],
    ),
    (
        "entries",
        "The entries of the ledger in the caller's accounts. `transfer` is what they are part of: `deposit`, `withdrawal` \
         or `trade`.",
        &[
            ("transfer_id", Text),
            ("account_id", Id),
            ("currency", Text),
            ("kind", Text),
            ("amount", Text),
            ("transfer", Text),
            ("created_at", Time),
        ],
    ),
    (
        "transfer references",
        "What deposits and withdrawals were called.",
        &[("transfer_id", Text), ("reference", Text)],
    ),
    (
        "trades",
        "Trades, as the caller took part in them.",
        &[
            ("trade_id", Text),
            ("product", Text),
            ("type", Text),
            ("role", Text),
            ("price", Text),
            ("size", Text),
            ("fee", Text),
            ("order_id", Id),
            ("executed_at", Time),
        ],
    ),
    (
        "idempotency keys",
        "The keys of deposits and withdrawals of the last 30 days, with what was answered.",
        &[("key", Text), ("answer?", Object), ("created_at", Time)],
    ),
    (
        "events",
        "What was told to other services about the caller in the last hour or so. `headers` are those of the caller's own \
         request, for tracing; a deposit is none.",
        &[
            ("topic", Text),
            ("payload", Object),
            ("headers?", Object),
            ("created_at", Time),
        ],
    ),
    (
        "trade events",
        "The same of trades, without the other side.",
        &[
            ("topic", Text),
            ("payload", Object),
            ("headers?", Object),
            ("created_at", Time),
        ],
    ),
    (
        "dead letters",
        "What another service could not handle of it, and why.",
        &[
            ("topic", Text),
            ("payload", Object),
            ("reason", Text),
            ("created_at", Time),
        ],
    ),
    (
        "notifications",
        "What the caller was told.",
        &[
            ("id", Number),
            ("kind", Text),
            ("title", Text),
            ("data", Object),
            ("created_at", Time),
            ("read_at?", Time),
        ],
    ),
    (
        "notification_counters",
        "The number of the newest notification, and after which one the hour began in which e-mails are counted.",
        &[
            ("notifications", Number),
            ("hour_began_at?", Time),
            ("hour_began_after", Number),
        ],
    ),
    (
        "emails",
        "E-mails that wait to be sent: the number of the notification that each is about.",
        &[("notification", Number), ("attempts", Number), ("due_at", Time)],
    ),
];

/// What version 2 adds.
const FREEZES: Topic = (
    "freezes",
    "When accounts were frozen.",
    &[("account_id", Id), ("frozen_at", Time), ("lifted_at?", Time)],
);

/// The answer's schema: an array of rows for each topic.
pub(super) fn schema(release: Release) -> Schema {
    let topics = TOPICS.iter().chain(release.has_freezes.then_some(&FREEZES));
    let topics = topics.fold(ObjectBuilder::new(), |topics, (name, meaning, fields)| {
        let rows = ArrayBuilder::new().items(row(fields)).description(Some(*meaning));
        topics.property(*name, rows).required(*name)
    });
    topics
        .description(Some(
            "Everything that is stored about the caller: for each topic its rows. A newer schema may have more topics.",
        ))
        .into()
}

fn row(fields: &[(&str, Field)]) -> ObjectBuilder {
    fields.iter().fold(ObjectBuilder::new(), |row, (name, field)| {
        let (name, nullable) = match name.strip_suffix('?') {
            Some(name) => (name, true),
            None => (*name, false),
        };
        row.property(name, value(*field, nullable)).required(name)
    })
}

fn value(field: Field, nullable: bool) -> Schema {
    let of = |kind: Type| {
        if nullable {
            SchemaType::from_iter([kind, Type::Null])
        } else {
            SchemaType::new(kind)
        }
    };
    let text = |format| ObjectBuilder::new().schema_type(of(Type::String)).format(format);
    match field {
        Text => text(None).into(),
        Id => text(Some(SchemaFormat::KnownFormat(KnownFormat::Uuid))).into(),
        Time => text(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime))).into(),
        Number => ObjectBuilder::new().schema_type(of(Type::Integer)).into(),
        Object => ObjectBuilder::new().schema_type(of(Type::Object)).into(),
        Texts => ArrayBuilder::new()
            .items(ObjectBuilder::new().schema_type(Type::String))
            .into(),
    }
}
