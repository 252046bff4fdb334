-- Run at the start of every migration, before the files: harmless when everything is there already.
create table if not exists schema_state (
    only_one boolean primary key default true check (only_one),
    identity uuid not null,
    expanded bigint not null,
    oldest_reader bigint not null
);
create table if not exists migrations (
    phase text not null check (phase in ('expand', 'contract')),
    number bigint not null,
    name text not null,
    checksum bytea not null,
    batches_done integer not null,
    changed_at timestamptz not null default now(),
    primary key (phase, number)
);
-- Services log in as members of this role. Two databases of one server may be prepared at the same time.
do $$
begin
    if not exists (select from pg_roles where rolname = 'exchange_app') then
        create role exchange_app nologin;
    end if;
exception when duplicate_object or unique_violation then null;
end $$;
grant select on schema_state to exchange_app;
