-- The double-entry ledger: currencies, products, accounts, transfers and entries.
--
-- An amount of money is a multiple of its currency's smallest unit, 10^-scale. Products are declared so that price × size is
-- such a multiple too (see the checks on `products`), so nothing but a fee is ever rounded.

create table currencies (
    symbol text primary key check (symbol ~ '^[A-Z0-9]{2,10}$'),
    kind   text not null check (kind in ('fiat', 'crypto')),
    scale  smallint not null check (scale between 0 and 9),
    unique (symbol, scale)
);

create table products (
    symbol          text primary key check (symbol = base || '-' || quote),
    base            text not null,
    base_scale      smallint not null,
    quote           text not null,
    quote_scale     smallint not null,
    size_increment  numeric(38,18) not null check (size_increment > 0 and min_scale(size_increment) <= base_scale),
    price_increment numeric(38,18) not null check (price_increment > 0),
    min_size        numeric(38,18) not null check (min_size > 0 and min_size % size_increment = 0),
    maker_fee_rate  numeric(9,6) not null check (maker_fee_rate >= 0),
    taker_fee_rate  numeric(9,6) not null check (taker_fee_rate between maker_fee_rate and 0.1),
    status          text not null default 'trading' check (status in ('trading', 'halted')),
    check (base <> quote),
    -- Price × size needs no rounding.
    check (min_scale(size_increment) + min_scale(price_increment) <= quote_scale),
    foreign key (base, base_scale) references currencies (symbol, scale),
    foreign key (quote, quote_scale) references currencies (symbol, scale)
);

-- Accounts of users, and two kinds that belong to the exchange, one of each per lane and currency: `external`, the other side
-- of deposits and withdrawals, and `fee`. Only users' accounts carry a balance in the row. Those of the exchange take part in
-- nearly every transfer: a balance in the row would make all trades of a currency wait for each other. Theirs is the sum of
-- their entries.
create table accounts (
    id         uuid primary key,
    lane       text not null,
    kind       text not null default 'user' check (kind in ('user', 'external', 'fee')),
    user_id    uuid check ((kind = 'user') = (user_id is not null)),
    currency   text not null references currencies (symbol),
    name       text not null check (char_length(name) between 1 and 64),
    state      text not null default 'active' check (state in ('active', 'frozen')),
    balance    numeric(38,18) not null default 0,
    hold       numeric(38,18) not null default 0,
    version    bigint not null default 0,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    check (hold >= 0 and balance >= hold and balance < 1e18
           and ((kind = 'user' and deleted_at is null) or (balance = 0 and hold = 0)))
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

-- A deleted account leaves its name free. The index also serves "the accounts of a user".
create unique index accounts_of_user on accounts (user_id, currency, name) where deleted_at is null and kind = 'user';
create unique index accounts_of_exchange on accounts (lane, currency, kind) where kind <> 'user';
create index accounts_of_test_lane on accounts (lane) where lane <> 'live';

create sequence transfer_ids as bigint;

-- A transfer is one movement of money between accounts; a trade is the transfer with the same id.
create table transfers (
    id         bigint primary key,
    lane       text not null,
    kind       text not null check (kind in ('deposit', 'withdrawal', 'trade')),
    created_at timestamptz not null
);
create index transfers_of_test_lane on transfers (lane) where lane <> 'live';

-- What people call a transfer. Not in the ledger, which keeps everything: it goes with the user whose account it is about.
create table transfer_references (
    transfer_id bigint primary key references transfers,
    lane        text not null,
    user_id     uuid not null,
    reference   text not null
);
create index transfer_references_of_user on transfer_references (user_id);
create index transfer_references_of_test_lane on transfer_references (lane) where lane <> 'live';

-- What a transfer does to one account. The primary key is also the account's statement, in order.
create table entries (
    account_id  uuid not null,
    transfer_id bigint not null,
    line        smallint not null,
    lane        text not null,
    currency    text not null,
    kind        text not null check (kind in ('transfer', 'trade', 'fee')),
    amount      numeric(38,18) not null check (amount <> 0),
    primary key (account_id, transfer_id, line)
);
create index entries_of_test_lane on entries (lane) where lane <> 'live';

-- Entries are written in statements that balance: whatever a statement adds to a transfer sums to zero in each currency, so
-- every transfer always does. The same look-up stands in for foreign keys, which would lock the fee account's row in each trade;
-- accounts and transfers are never deleted before their entries. Plans made while the tables are small must not be scans.
create function entries_must_balance_v1() returns trigger language plpgsql set enable_seqscan = off as $$
begin
    if exists (select from added group by transfer_id, currency having sum(amount) <> 0) then
        raise exception 'the entries of a transfer must sum to zero in each currency' using errcode = 'check_violation';
    end if;
    if exists (
        select from added e
        where not exists (select from accounts a where a.id = e.account_id and a.currency = e.currency and a.lane = e.lane)
           or not exists (select from transfers t where t.id = e.transfer_id and t.lane = e.lane)
    ) then
        raise exception 'an entry needs a transfer, and an account, of its lane and currency'
            using errcode = 'foreign_key_violation';
    end if;
    return null;
end $$;
create trigger entries_must_balance after insert on entries
    referencing new table as added for each statement execute function entries_must_balance_v1();

-- The ledger is append-only for everybody, its owner included. Only a test lane can be erased.
create function ledger_is_append_only_v1() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' and old.lane <> 'live' then
        return old;
    end if;
    raise exception '% of % refused: the ledger is append-only', tg_op, tg_table_name using errcode = 'insufficient_privilege';
end $$;
create trigger entries_append_only before update or delete on entries
    for each row execute function ledger_is_append_only_v1();
create trigger entries_no_truncate before truncate on entries
    for each statement execute function ledger_is_append_only_v1();
create trigger transfers_append_only before update or delete on transfers
    for each row execute function ledger_is_append_only_v1();
create trigger transfers_no_truncate before truncate on transfers
    for each statement execute function ledger_is_append_only_v1();

insert into currencies (symbol, kind, scale) values
    ('USD', 'fiat', 8), ('EUR', 'fiat', 8), ('BTC', 'crypto', 8), ('ETH', 'crypto', 9), ('SOL', 'crypto', 9);
insert into products (symbol, base, base_scale, quote, quote_scale, size_increment, price_increment, min_size,
                      maker_fee_rate, taker_fee_rate) values
    ('BTC-USD', 'BTC', 8, 'USD', 8, 0.000001, 0.01, 0.00001, 0.0010, 0.0020),
    ('BTC-EUR', 'BTC', 8, 'EUR', 8, 0.000001, 0.01, 0.00001, 0.0010, 0.0020),
    ('ETH-USD', 'ETH', 9, 'USD', 8, 0.00001, 0.01, 0.0001, 0.0010, 0.0020),
    ('ETH-BTC', 'ETH', 9, 'BTC', 8, 0.001, 0.00001, 0.001, 0.0010, 0.0020),
    ('SOL-USD', 'SOL', 9, 'USD', 8, 0.001, 0.001, 0.001, 0.0010, 0.0020);
