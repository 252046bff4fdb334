//! Migrations: what is applied once stays, what is killed goes on, and services know what they can work with.

use std::time::Duration;

use exchange::{
    migrate::{Phase, bring_forward, read_state},
    release,
};
use sqlx::{
    Connection, PgConnection, PgPool, SqlSafeStr,
    migrate::{Migration, MigrationType},
    postgres::PgConnectOptions,
};
use tokio::time::Instant;

use crate::{
    servers::{Database, Postgres, Service, V1, V2, eventually, waits_for_lock},
    whole::SECRET,
};

/// Of access tokens, for housekeeping.
const TOKEN_LIFETIME: Duration = Duration::from_mins(5);

async fn empty() -> Database {
    Postgres::shared().database().await
}

fn file(number: i64, sql: &'static str) -> Migration {
    Migration::new(
        number,
        "test".into(),
        MigrationType::Simple,
        sql.into_sql_str(),
        false,
    )
}

fn soon() -> Instant {
    Instant::now() + Duration::from_mins(1)
}

/// A connection with the lock timeout of a migration.
async fn migrator(database: &Database) -> PgConnection {
    let mut connection = PgConnection::connect(&database.owner_url).await.unwrap();
    sqlx::query("set lock_timeout = '250ms'")
        .execute(&mut connection)
        .await
        .unwrap();
    connection
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_changes_nothing() {
    let database = empty().await;
    let (succeeded, first) = database.migrate("expand", &[]);
    assert!(
        succeeded && first.contains("expand 0001 (users): batch 1 of 1 done"),
        "{first}"
    );
    let state = read_state(&database.owner().await).await.unwrap();
    let (succeeded, second) = database.migrate("expand", &[]);
    assert!(succeeded && !second.contains("batch"), "{second}");
    assert_eq!(read_state(&database.owner().await).await.unwrap(), state);
    assert_eq!((state.expanded, state.oldest_reader), (release::V1.level, 0));
    let (succeeded, contract) = database.migrate("contract", &[]);
    assert!(succeeded, "{contract}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runs_at_once_do_not_get_in_each_others_way() {
    let database = empty().await;
    let runs = [0; 4].map(|_| {
        let database = database.clone();
        tokio::task::spawn_blocking(move || database.migrate("expand", &[]))
    });
    for run in runs {
        let (succeeded, output) = run.await.unwrap();
        assert!(succeeded, "{output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_hangs_is_waited_for_until_the_deadline() {
    let database = empty().await;
    let mut other = PgConnection::connect(&database.owner_url).await.unwrap();
    sqlx::query("select pg_advisory_lock(7311703294998374245)")
        .execute(&mut other)
        .await
        .unwrap();
    let (succeeded, output) = database.migrate("expand", &["--deadline=1s"]);
    assert!(
        !succeeded && output.contains("another migration is running"),
        "{output}"
    );
    other.close().await.unwrap();
    let (succeeded, output) = database.migrate("expand", &["--deadline=20s"]);
    assert!(succeeded, "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_database_and_a_small_one_are_refused() {
    let database = empty().await;
    assert!(database.migrate("expand", &[]).0);
    let identity = read_state(&database.owner().await)
        .await
        .unwrap()
        .identity
        .to_string();
    let (succeeded, output) = database.migrate("expand", &["--expect-database", &identity]);
    assert!(succeeded, "{output}");
    let (succeeded, output) = database.migrate(
        "expand",
        &["--expect-database", "01890000-0000-7000-8000-000000000000"],
    );
    assert!(!succeeded && output.contains(&identity), "{output}");
    let (succeeded, output) = database.migrate("expand", &["--connections-per-stack=140"]);
    assert!(succeeded, "{output}");
    let (succeeded, output) = database.migrate("expand", &["--connections-per-stack=150"]);
    assert!(
        !succeeded && output.contains("two stacks need 300 connections"),
        "{output}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_applied_file_that_was_edited_is_refused_and_a_newer_one_is_ignored() {
    let database = empty().await;
    assert!(database.migrate("expand", &[]).0);
    let owner = database.owner().await;
    let newer = "insert into migrations (phase, number, name, checksum, batches_done) values ('expand', 9999, 'newer', '', 1)";
    sqlx::query(newer).execute(&owner).await.unwrap();
    let (succeeded, output) = database.migrate("expand", &[]);
    assert!(succeeded, "{output}");
    sqlx::query("update migrations set checksum = 'edited' where number = 1")
        .execute(&owner)
        .await
        .unwrap();
    let (succeeded, output) = database.migrate("expand", &[]);
    assert!(
        !succeeded && output.contains("expand 1 has been edited"),
        "{output}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_ready_between_its_own_expand_and_the_contract_that_leaves_it_behind() {
    // The server has the services' role since the first expand on it, of another database.
    Database::migrated(Postgres::shared()).await;
    let database = empty().await;
    let service = Service::live("user", &database, &[]);
    let not_ready = service.admin("/readyz").await;
    assert_eq!(not_ready.status(), 503);
    assert!(database.migrate("expand", &[]).0);
    let service = service.ready().await;
    let owner = database.owner().await;
    sqlx::query("update schema_state set expanded = 9999")
        .execute(&owner)
        .await
        .unwrap();
    Service::live("user", &database, &[]).ready().await;
    sqlx::query("update schema_state set oldest_reader = 9999")
        .execute(&owner)
        .await
        .unwrap();
    let newcomer = Service::live("user", &database, &[]);
    for service in [&newcomer, &service] {
        eventually("it knows that it is too old", || async {
            let response = service.admin("/readyz").await;
            (response.status() == 503 && response.text().await.unwrap().contains("contracted for 9999"))
                .then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_contract_waits_for_older_instances() {
    let database = Database::migrated(Postgres::shared()).await;
    let mut connection = migrator(&database).await;
    let level = release::V1.level + 1;
    let expand = [file(level, "create table newer ()")];
    let contract = [file(level, "create table contracted ()")];
    let mut service = Service::live("user", &database, &[]).ready().await;

    let early = bring_forward(&mut connection, Phase::Contract, &contract, soon())
        .await
        .unwrap_err();
    assert!(
        early.to_string().contains(&format!("needs expand {level}")),
        "{early}"
    );
    bring_forward(&mut connection, Phase::Expand, &expand, soon())
        .await
        .unwrap();
    let impatient = Instant::now() + Duration::from_secs(1);
    let refused = bring_forward(&mut connection, Phase::Contract, &contract, impatient)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("user of blue-local"), "{refused}");

    service.client = crate::servers::client();
    service.signal("TERM");
    bring_forward(&mut connection, Phase::Contract, &contract, soon())
        .await
        .unwrap();
    service.logged("terminating", 1).await;
    let state = read_state(&mut connection).await.unwrap();
    assert_eq!((state.expanded, state.oldest_reader), (level, level));
}

const BACKFILL: &str = "create table copy (id integer primary key, doubled integer);
-- batch outside transaction
create index concurrently if not exists copy_doubled on copy (doubled);
-- batch repeat
insert into copy (id, doubled)
select id, id * 2 from original where not exists (select from copy where copy.id = original.id) limit 100;
-- batch
alter table original add column backfilled boolean;";

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_migration_goes_on_where_it_stopped_and_waits_for_no_lock_for_long() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    sqlx::raw_sql("create table original (id integer primary key); insert into original select generate_series(1, 1000)")
        .execute(&owner)
        .await
        .unwrap();
    let level = release::V1.level + 1;
    let batches_done = || {
        let query =
            sqlx::query_scalar::<_, i32>("select batches_done from migrations where number = $1").bind(level);
        async { query.fetch_optional(&owner).await.unwrap() }
    };
    // A reader with a long transaction: the last batch cannot have its lock, and must not make others queue behind it.
    let mut reader = owner.begin().await.unwrap();
    sqlx::query("select count(*) from original")
        .execute(&mut *reader)
        .await
        .unwrap();

    let mut connection = migrator(&database).await;
    let killed = tokio::spawn(async move {
        bring_forward(&mut connection, Phase::Expand, &[file(level, BACKFILL)], soon()).await
    });
    eventually("three batches are done", || async {
        (batches_done().await == Some(3)).then_some(())
    })
    .await;
    let mut slowest = Duration::ZERO;
    for _ in 0..40 {
        let start = Instant::now();
        sqlx::query("select count(*) from original")
            .execute(&owner)
            .await
            .unwrap();
        slowest = slowest.max(start.elapsed());
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    // Behind a lock that waits, it would be as long as the reader takes: for ever.
    assert!(
        slowest < Duration::from_secs(15),
        "a query waited {slowest:?} behind the migration"
    );
    killed.abort();
    assert!(killed.await.unwrap_err().is_cancelled());
    assert_eq!(read_state(&owner).await.unwrap().expanded, level - 1);

    reader.rollback().await.unwrap();
    let mut connection = migrator(&database).await;
    bring_forward(&mut connection, Phase::Expand, &[file(level, BACKFILL)], soon())
        .await
        .unwrap();
    assert_eq!(batches_done().await, Some(4));
    assert_eq!(read_state(&owner).await.unwrap().expanded, level);
    let (rows, sum): (i64, i64) = sqlx::query_as("select count(*), sum(doubled) from copy")
        .fetch_one(&owner)
        .await
        .unwrap();
    assert_eq!((rows, sum), (1000, 1_001_000));
}

/// It tells how far it has come, and counts what it had done before it had to wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_backfill_that_waits_for_a_lock_counts_right() {
    let database = Database::migrated_by(V1, Postgres::shared()).await;
    let owner = database.owner().await;
    sqlx::raw_sql(
        "insert into accounts (id, lane, user_id, currency, name, state)
         select gen_random_uuid(), 'live', gen_random_uuid(), 'USD', 'main', 'frozen' from generate_series(1, 1200)",
    )
    .execute(&owner)
    .await
    .unwrap();
    // One of the second portion.
    let mut busy = owner.begin().await.unwrap();
    sqlx::query(
        "select from accounts where id = (select id from accounts order by id offset 700 limit 1) for update",
    )
    .execute(&mut *busy)
    .await
    .unwrap();
    let expanding = {
        let database = database.clone();
        tokio::task::spawn_blocking(move || database.migrate_by(V2, "expand", &[]))
    };
    for (what, waiting) in [
        ("it waits for the lock", true),
        ("it has waited long enough", false),
    ] {
        eventually(what, || async {
            let waits = waits_for_lock(&owner, "%insert into freezes%").await.unwrap();
            (waits == waiting).then_some(())
        })
        .await;
    }
    busy.rollback().await.unwrap();
    let (succeeded, output) = expanding.await.unwrap();
    assert!(succeeded, "{output}");
    for line in [
        "expand 0020 (freezes): batch 4 of 5 waits for a lock after 500 of about 1200 rows: ",
        "expand 0020 (freezes): batch 4 of 5 done, 1200 rows in ",
    ] {
        assert!(output.contains(line), "{line} is not in\n{output}");
    }
}

/// Tables in which nothing is told about a user. Of who calls too often `rate_limits` has hashes, for a quarter of an hour: those
/// of the user's id and e-mail address go with the user, as a test of `user` sees; those of a client's address say nothing of
/// who came from there, and stay.
const NOT_OF_USERS: [&str; 12] = [
    "currencies",
    "inbox",
    "instances",
    "lane_tables",
    "market_data",
    "migrations",
    "products",
    "rate_limits",
    "releases",
    "schema_state",
    "signing_keys",
    "user_data",
];

/// Columns that a user does not get, and why; beside those that say whose a row is.
const NOT_EXPORTED: &[(&[&str], &[&str], &str)] = &[
    (
        &["users"],
        &["password_hash"],
        "whoever finds it could guess the password",
    ),
    (&["refresh_tokens"], &["hash"], "it stands for the token"),
    (&["users"], &["deleted_at"], "nobody is left to ask then"),
    (&["accounts"], &["version"], "counts the changes of the row"),
    (&["orders"], &["rank"], "the price once more"),
    (
        &["idempotency_keys"],
        &["request_hash"],
        "of a request that the answer tells",
    ),
    (
        &["outbox"],
        &["published_at", "done_at"],
        "how far a message has come",
    ),
    (
        &["dead_letters"],
        &["consumer", "event_id"],
        "where a message got stuck",
    ),
    (&["notifications"], &["event_id"], "which message it came by"),
    (&["trades"], &["maker_user_id"], "the caller, or the other side"),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_table_of_users_can_be_exported_and_every_lane_erased() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    let with_column = |column: &'static str| {
        let query = sqlx::query_scalar::<_, String>(
            "select table_name::text from information_schema.columns
             join information_schema.tables using (table_schema, table_name)
             where table_schema = 'public' and table_type = 'BASE TABLE' and column_name = $1 order by 1",
        );
        query.bind(column).fetch_all(&owner)
    };
    let registered: Vec<String> = sqlx::query_scalar("select table_name from lane_tables order by 1")
        .fetch_all(&owner)
        .await
        .unwrap();
    assert_eq!(with_column("lane").await.unwrap(), registered);
    let service = sqlx::PgPool::connect(&database.app_url).await.unwrap();
    let topics: Vec<(String, Vec<String>)> =
        sqlx::query_as("select export, array_remove(array[erase, portion, obstacle], null) from user_data")
            .fetch_all(&owner)
            .await
            .unwrap();
    // Each statement is one that the services' role may run.
    for (export, others) in &topics {
        for sql in others.iter().chain([export]) {
            let run = sqlx::query(sqlx::AssertSqlSafe(sql.clone())).bind(uuid::Uuid::now_v7());
            run.execute(&service)
                .await
                .unwrap_or_else(|error| panic!("{error}: {sql}"));
        }
    }
    let exports: Vec<Vec<&str>> = topics
        .iter()
        .map(|(export, ..)| export.split(|c: char| !c.is_alphanumeric() && c != '_').collect())
        .collect();
    let columns: Vec<(String, String)> = sqlx::query_as(
        "select table_name::text, column_name::text from information_schema.columns
         join information_schema.tables using (table_schema, table_name)
         where table_schema = 'public' and table_type = 'BASE TABLE' order by 1, 2",
    )
    .fetch_all(&owner)
    .await
    .unwrap();
    let left_out = |table: &str, column: &str| {
        NOT_OF_USERS.contains(&table)
            || NOT_EXPORTED
                .iter()
                .any(|(tables, columns, _)| tables.contains(&table) && columns.contains(&column))
            || ["lane", "user_id"].contains(&column)
    };
    for (table, column) in columns {
        let exported = exports
            .iter()
            .any(|words| words.contains(&table.as_str()) && words.contains(&column.as_str()));
        assert!(
            exported || left_out(&table, &column),
            "{table}.{column} is neither exported nor left out for a reason"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_services_role_cannot_do_what_no_service_does() {
    let database = Database::migrated(Postgres::shared()).await;
    let service = sqlx::PgPool::connect(&database.app_url).await.unwrap();
    let (no_right, not_live) = ("42501", "23514");
    for (forbidden, code) in [
        ("select erase_lane_v1('live')", not_live),
        ("select erase_lane_v1(null)", not_live),
        ("delete from users", no_right),
        ("update users set scopes = '{treasury}'", no_right),
        (
            "insert into users (id, lane, email, password_hash, scopes)
             values (gen_random_uuid(), 'live', 'a@b', 'x', '{treasury}')",
            no_right,
        ),
        ("update user_data set export = 'select 1'", no_right),
        ("insert into lane_tables values ('users', 1)", no_right),
    ] {
        let error = sqlx::query(forbidden).execute(&service).await.unwrap_err();
        assert_eq!(
            error.as_database_error().unwrap().code().unwrap(),
            code,
            "{forbidden}: {error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_live_stack_erases_the_lanes_of_stacks_that_are_gone() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    let now = "now()";
    let long_ago = "now() - interval '1 hour'";
    for (stack, seen) in [
        ("blue-alive", now),
        ("blue-silent", long_ago),
        ("green-gone", long_ago),
    ] {
        let sql = format!("insert into instances values (gen_random_uuid(), 'user', '{stack}', 1, {seen})");
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
            .execute(&owner)
            .await
            .unwrap();
    }
    for lane in [
        "live",
        "test-blue-alive.1",
        "test-blue-silent.1",
        "test-green-gone.1",
        "test-green-never.1",
    ] {
        sqlx::query(
            "insert into users (id, lane, email, password_hash) values (gen_random_uuid(), $1, 'a@b', 'x')",
        )
        .bind(lane)
        .execute(&owner)
        .await
        .unwrap();
    }
    let service = sqlx::PgPool::connect(&database.app_url).await.unwrap();
    let mut housekeeping = exchange::user::Housekeeping::default();
    let left = || sqlx::query_scalar::<_, String>("select lane from users order by 1").fetch_all(&owner);
    housekeeping.clean_up(&service, TOKEN_LIFETIME).await.unwrap();
    assert_eq!(left().await.unwrap().len(), 5, "nobody had time to speak up");
    // There was no database for a while, and nobody could be seen.
    sqlx::query("update instances set seen_at = now() where stack = 'blue-silent'")
        .execute(&owner)
        .await
        .unwrap();
    housekeeping.clean_up(&service, TOKEN_LIFETIME).await.unwrap();
    assert_eq!(
        left().await.unwrap(),
        ["live", "test-blue-alive.1", "test-blue-silent.1"]
    );
}

/// Whoever opened it may have been killed before it could erase it.
#[tokio::test(flavor = "multi_thread")]
async fn the_live_stack_erases_the_test_lanes_that_nobody_uses_any_more() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    sqlx::query("insert into instances values (gen_random_uuid(), 'user', 'blue-alive', 1, now())")
        .execute(&owner)
        .await
        .unwrap();
    // So many minutes ago its user was registered, has logged in, and got the last token, which is valid for five.
    for (lane, registered, logged_in, refreshed) in [
        ("live", 600, Some(600), Some(600)),
        ("test-blue-alive.registered", 600, None, None),
        ("test-blue-alive.used", 600, Some(500), Some(66)),
        ("test-blue-alive.new", 64, None, None),
        ("test-blue-alive.logged-in", 600, Some(64), None),
        ("test-blue-alive.refreshed", 600, Some(500), Some(64)),
    ] {
        sqlx::query(
            "with ago as (
                 select now() - make_interval(mins => $2) as registered, now() - make_interval(mins => $3) as logged_in,
                     now() - make_interval(mins => $4) as refreshed
             ), member as (
                 insert into users (id, lane, email, password_hash, created_at)
                 select gen_random_uuid(), $1, 'a@b', 'x', registered from ago returning id
             ), session as (
                 insert into sessions (id, lane, user_id, created_at, expires_at)
                 select gen_random_uuid(), $1, member.id, logged_in, now() + interval '1 day'
                 from member, ago where logged_in is not null returning id
             )
             insert into refresh_tokens (hash, lane, session_id, created_at)
             select uuid_send(gen_random_uuid()), $1, session.id, refreshed
             from session, ago where refreshed is not null",
        )
        .bind(lane)
        .bind(registered)
        .bind(logged_in)
        .bind(refreshed)
        .execute(&owner)
        .await
        .unwrap();
    }
    let service = PgPool::connect(&database.app_url).await.unwrap();
    let mut housekeeping = exchange::user::Housekeeping::default();
    for _ in 0..2 {
        housekeeping.clean_up(&service, TOKEN_LIFETIME).await.unwrap();
    }
    let left: Vec<String> = sqlx::query_scalar("select lane from users order by 1")
        .fetch_all(&owner)
        .await
        .unwrap();
    assert_eq!(
        left,
        [
            "live",
            "test-blue-alive.logged-in",
            "test-blue-alive.new",
            "test-blue-alive.refreshed"
        ]
    );
}

/// Takes longer than a statement of the services may, and what stands in the way of one lane is none of the others' business.
#[tokio::test(flavor = "multi_thread")]
async fn lanes_are_erased_however_large_they_are() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    sqlx::raw_sql(
        "insert into users (id, lane, email, password_hash)
         select gen_random_uuid(), lane, 'a@b', 'x'
         from unnest(array['test-blue-local.large', 'test-green-gone.large', 'test-green-gone.bad']) as lane;
         create function hold_up() returns trigger language plpgsql as $$
         begin
             if old.lane like '%.bad' then raise exception 'not this one'; end if;
             perform pg_sleep(11);
             return old;
         end $$;
         create trigger hold_up before delete on users for each row execute function hold_up()",
    )
    .execute(&owner)
    .await
    .unwrap();
    let secret = ["--lane-secret", SECRET];
    let service = Service::live("user", &database, &secret).ready().await;
    let request = service.client.delete(service.url("/lane"));
    let request = request
        .header("x-exchange-lane", "test-blue-local.large")
        .header("x-exchange-lane-secret", SECRET);
    assert_eq!(request.send().await.unwrap().status(), 204);
    drop(service);

    let as_services: PgConnectOptions = database.app_url.parse().unwrap();
    let db = PgPool::connect_with(as_services.options([("statement_timeout", "10s")]))
        .await
        .unwrap();
    let mut housekeeping = exchange::user::Housekeeping::default();
    for _ in 0..2 {
        housekeeping.clean_up(&db, TOKEN_LIFETIME).await.unwrap();
    }
    let left: Vec<String> = sqlx::query_scalar("select lane from users")
        .fetch_all(&owner)
        .await
        .unwrap();
    assert_eq!(left, ["test-green-gone.bad"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_expired_is_removed_in_portions() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    // A session has a refresh token for each few minutes of its life.
    sqlx::raw_sql(
        "insert into users (id, lane, email, password_hash) values (gen_random_uuid(), 'live', 'a@b', 'x');
         insert into sessions (id, lane, user_id, expires_at)
         select gen_random_uuid(), 'live', users.id, now() - interval '1 hour' from users, generate_series(1, 6000);
         insert into refresh_tokens (hash, lane, session_id)
         select uuid_send(gen_random_uuid()), 'live', first.id
         from (select id from sessions limit 1) as first, generate_series(1, 12000);
         insert into sessions (id, lane, user_id, expires_at)
         select gen_random_uuid(), 'live', users.id, now() + interval '1 hour' from users;
         insert into rate_limits
         select uuid_send(gen_random_uuid()), 1, now() + interval '1 hour' * sign(1.5 - number)
         from generate_series(1, 6000) as number;
         create function few() returns trigger language plpgsql as
         'begin if (select count(*) > 5000 from gone) then raise exception ''too many at a time''; end if; return null; end';
         create trigger few after delete on sessions
             referencing old table as gone for each statement execute function few();
         create trigger few after delete on refresh_tokens
             referencing old table as gone for each statement execute function few();
         create trigger few after delete on rate_limits
             referencing old table as gone for each statement execute function few()",
    )
    .execute(&owner)
    .await
    .unwrap();
    let service = sqlx::PgPool::connect(&database.app_url).await.unwrap();
    let mut housekeeping = exchange::user::Housekeeping::default();
    housekeeping.clean_up(&service, TOKEN_LIFETIME).await.unwrap();
    let left: (i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from sessions), (select count(*) from refresh_tokens),
             (select count(*) from rate_limits)",
    )
    .fetch_one(&owner)
    .await
    .unwrap();
    assert_eq!(left, (1, 0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_contract_waits_for_instances_that_could_not_be_seen() {
    let database = Database::migrated(Postgres::shared()).await;
    let mut connection = migrator(&database).await;
    let level = release::V1.level + 1;
    let contract = [file(level, "create table contracted ()")];
    let expand = [file(level, "create table newer ()")];
    bring_forward(&mut connection, Phase::Expand, &expand, soon())
        .await
        .unwrap();
    let service = Service::live("user", &database, &[]).ready().await;
    // As after a time without a database.
    let unseen = "update instances set seen_at = now() - interval '1 hour'";
    sqlx::query(unseen).execute(&mut connection).await.unwrap();
    let impatient = Instant::now() + Duration::from_secs(20);
    let refused = bring_forward(&mut connection, Phase::Contract, &contract, impatient)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("user of blue-local"), "{refused}");

    // One that stays silent is gone.
    service.signal("STOP");
    sqlx::query(unseen).execute(&mut connection).await.unwrap();
    let patiently = Instant::now() + Duration::from_mins(2);
    bring_forward(&mut connection, Phase::Contract, &contract, patiently)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_index_is_built_again() {
    let database = Database::migrated(Postgres::shared()).await;
    let owner = database.owner().await;
    sqlx::raw_sql("create table original (id integer)")
        .execute(&owner)
        .await
        .unwrap();
    let level = release::V1.level + 1;
    // Building an index waits for every transaction that might still look at the table without it.
    let mut writer = owner.begin().await.unwrap();
    sqlx::query("insert into original values (1)")
        .execute(&mut *writer)
        .await
        .unwrap();
    let mut connection = migrator(&database).await;
    let sql =
        "-- batch outside transaction\ncreate index concurrently if not exists original_id on original (id)";
    let building = tokio::spawn(async move {
        bring_forward(&mut connection, Phase::Expand, &[file(level, sql)], soon()).await
    });
    let valid = || {
        let query = sqlx::query_scalar::<_, bool>(
            "select indisvalid from pg_index where indexrelid = to_regclass('original_id')",
        );
        query.fetch_optional(&owner)
    };
    let building_now = || {
        sqlx::query_scalar::<_, bool>(
            "select exists (select from pg_stat_activity where state = 'active' and query like 'create index concurrently%'
                 and datname = current_database())",
        )
        .fetch_one(&owner)
    };
    eventually("it has been interrupted", || async {
        let left_behind = valid().await.unwrap() == Some(false) && !building_now().await.unwrap();
        left_behind.then_some(())
    })
    .await;
    writer.commit().await.unwrap();
    building.await.unwrap().unwrap();
    assert_eq!(valid().await.unwrap(), Some(true));
}
