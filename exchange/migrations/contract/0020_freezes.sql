-- Freezes are the only truth about freezes: what version 1 writes is not translated any more, and so it may not write it.
drop trigger freeze_follows_state on accounts;
drop function freeze_follows_state_v1();
revoke update (state) on accounts from exchange_app;
