-- What users are told, and what surrounds the consumers of the queue.

-- The number of a user's newest notification. Its row lock makes the numbers visible in their order, so that a reader who has
-- seen number 7 never meets a 6 afterwards: the number is the cursor of pages and of the event stream.
create table notification_counters (
    user_id  uuid primary key,
    lane     text not null,
    last_seq bigint not null,
    -- When the hour began that is being counted, and after which number: the first ones of it are also sent by e-mail.
    hour_began_at    timestamptz,
    hour_began_after bigint not null default 0
);
create index notification_counters_of_test_lane on notification_counters (lane) where lane <> 'live';

create table notifications (
    user_id    uuid not null,
    seq        bigint not null,
    lane       text not null,
    -- The event that caused it; null for a release notice.
    event_id   uuid,
    kind       text not null,
    title      text not null,
    data       jsonb not null,
    created_at timestamptz not null default now(),
    read_at    timestamptz,
    primary key (user_id, seq)
);
-- Once per event, whatever the inbox says.
create unique index notifications_once on notifications (user_id, event_id) where event_id is not null;
create index notifications_of_test_lane on notifications (lane) where lane <> 'live';

-- E-mails that wait to be sent. The address is looked up when it is sent, and never stored here.
create table emails (
    user_id  uuid not null,
    seq      bigint not null,
    attempts integer not null default 0,
    due_at   timestamptz not null default now(),
    primary key (user_id, seq),
    foreign key (user_id, seq) references notifications (user_id, seq) on delete cascade
);
create index emails_due on emails (due_at);

-- Revisions that were live, each announced to all users once. The announcement goes through the users in the order of their ids;
-- `announced_to` is how far it has come.
create table releases (
    revision     text primary key,
    version      text not null,
    live_at      timestamptz not null default now(),
    announced_to uuid,
    announced_at timestamptz
);
create index releases_unannounced on releases (live_at) where announced_at is null;

-- How often something has been applied to the live lane's market data. The same number is written to their store before the
-- commit: a store that knows of fewer has lost something since.
create table market_data (
    applied bigint not null
);
create unique index market_data_one_row on market_data ((true));
insert into market_data values (0);
grant select, update on market_data to exchange_app;

-- Messages that a consumer could not handle, for a person to look at.
create table dead_letters (
    consumer   text not null,
    event_id   uuid not null,
    lane       text not null,
    topic      text not null,
    payload    jsonb not null,
    reason     text not null,
    created_at timestamptz not null default now(),
    primary key (consumer, event_id)
);
create index dead_letters_of_test_lane on dead_letters (lane) where lane <> 'live';
create index dead_letters_of_user on dead_letters ((payload ->> 'user_id'));

-- The relay's queue, in the order in which events were written, and the sweep for what is published and not done.
create index outbox_unpublished on outbox (id) where published_at is null and done_at is null;
create index outbox_published on outbox (published_at) where published_at is not null and done_at is null;
create index outbox_done on outbox (done_at) where done_at is not null;

-- What market data are made of: a minute's trades again and again, and a product's newest. A BRIN index would cost their writers
-- nothing, but the newest trades, which are asked for, are in ranges that it does not know until a vacuum: those are read whole,
-- whichever products are in them. This one is written at the end of each product only, and no vacuum is needed for it to be of use.
create index trades_of_market on trades (lane, product, executed_at);

grant select, insert, update, delete on notification_counters, notifications, emails to exchange_app;
grant select, insert, update on releases to exchange_app;
grant select, insert, delete on dead_letters to exchange_app;
grant select, insert, update, delete on outbox, inbox to exchange_app;

insert into lane_tables (table_name, position) values
    ('notifications', 100),
    ('notification_counters', 110),
    ('dead_letters', 120);

insert into user_data (topic, position, export, erase) values
    (
        'notifications', 100,
        'select jsonb_build_object(''id'', seq, ''kind'', kind, ''title'', title, ''data'', data,
             ''created_at'', created_at, ''read_at'', read_at)
         from notifications where user_id = $1 order by seq',
        'delete from notifications where user_id = $1'
    ),
    (
        'emails', 99,
        'select jsonb_build_object(''notification'', seq, ''attempts'', attempts, ''due_at'', due_at) from emails where user_id = $1 order by seq',
        'delete from emails where user_id = $1'
    ),
    (
        'notification_counters', 101,
        'select jsonb_build_object(''notifications'', last_seq, ''hour_began_at'', hour_began_at,
             ''hour_began_after'', hour_began_after) from notification_counters where user_id = $1',
        'delete from notification_counters where user_id = $1'
    ),
    (
        'dead letters', 120,
        -- Of a trade without the other side.
        'select jsonb_build_object(''topic'', topic, ''payload'',
                    payload - case when payload #>> ''{buyer,user_id}'' = $1::text then ''seller'' else ''buyer'' end,
                    ''reason'', reason, ''created_at'', created_at)
         from dead_letters where $1::text in
             (payload ->> ''user_id'', payload #>> ''{buyer,user_id}'', payload #>> ''{seller,user_id}'') order by created_at',
        'delete from dead_letters where payload ->> ''user_id'' = $1::text'
    );

update user_data set portion =
    'delete from notifications where user_id = $1 and seq in (
         select seq from notifications where user_id = $1 order by seq limit 5000)'
where topic = 'notifications';
