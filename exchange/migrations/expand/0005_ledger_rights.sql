-- Who may do what with the ledger, and what of it belongs to whom.

-- The services' role reads everything; it writes accounts only as to name, state and tombstone, and moves money only through the
-- functions.
revoke execute on function submit_orders_v1, cancel_order_v1, move_external_v1, audit_ledger_v1, exchange_account_v1 from public;
grant execute on function submit_orders_v1, cancel_order_v1, move_external_v1, audit_ledger_v1 to exchange_app;
grant select on currencies, products, accounts, transfers, entries, orders, trades to exchange_app;
grant insert (id, lane, user_id, currency, name), update (name, state, deleted_at, updated_at) on accounts to exchange_app;
grant select, insert, update, delete on outbox, inbox, idempotency_keys to exchange_app;

-- Erasing a test lane: referring rows first.
insert into lane_tables (table_name, position) values
    ('trades', 100), ('entries', 110), ('transfers', 120), ('orders', 130), ('idempotency_keys', 140), ('outbox', 150),
    ('accounts', 200);

-- A user who leaves leaves the ledger as it is: without the profile, the user's id identifies nobody.
insert into user_data (topic, position, export, erase, obstacle) values
    (
        'accounts', 200,
        'select jsonb_build_object(''id'', id, ''currency'', currency, ''name'', name, ''state'', state,
             ''balance'', trim_scale(balance)::text, ''hold'', trim_scale(hold)::text, ''created_at'', created_at,
             ''deleted_at'', deleted_at)
         from accounts where user_id = $1 order by created_at, id',
        'update accounts set name = ''deleted'', deleted_at = coalesce(deleted_at, now()), updated_at = now()
         where user_id = $1',
        'select exists (select from accounts where user_id = $1 and (balance <> 0 or hold <> 0))'
    ),
    (
        'orders', 130,
        'select jsonb_build_object(''id'', id, ''client_order_id'', client_order_id, ''product'', product, ''type'', side,
             ''price'', trim_scale(price)::text, ''size'', trim_scale(size)::text,
             ''remaining'', trim_scale(remaining)::text, ''time_in_force'', time_in_force, ''status'', status,
             ''created_at'', created_at, ''closed_at'', closed_at)
         from orders where user_id = $1 order by arrival',
        null, null
    ),
    (
        'entries', 110,
        'select jsonb_build_object(''transfer_id'', e.transfer_id::text, ''account_id'', e.account_id, ''currency'', e.currency,
             ''kind'', e.kind, ''amount'', trim_scale(e.amount)::text, ''transfer'', t.kind, ''reference'', t.reference,
             ''created_at'', t.created_at)
         from accounts a join entries e on e.account_id = a.id join transfers t on t.id = e.transfer_id
         where a.user_id = $1 order by e.transfer_id, e.line',
        null, null
    ),
    (
        'idempotency keys', 140,
        'select jsonb_build_object(''key'', key, ''created_at'', created_at) from idempotency_keys where user_id = $1
         order by created_at',
        'delete from idempotency_keys where user_id = $1', null
    );
