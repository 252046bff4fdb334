-- Who may do what with the ledger, and what of it belongs to whom.

-- The services' role reads everything; it writes accounts only as to name, state and tombstone, and moves money only through the
-- functions.
revoke execute on function submit_orders_v1, cancel_order_v1, move_external_v1, audit_ledger_v1, exchange_account_v1,
    end_orders_v1 from public;
grant execute on function submit_orders_v1, cancel_order_v1, move_external_v1, audit_ledger_v1 to exchange_app;
grant select on currencies, products, accounts, transfers, transfer_references, entries, orders, trades to exchange_app;
grant insert (id, lane, user_id, currency, name), update (name, state, deleted_at, updated_at) on accounts to exchange_app;
-- What users have called something, so that it can go with them.
grant delete on transfer_references to exchange_app;
grant update (client_order_id) on orders to exchange_app;
grant select, insert, update, delete on outbox, inbox, idempotency_keys to exchange_app;

-- Erasing a test lane: referring rows first.
insert into lane_tables (table_name, position) values
    ('trades', 100), ('entries', 110), ('transfer_references', 115), ('transfers', 120), ('orders', 130),
    ('idempotency_keys', 140), ('outbox', 150), ('inbox', 160), ('accounts', 200);

-- A user who leaves leaves the ledger as it is: without the profile, the user's id identifies nobody. What the user, or
-- somebody for the user, has put into words goes: names of accounts and orders, references, keys, and events that tell of
-- them. Events of trades are about two users, and hold ids and figures only.
insert into user_data (topic, position, export, erase, obstacle) values
    (
        'accounts', 200,
        'select jsonb_build_object(''id'', id, ''currency'', currency, ''name'', name, ''state'', state,
             ''balance'', trim_scale(balance)::text, ''hold'', trim_scale(hold)::text, ''created_at'', created_at,
             ''updated_at'', updated_at, ''deleted_at'', deleted_at)
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
             ''base_account_id'', base_account_id, ''quote_account_id'', quote_account_id,
             ''maker_fee_rate'', trim_scale(maker_fee_rate)::text, ''taken'', trim_scale(taken)::text,
             ''taken_trades'', array(select id::text from unnest(taken_trades) as id), ''taken_reason'', taken_reason,
             ''created_at'', created_at, ''closed_at'', closed_at)
         from orders where user_id = $1 order by arrival',
        -- With a space, which no client order id has: none of the user's own can be in the way.
        'update orders set client_order_id = ''erased '' || id
         where user_id = $1 and client_order_id not like ''erased %''', null
    ),
    (
        'trades', 100,
        'select jsonb_build_object(''trade_id'', t.id::text, ''product'', t.product, ''price'', trim_scale(t.price)::text,
             ''size'', trim_scale(t.size)::text, ''executed_at'', t.executed_at,
             ''type'', case when taken then taker_side when taker_side = ''buy'' then ''sell'' else ''buy'' end,
             ''role'', case when taken then ''taker'' else ''maker'' end,
             ''fee'', trim_scale(case when taken then taker_fee else maker_fee end)::text,
             ''order_id'', case when taken then taker_order_id else maker_order_id end)
         from accounts a join entries e on e.account_id = a.id and e.line in (3, 4) join trades t on t.id = e.transfer_id,
             lateral (select t.taker_user_id = $1 as taken) as role
         where a.user_id = $1 order by t.id',
        null, null
    ),
    (
        'transfer references', 115,
        'select jsonb_build_object(''transfer_id'', transfer_id::text, ''reference'', reference)
         from transfer_references where user_id = $1 order by transfer_id',
        'delete from transfer_references where user_id = $1', null
    ),
    (
        'events', 150,
        -- Headers are those of the request that caused it: a deposit is a request of somebody else.
        'select jsonb_build_object(''topic'', topic, ''payload'', payload,
                    ''headers'', case when payload ->> ''kind'' is distinct from ''deposit'' then headers end,
                    ''created_at'', created_at)
         from outbox where key = $1::text and topic <> ''trade.executed'' order by id',
        'delete from outbox where key = $1::text and topic <> ''trade.executed''', null
    ),
    (
        'trade events', 151,
        -- Without the other side. The request was the taker's.
        'select jsonb_build_object(''topic'', topic, ''payload'',
                    payload - case when payload #>> ''{buyer,user_id}'' = $1::text then ''seller'' else ''buyer'' end,
                    ''headers'', case when (payload ->> ''taker_side'' = ''buy'')
                                         = (payload #>> ''{buyer,user_id}'' = $1::text) then headers end,
                    ''created_at'', created_at)
         from outbox where topic = ''trade.executed''
             and $1::text in (payload #>> ''{buyer,user_id}'', payload #>> ''{seller,user_id}'') order by id',
        null, null
    ),
    (
        'entries', 110,
        'select jsonb_build_object(''transfer_id'', e.transfer_id::text, ''account_id'', e.account_id, ''currency'', e.currency,
             ''kind'', e.kind, ''amount'', trim_scale(e.amount)::text, ''transfer'', t.kind,
             ''created_at'', t.created_at)
         from accounts a join entries e on e.account_id = a.id join transfers t on t.id = e.transfer_id
         where a.user_id = $1 order by e.transfer_id, e.line',
        null, null
    ),
    (
        'idempotency keys', 140,
        -- Without the account that was credited, and what was in it, if it is another user's.
        'select jsonb_build_object(''key'', k.key, ''answer'', case when own.id is not null then k.answer
                    else k.answer - ''{account_id,balance,hold}''::text[] end, ''created_at'', k.created_at)
         from idempotency_keys k
             left join accounts own on own.id = (k.answer ->> ''account_id'')::uuid and own.user_id = k.user_id
         where k.user_id = $1 order by k.created_at',
        'delete from idempotency_keys where user_id = $1', null
    );

-- An open order is an obstacle: it holds something.
update user_data set portion =
    'update orders set client_order_id = ''erased '' || id where id in (
         select id from orders
         where user_id = $1 and status <> ''open'' and client_order_id not like ''erased %'' limit 5000)'
where topic = 'orders';
