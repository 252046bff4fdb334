-- Orders and trades, and what surrounds every write of the services: outbox, inbox and idempotency keys.

create sequence order_arrivals as bigint;

-- Every writer of a book's orders holds that book's lock (see `lock_book_v1`), so `arrival` is the order in time.
create table orders (
    id               uuid primary key,
    lane             text not null,
    user_id          uuid not null,
    client_order_id  text not null,
    product          text not null references products (symbol),
    side             text not null,
    -- Null: a market order.
    price            numeric(38,18),
    size             numeric(38,18) not null,
    time_in_force    text not null,
    base_account_id  uuid not null,
    quote_account_id uuid not null,
    maker_fee_rate   numeric(9,6) not null,
    -- What traded when the order arrived, and in which trades: with these the first answer can be given again.
    taken            numeric(38,18) not null,
    taken_trades     bigint[] not null,
    taken_reason     text,
    remaining        numeric(38,18) not null,
    status           text not null,
    arrival          bigint not null default nextval('order_arrivals'),
    -- The price, negative for a buy: ascending is best first on both sides of the book.
    rank             numeric(38,18),
    created_at       timestamptz not null,
    closed_at        timestamptz,
    unique (user_id, client_order_id),
    -- One expression: each is parsed anew by every statement.
    check (side in ('buy', 'sell') and time_in_force in ('gtc', 'ioc') and status in ('open', 'filled', 'cancelled')
           and price > 0 and size > 0 and taken >= 0 and remaining >= 0 and taken + remaining <= size
           and (status = 'filled') = (remaining = 0) and rank = case side when 'sell' then price else -price end),
    check (status <> 'open' or (price is not null and time_in_force = 'gtc'))
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
create index orders_book on orders (lane, product, side, rank, arrival) where status = 'open';
create index orders_of_test_lane on orders (lane) where lane <> 'live';
create index orders_open_of_user on orders (user_id, product) where status = 'open';

-- An open order will move money in both of its accounts, whatever is in them now. The row is locked, and whoever places or
-- fills an order has locked it too, so no order can come in between.
create function accounts_of_open_orders_stay_v1() returns trigger language plpgsql as $$
begin
    if exists (select from orders
                where user_id = new.user_id and status = 'open' and new.id in (base_account_id, quote_account_id)) then
        raise exception 'an open order names the account %', new.id using errcode = 'restrict_violation';
    end if;
    return new;
end $$;
create trigger accounts_of_open_orders_stay before update of deleted_at on accounts
    for each row when (old.deleted_at is null and new.deleted_at is not null)
    execute function accounts_of_open_orders_stay_v1();

create table trades (
    id             bigint primary key references transfers (id),
    lane           text not null,
    product        text not null,
    price          numeric(38,18) not null,
    size           numeric(38,18) not null,
    executed_at    timestamptz not null,
    taker_side     text not null,
    taker_user_id  uuid not null,
    taker_order_id uuid not null,
    taker_fee      numeric(38,18) not null,
    maker_user_id  uuid not null,
    maker_order_id uuid not null,
    maker_fee      numeric(38,18) not null,
    check (price > 0 and size > 0 and taker_side in ('buy', 'sell') and taker_fee >= 0 and maker_fee >= 0
           and taker_user_id <> maker_user_id)
);
create index trades_of_test_lane on trades (lane) where lane <> 'live';
create trigger trades_append_only before update or delete on trades
    for each row execute function ledger_is_append_only_v1();
create trigger trades_no_truncate before truncate on trades
    for each statement execute function ledger_is_append_only_v1();

-- Events, written in the transaction of what they tell. Done when the consumer's inbox row exists.
create table outbox (
    id           uuid primary key,
    lane         text not null,
    topic        text not null,
    key          text not null,
    payload      jsonb not null,
    headers      jsonb not null default '{}',
    created_at   timestamptz not null default now(),
    published_at timestamptz,
    done_at      timestamptz
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);
create index outbox_open on outbox (created_at) where done_at is null;
create index outbox_of_test_lane on outbox (lane) where lane <> 'live';
-- What is about one user alone has the user's id as its key.
create index outbox_of_user on outbox (key) where topic <> 'trade.executed';

create table inbox (
    consumer text not null,
    event_id uuid not null,
    lane     text not null,
    primary key (consumer, event_id)
);
create index inbox_of_test_lane on inbox (lane) where lane <> 'live';

-- Answers to requests that moved value, so that a repeated request gets the first answer. Orders need no row here: an order
-- is found by its client_order_id.
create table idempotency_keys (
    user_id      uuid not null,
    key          text not null check (char_length(key) between 1 and 128),
    lane         text not null,
    request_hash bytea not null,
    answer       jsonb,
    created_at   timestamptz not null default now(),
    primary key (user_id, key)
);
create index idempotency_keys_by_age on idempotency_keys (created_at);
create index idempotency_keys_of_test_lane on idempotency_keys (lane) where lane <> 'live';
