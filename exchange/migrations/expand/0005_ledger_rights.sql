-- The services' role reads everything here; it writes accounts only as to name, state and tombstone, and moves money only through
-- the functions above.

revoke execute on function submit_orders_v1, cancel_order_v1, move_external_v1, audit_ledger_v1, erase_ledger_lane_v1,
    exchange_account_v1 from public;
grant execute on function submit_orders_v1, cancel_order_v1, move_external_v1, audit_ledger_v1, erase_ledger_lane_v1
    to exchange_app;

grant select on currencies, products, accounts, transfers, entries, orders, trades to exchange_app;
grant insert (id, lane, user_id, currency, name), update (name, state, deleted_at, updated_at) on accounts to exchange_app;
grant select, insert, update, delete on outbox, inbox, idempotency_keys to exchange_app;
