-- Users, their sessions, the keys of access tokens, and what all services share.

-- Which tables hold rows of a lane, and in which order they are erased: referring rows first.
create table lane_tables (
    table_name text primary key,
    position integer not null
);
grant select on lane_tables to exchange_app;

-- What is stored about a user, by topic. Statements take the user's id as $1. The user service of any version runs
-- them as they stand here, and so exports and erases what newer versions have added.
create table user_data (
    topic text primary key,
    position integer not null,
    -- A query of one jsonb column, a row per thing.
    export text not null,
    -- A statement that removes what identifies the user; null if nothing of it does.
    erase text,
    -- A statement that does a portion of that, and changes nothing when nothing is left. It is run again and again before, each
    -- time by itself. Null if there is never so much that one transaction would take long.
    portion text,
    -- A query of one boolean: whether the user cannot be deleted yet.
    obstacle text
);
grant select on user_data to exchange_app;

create table users (
    id uuid primary key,
    lane text not null,
    -- Lower case. Null when the user has been deleted.
    email text,
    password_hash text,
    display_name text,
    locale text not null default 'en',
    scopes text[] not null default '{}',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    constraint users_email_unique unique (lane, email),
    constraint users_erased check ((deleted_at is null) = (email is not null and password_hash is not null))
);
grant select on users to exchange_app;
-- Not the scopes: those are given by the owner of the database.
grant insert (id, lane, email, password_hash, display_name, locale) on users to exchange_app;
grant update (email, password_hash, display_name, locale, updated_at, deleted_at) on users to exchange_app;

create table sessions (
    id uuid primary key,
    lane text not null,
    user_id uuid not null references users,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    revoked_at timestamptz
);
create index sessions_user on sessions (user_id);
grant select, insert, update, delete on sessions to exchange_app;

-- However a session is ended, the event streams that were opened with its tokens look at once, wherever they are.
create function session_ended_v1() returns trigger language plpgsql as $$
begin
    perform pg_notify('notifications', old.user_id::text);
    return null;
end $$;
create trigger session_revoked after update of revoked_at on sessions
    for each row when (old.revoked_at is null and new.revoked_at is not null) execute function session_ended_v1();
create trigger session_deleted after delete on sessions
    for each row when (old.revoked_at is null) execute function session_ended_v1();

-- All refresh tokens of a session are its family: the use of one that has been used revokes them all. Whoever writes a token
-- has locked its session before, and whoever erases sessions begins with them: no deadlock.
create table refresh_tokens (
    hash bytea primary key,
    lane text not null,
    session_id uuid not null references sessions on delete cascade,
    created_at timestamptz not null default now(),
    used_at timestamptz
);
create index refresh_tokens_session on refresh_tokens (session_id);
grant select, insert, update, delete on refresh_tokens to exchange_app;

create table signing_keys (
    kid text primary key,
    private_key bytea not null check (octet_length(private_key) = 32),
    created_at timestamptz not null default now(),
    signs_from timestamptz not null,
    signs_until timestamptz not null,
    expires_at timestamptz not null check (expires_at > signs_until)
);
grant select, insert, delete on signing_keys to exchange_app;

-- Attempts per key and window. Keys are hashes: nobody's address or e-mail is stored.
create table rate_limits (
    key bytea primary key,
    attempts integer not null,
    window_ends_at timestamptz not null
);
create index rate_limits_ends on rate_limits (window_ends_at);
grant select, insert, update, delete on rate_limits to exchange_app;

-- The processes that work with this schema, as they say themselves every few seconds.
create table instances (
    id uuid primary key,
    service text not null,
    stack text not null,
    level bigint not null,
    seen_at timestamptz not null default now()
);
grant select, insert, update, delete on instances to exchange_app;

insert into lane_tables (table_name, position) values
    ('sessions', 900),
    ('refresh_tokens', 910),
    ('users', 1000);

insert into user_data (topic, position, export, erase) values
    (
        'profile', 1000,
        'select jsonb_build_object(''id'', id, ''email'', email, ''display_name'', display_name, ''locale'', locale,
             ''scopes'', scopes, ''created_at'', created_at, ''updated_at'', updated_at)
         from users where id = $1',
        'update users set email = null, password_hash = null, display_name = null, locale = ''en'',
             updated_at = now(), deleted_at = now() where id = $1'
    ),
    (
        'sessions', 900,
        'select jsonb_build_object(''id'', id, ''created_at'', created_at, ''expires_at'', expires_at,
             ''revoked_at'', revoked_at)
         from sessions where user_id = $1 order by created_at',
        'delete from sessions where user_id = $1'
    ),
    (
        'refresh tokens', 901,
        'select jsonb_build_object(''session_id'', session_id, ''created_at'', t.created_at, ''used_at'', used_at)
         from sessions s join refresh_tokens t on session_id = s.id where user_id = $1 order by t.created_at',
        -- They go with their sessions.
        null
    );

-- Erases a test lane, as the owner: services cannot delete such rows themselves, and nobody can delete live ones.
create function erase_lane_v1(lane text) returns void
    language plpgsql security definer set search_path = public, pg_temp as
$$
declare
    registered record;
begin
    if lane is null or lane not like 'test-%' then
        raise exception 'only test lanes can be erased, not %', lane using errcode = 'check_violation';
    end if;
    -- Whoever writes in a lane has locked a user of it, or moves money and has locked the accounts. What they are about to commit
    -- is waited for here, and seen below; whoever comes later waits for us, and finds nobody.
    perform from users where users.lane = erase_lane_v1.lane order by id for update;
    perform from accounts where accounts.lane = erase_lane_v1.lane order by id for update;
    for registered in select table_name from lane_tables order by position, table_name loop
        execute format('delete from %I where lane = $1', registered.table_name) using lane;
    end loop;
end $$;
revoke all on function erase_lane_v1(text) from public;
grant execute on function erase_lane_v1(text) to exchange_app;
