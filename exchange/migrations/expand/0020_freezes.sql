-- Version 2: since when an account is frozen. A freeze becomes a period of its own, and the account's state follows it.
-- Version 1 knows the state only; until the contract a trigger makes a freeze of what it writes.

create table freezes (
    account_id uuid not null references accounts,
    lane       text not null,
    frozen_at  timestamptz not null default clock_timestamp(),
    lifted_at  timestamptz,
    primary key (account_id, frozen_at),
    check (lifted_at >= frozen_at)
);
create unique index freezes_now on freezes (account_id) where lifted_at is null;
create index freezes_of_test_lane on freezes (lane) where lane <> 'live';
grant select, insert (account_id, lane), update (lifted_at) on freezes to exchange_app;

-- Settlement goes on reading the state, which is in the row that it locks anyway.
create function state_follows_freeze_v1() returns trigger
    language plpgsql security definer set search_path = public, pg_temp as
$$
begin
    update accounts set state = case when new.lifted_at is null then 'frozen' else 'active' end
     where id = new.account_id and (state = 'frozen') <> (new.lifted_at is null);
    return null;
end $$;
create trigger state_follows_freeze after insert or update on freezes
    for each row execute function state_follows_freeze_v1();

insert into lane_tables (table_name, position) values ('freezes', 190);
insert into user_data (topic, position, export) values
    (
        'freezes', 190,
        'select jsonb_build_object(''account_id'', f.account_id, ''frozen_at'', f.frozen_at, ''lifted_at'', f.lifted_at)
         from accounts a join freezes f on f.account_id = a.id where a.user_id = $1 order by f.frozen_at, f.account_id'
    );

-- batch
create function freeze_follows_state_v1() returns trigger
    language plpgsql security definer set search_path = public, pg_temp as
$$
begin
    if new.state = 'frozen' then
        insert into freezes (account_id, lane) values (new.id, new.lane)
        on conflict (account_id) where lifted_at is null do nothing;
    else
        update freezes set lifted_at = greatest(clock_timestamp(), frozen_at) where account_id = new.id and lifted_at is null;
    end if;
    return null;
end $$;
create trigger freeze_follows_state after update of state on accounts
    for each row when (old.state <> new.state) execute function freeze_follows_state_v1();

-- batch outside transaction
-- For the backfill only.
create index concurrently if not exists accounts_frozen on accounts (id) where state = 'frozen';

-- batch repeat of select count(*) from accounts where state = 'frozen'
-- Version 1 has not recorded when: the account's last change is the latest that it can have been. The lock makes sure that
-- the account is still frozen when the freeze is written.
insert into freezes (account_id, lane, frozen_at)
select id, lane, updated_at
  from (select id, lane, updated_at from accounts
         where state = 'frozen' and not exists (select from freezes where account_id = accounts.id and lifted_at is null)
         order by id limit 500 for no key update) as frozen;

-- batch outside transaction
drop index concurrently if exists accounts_frozen;
