-- The functions that move money. They run with the owner's rights: the services' role has no write access to balances, entries,
-- orders or trades except through them. Both colours call them at once, so a function is never replaced by one that behaves
-- differently: it gets a new name.
--
-- Order of locks, the same for all, hence no deadlock: one book, then accounts by id, then client order ids.

-- A time-ordered id (RFC 9562, version 7) for rows that are made here.
create function uuid_v7() returns uuid language sql volatile parallel safe as $$
    select encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3) from 1 for 6), 52, 1), 53, 1),
        'hex')::uuid
$$;

-- Waits for the book and keeps it until the end of the transaction. Books that share a hash merely wait for each other.
-- Whoever has a book waits for an account no longer than a second, because the whole book waits with it.
create function lock_book_v1(p_lane text, p_product text) returns void language plpgsql volatile as $$
begin
    perform pg_advisory_xact_lock(hashtextextended('book ' || p_lane || ' ' || p_product, 0));
    perform set_config('lock_timeout', '1s', true);
end $$;

-- The exchange's own account of a kind in a currency; made when it is first needed.
create function exchange_account_v1(p_lane text, p_kind text, p_currency text) returns uuid language plpgsql as $$
declare
    found_id uuid;
begin
    select id into found_id from accounts where lane = p_lane and currency = p_currency and kind = p_kind and kind <> 'user';
    if found_id is null then
        insert into accounts (id, lane, kind, currency, name) values (uuid_v7(), p_lane, p_kind, p_currency, p_kind)
        on conflict (lane, currency, kind) where kind <> 'user' do update set name = excluded.name
        returning id into found_id;
    end if;
    return found_id;
end $$;

-- What an open order keeps on hold: what it sells, or the value of what it buys and the part of its fee as maker (rounded down
-- once, over all of it, see below) that it has not paid yet. `rested` is what was left of it when it came to rest.
create function order_hold_v1(side text, price numeric, rested numeric, remaining numeric, rate numeric, scale int)
returns numeric language sql immutable as $$
    select case side when 'sell' then remaining else price * remaining
        + (floor(price * rested * rate * 10::numeric ^ scale) - floor(price * (rested - remaining) * rate * 10::numeric ^ scale))
        * 10::numeric ^ -scale end
$$;

-- Ends open orders that cannot be settled, and releases their holds. Who calls it has their books and their accounts.
create function end_orders_v1(p_orders uuid[], p_at timestamptz) returns void language sql as $$
    with ended as (
        update orders o set status = 'cancelled', closed_at = p_at
          from products p
         where o.id = any (p_orders) and o.status = 'open' and p.symbol = o.product
        returning case o.side when 'sell' then o.base_account_id else o.quote_account_id end as account,
                  order_hold_v1(o.side, o.price, o.size - o.taken, o.remaining, o.maker_fee_rate, p.quote_scale) as hold
    )
    update accounts a set hold = a.hold - freed.hold, version = a.version + 1, updated_at = p_at
      from (select account, sum(hold) as hold from ended group by account) freed where a.id = freed.account
$$;

-- Takes orders for one book, in the order given, and settles what matches: one transaction, one round trip. All arrays have the
-- same length; no (user, client order id) may occur twice in them. Returns a row for each order, in order.
--
-- Matching: best price first, then first come; at the price of the order that was there. An order that reaches one of the
-- same user stops there: what it has traded stands, the rest is cancelled (`self_trade`), whatever its time in force.
-- Funds: a limit order must be covered at its own price and the taker's fee when it arrives. A market order to buy goes on until
-- the next trade would cost more than is available (`insufficient_funds`).
-- Effort: an order makes 500 trades at most, then its rest is cancelled (`trade_limit`). Of the book as much is read and locked as
-- orders can take that are covered when the call begins; an order that has become covered since, or comes after as many trades,
-- is `deferred`. A user has 1000 open orders in a book at most: beyond, what could rest is refused (`open_order_limit`).
-- Limit: no account holds 10^18. An order goes on until its next trade would bring its account there (`balance_limit`); one that
-- rests, and whose next trade would, ends, with those behind it that would fill the same account.
-- Fee: both sides pay in the quote currency. What an order has paid as taker is always rate × value so far, rounded up to the
-- currency's smallest unit, and what it has paid as maker the same rounded down; each trade charges the difference. So an order
-- is rounded once per role, not once per trade, and the hold of a resting order covers its fees exactly, in whatever parts it
-- trades. What covered the order when it arrived is enough for what it took and for the hold of the rest, since the maker's rate
-- is not above the taker's and ⌈a⌉ + ⌊b⌋ ≤ ⌈a + b⌉; if both were rounded up, a unit could be missing.
create function submit_orders_v1(
    p_lane text, p_product text, p_ids uuid[], p_users uuid[], p_client_order_ids text[], p_sides text[], p_prices numeric[],
    p_sizes numeric[], p_times_in_force text[], p_base_accounts uuid[], p_quote_accounts uuid[], p_headers jsonb[]
) returns table (
    -- `accepted`, `replayed` (this very order is known: the first answer again), `deferred` (nothing has been done, send it again),
    -- or why it was refused, and the field at fault.
    outcome text, field text,
    order_id uuid, status text, reason text, taken numeric, created_at timestamptz,
    trade_ids bigint[], trade_prices numeric[], trade_sizes numeric[], trade_fees numeric[]
) language plpgsql security definer set search_path = public, pg_temp
    -- Plans made while the tables are small live on in the sessions: none of them may be a scan.
    set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
#variable_conflict use_column
declare
    n constant int := cardinality(p_ids);
    accepted constant text := 'accepted';
    -- What no account holds; the check on `accounts` has it too.
    limit_of_account constant numeric := 1e18;
    most_trades constant int := 500;
    most_open constant int := 1000;
    -- The product.
    base_currency text; quote_currency text; product_status text;
    size_step numeric; price_step numeric; smallest_size numeric; maker_rate numeric; taker_rate numeric;
    units numeric; unit numeric;
    now_at timestamptz;
    -- Orders of the call, by position.
    o_outcome text[] := array_fill(accepted, array[n]); o_field text[] := array_fill(null::text, array[n]);
    o_reason text[] := array_fill(null::text, array[n]); o_status text[] := array_fill(null::text, array[n]);
    o_taken numeric[] := array_fill(null::numeric, array[n]); o_left numeric[] := array_fill(null::numeric, array[n]);
    o_first int[] := array_fill(null::int, array[n]); o_last int[] := array_fill(null::int, array[n]);
    -- What must be available for it, and what is when the call begins: null unless that is enough.
    o_needs numeric[] := array_fill(0::numeric, array[n]); o_means numeric[] := array_fill(null::numeric, array[n]);
    -- Resting orders: those loaded from the book (m_order null), then those of the call that came to rest (their position).
    m_id uuid[] := '{}'; m_order int[] := '{}'; m_user uuid[] := '{}'; m_rank numeric[] := '{}'; m_price numeric[] := '{}';
    m_left numeric[] := '{}'; m_rested numeric[] := '{}'; m_rate numeric[] := '{}';
    m_base uuid[] := '{}'; m_quote uuid[] := '{}'; m_base_at int[] := '{}'; m_quote_at int[] := '{}';
    -- Positions in m_*, best first, of the two sides of the book, and the heads of the two queues.
    sells int[] := '{}'; buys int[] := '{}'; sells_head int := 1; buys_head int := 1;
    -- Accounts, by position: first those that the orders name, then all that could take part, locked in the order of their ids.
    a_id uuid[]; a_user uuid[]; a_currency text[]; a_state text[]; a_balance numeric[]; a_hold numeric[];
    -- Trades.
    t_id bigint[] := '{}'; t_taker int[] := '{}'; t_maker int[] := '{}'; t_price numeric[] := '{}'; t_size numeric[] := '{}';
    t_value numeric[] := '{}'; t_taker_fee numeric[] := '{}'; t_maker_fee numeric[] := '{}';
    trades int := 0;
    -- Of the order and the trade at hand.
    buying boolean; sign int; price numeric; reach numeric; remaining numeric; base_at int; quote_at int; available numeric;
    m int; k int; fill numeric; value numeric; before numeric; taker_value numeric; taker_fee numeric; maker_fee numeric;
    taker_fees numeric; any_accepted boolean := false;
    own_accounts uuid[] := '{}'; could_rest uuid[] := '{}'; takers uuid[];
    demand numeric; market_demand numeric; means numeric; supply numeric; worth numeric; limit_rank numeric; rows int;
    side_taken text; r record;
begin
    perform lock_book_v1(p_lane, p_product);
    now_at := clock_timestamp();
    select base, quote, status, size_increment, price_increment, min_size, maker_fee_rate, taker_fee_rate,
           10::numeric ^ quote_scale, 10::numeric ^ -quote_scale
      into base_currency, quote_currency, product_status, size_step, price_step, smallest_size, maker_rate, taker_rate, units, unit
      from products where symbol = p_product;

    -- Known orders, and what is wrong with the others as such.
    for r in
        select given.at, o.lane = p_lane and o.product = p_product and o.side = p_sides[given.at]
               and o.size = p_sizes[given.at] and o.price is not distinct from p_prices[given.at]
               and o.time_in_force = p_times_in_force[given.at] and o.base_account_id = p_base_accounts[given.at]
               and o.quote_account_id = p_quote_accounts[given.at] as same
          from unnest(p_users, p_client_order_ids) with ordinality given (user_id, client_order_id, at)
          join orders o on o.user_id = given.user_id and o.client_order_id = given.client_order_id
    loop
        if r.same then
            o_outcome[r.at] := 'replayed';
        else
            o_outcome[r.at] := 'client_order_id_reused';
            o_field[r.at] := 'client_order_id';
        end if;
    end loop;
    for i in 1 .. n loop
        continue when o_outcome[i] <> accepted;
        if base_currency is null then
            o_outcome[i] := 'unknown_product'; o_field[i] := 'product';
        elsif product_status <> 'trading' then
            o_outcome[i] := 'product_halted'; o_field[i] := 'product';
        elsif p_sizes[i] < smallest_size then
            o_outcome[i] := 'size_too_small'; o_field[i] := 'size';
        elsif p_sizes[i] % size_step <> 0 then
            o_outcome[i] := 'size_increment'; o_field[i] := 'size';
        elsif p_prices[i] % price_step <> 0 then
            o_outcome[i] := 'price_increment'; o_field[i] := 'price';
        elsif p_sizes[i] * coalesce(p_prices[i], 1) >= 1e15 then
            o_outcome[i] := 'value_too_large'; o_field[i] := 'size';
        elsif p_sides[i] = 'sell' then
            o_needs[i] := p_sizes[i];
        elsif p_prices[i] is not null then
            o_needs[i] := p_prices[i] * p_sizes[i] + ceil(p_prices[i] * p_sizes[i] * taker_rate * units) * unit;
        end if;
    end loop;

    -- Before the book is read: who cannot pay, or names accounts of others, makes others wait for no more than one order.
    select array_agg(id), array_agg(user_id), array_agg(currency), array_agg(state), array_agg(balance), array_agg(hold)
      into a_id, a_user, a_currency, a_state, a_balance, a_hold
      from accounts where id = any (p_base_accounts || p_quote_accounts) and lane = p_lane and deleted_at is null;
    for i in 1 .. n loop
        continue when o_outcome[i] <> accepted;
        base_at := array_position(a_id, p_base_accounts[i]);
        quote_at := array_position(a_id, p_quote_accounts[i]);
        if base_at is null or a_user[base_at] is distinct from p_users[i] then
            o_outcome[i] := 'account_not_found'; o_field[i] := 'base_account_id';
        elsif quote_at is null or a_user[quote_at] is distinct from p_users[i] then
            o_outcome[i] := 'account_not_found'; o_field[i] := 'quote_account_id';
        elsif a_currency[base_at] <> base_currency then
            o_outcome[i] := 'currency_mismatch'; o_field[i] := 'base_account_id';
        elsif a_currency[quote_at] <> quote_currency then
            o_outcome[i] := 'currency_mismatch'; o_field[i] := 'quote_account_id';
        else
            own_accounts := own_accounts || p_base_accounts[i];
            own_accounts := own_accounts || p_quote_accounts[i];
            k := case p_sides[i] when 'buy' then quote_at else base_at end;
            available := a_balance[k] - a_hold[k];
            if a_state[base_at] = 'active' and a_state[quote_at] = 'active' and available >= o_needs[i] then
                o_means[i] := available;
            end if;
        end if;
    end loop;
    for i in 1 .. n loop
        continue when o_outcome[i] <> accepted or p_times_in_force[i] <> 'gtc';
        select count(*) into k
          from (select from orders
                 where user_id = p_users[i] and product = p_product and orders.status = 'open' limit most_open) open;
        -- Those of the call as if all of them came to rest.
        if k + cardinality(array_positions(could_rest, p_users[i])) >= most_open then
            o_outcome[i] := 'open_order_limit'; o_field[i] := 'product';
        else
            could_rest := could_rest || p_users[i];
        end if;
    end loop;

    loop
        -- As much of each side of the book as the orders can use up.
        foreach side_taken in array array['sell', 'buy'] loop
            demand := 0; market_demand := 0; means := 0;
            takers := '{}';
            limit_rank := '-infinity';
            for i in 1 .. n loop
                continue when o_outcome[i] <> accepted or o_means[i] is null or p_sides[i] = side_taken;
                if p_prices[i] is null and side_taken = 'sell' then
                    market_demand := market_demand + p_sizes[i];
                    means := means + o_means[i];
                else
                    demand := demand + p_sizes[i];
                end if;
                if p_users[i] <> all (takers) then takers := takers || p_users[i]; end if;
                limit_rank := greatest(limit_rank,
                    case when p_prices[i] is null then 'infinity'
                         when side_taken = 'sell' then p_prices[i] else -p_prices[i] end);
            end loop;
            continue when cardinality(takers) = 0;
            supply := 0; worth := 0; rows := 0;
            for r in
                select id, user_id, rank, price, remaining, size - taken as rested, maker_fee_rate, base_account_id,
                       quote_account_id
                  from orders
                 where lane = p_lane and product = p_product and side = side_taken and status = 'open' and rank <= limit_rank
                 order by rank, arrival
            loop
                m_id := m_id || r.id; m_order := m_order || null::int; m_user := m_user || r.user_id; m_rank := m_rank || r.rank;
                m_price := m_price || r.price; m_left := m_left || r.remaining; m_rested := m_rested || r.rested;
                m_rate := m_rate || r.maker_fee_rate;
                m_base := m_base || r.base_account_id; m_quote := m_quote || r.quote_account_id;
                if side_taken = 'sell' then sells := sells || cardinality(m_id); else buys := buys || cardinality(m_id); end if;
                supply := supply + r.remaining; worth := worth + r.price * r.remaining; rows := rows + 1;
                -- Market orders to buy cannot pay for more than this.
                if worth > means then market_demand := least(market_demand, supply); end if;
                -- The last order of a call begins before `most_trades`, so there are fewer than twice as many. And nobody gets
                -- past an order of one's own.
                exit when supply >= demand + market_demand or rows = 2 * most_trades
                       or (cardinality(takers) = 1 and r.user_id = takers[1]);
            end loop;
        end loop;

        select array_agg(id), array_agg(user_id), array_agg(currency), array_agg(state), array_agg(balance), array_agg(hold)
          into a_id, a_user, a_currency, a_state, a_balance, a_hold
          from (select id, user_id, currency, state, balance, hold from accounts
                 where id = any (own_accounts || m_base || m_quote) and lane = p_lane
                   and deleted_at is null
                 order by id for no key update) locked;
        for j in 1 .. cardinality(m_id) loop
            m_base_at[j] := array_position(a_id, m_base[j]);
            m_quote_at[j] := array_position(a_id, m_quote[j]);
        end loop;
        exit when array_position(m_base_at || m_quote_at, null::int) is null;
        -- An account cannot be deleted while an open order names it. If one is missing all the same, its order is cancelled: no
        -- book may stand still for it. Then the book is read anew, as there may be too little of it now.
        perform end_orders_v1(array(select given.id from unnest(m_id, m_base_at, m_quote_at) as given (id, base_at, quote_at)
                                     where given.base_at is null or given.quote_at is null), now_at);
        m_id := '{}'; m_order := '{}'; m_user := '{}'; m_rank := '{}'; m_price := '{}'; m_left := '{}'; m_rested := '{}';
        m_rate := '{}'; m_base := '{}'; m_quote := '{}'; m_base_at := '{}'; m_quote_at := '{}'; sells := '{}'; buys := '{}';
    end loop;

    -- Match.
    for i in 1 .. n loop
        continue when o_outcome[i] <> accepted;
        buying := p_sides[i] = 'buy'; sign := case when buying then 1 else -1 end; price := p_prices[i]; remaining := p_sizes[i];
        base_at := array_position(a_id, p_base_accounts[i]);
        quote_at := array_position(a_id, p_quote_accounts[i]);
        k := case when buying then quote_at else base_at end;
        available := a_balance[k] - a_hold[k];
        if base_at is null then
            o_outcome[i] := 'account_not_found'; o_field[i] := 'base_account_id';
        elsif quote_at is null then
            o_outcome[i] := 'account_not_found'; o_field[i] := 'quote_account_id';
        elsif a_state[base_at] <> 'active' then
            o_outcome[i] := 'account_frozen'; o_field[i] := 'base_account_id';
        elsif a_state[quote_at] <> 'active' then
            o_outcome[i] := 'account_frozen'; o_field[i] := 'quote_account_id';
        elsif available < o_needs[i] then
            o_outcome[i] := 'insufficient_funds'; o_field[i] := 'size';
        elsif o_means[i] is null or (buying and price is null and available > o_means[i]) or trades >= most_trades then
            -- It could take more than has been read of the book, and so leave a crossed one.
            o_outcome[i] := 'deferred';
        end if;
        continue when o_outcome[i] <> accepted;

        reach := case when price is null then 'infinity' when buying then price else -price end;
        taker_value := 0; taker_fees := 0;
        o_first[i] := trades + 1;
        while remaining > 0 loop
            m := case when buying then sells[sells_head] else buys[buys_head] end;
            exit when m is null or m_rank[m] > reach;
            if m_user[m] = p_users[i] then
                o_reason[i] := 'self_trade';
                exit;
            elsif trades - o_first[i] + 1 = most_trades then
                o_reason[i] := 'trade_limit';
                exit;
            end if;
            fill := least(remaining, m_left[m]);
            value := m_price[m] * fill;
            taker_fee := ceil((taker_value + value) * taker_rate * units) * unit - taker_fees;
            if buying and price is null and a_balance[quote_at] - a_hold[quote_at] < value + taker_fee then
                o_reason[i] := 'insufficient_funds';
                exit;
            end if;
            before := m_price[m] * (m_rested[m] - m_left[m]);
            maker_fee := floor((before + value) * m_rate[m] * units) * unit - floor(before * m_rate[m] * units) * unit;
            if (case when buying then a_balance[base_at] + fill else a_balance[quote_at] + value - taker_fee end)
               >= limit_of_account then
                o_reason[i] := 'balance_limit';
                exit;
            end if;
            -- No book may stand still for an order whose account is full. Then everything is done anew, as too little of the book
            -- may have been read; nothing has been written yet. If the order came to rest in this very call, the call fails, and
            -- its orders are sent again one by one.
            if m_order[m] is null
               and (case when buying then a_balance[m_quote_at[m]] + value - maker_fee else a_balance[m_base_at[m]] + fill end)
                   >= limit_of_account then
                perform end_orders_v1(array(
                    select o.id from orders o
                     where o.user_id = m_user[m] and o.status = 'open' and o.lane = p_lane and o.product = p_product
                       and o.side <> p_sides[i] and o.rank >= m_rank[m]
                       and case when buying then o.quote_account_id = m_quote[m] else o.base_account_id = m_base[m] end), now_at);
                return query select * from submit_orders_v1(
                    p_lane, p_product, p_ids, p_users, p_client_order_ids, p_sides, p_prices, p_sizes, p_times_in_force,
                    p_base_accounts, p_quote_accounts, p_headers);
                return;
            end if;
            -- The taker gives and gets, then the maker, whose share was on hold.
            a_balance[base_at] := a_balance[base_at] + sign * fill;
            a_balance[quote_at] := a_balance[quote_at] - sign * value - taker_fee;
            k := m_base_at[m];
            a_balance[k] := a_balance[k] - sign * fill;
            if buying then a_hold[k] := a_hold[k] - fill; end if;
            k := m_quote_at[m];
            a_balance[k] := a_balance[k] + sign * value - maker_fee;
            if not buying then a_hold[k] := a_hold[k] - value - maker_fee; end if;
            trades := trades + 1;
            t_id[trades] := nextval('transfer_ids'); t_taker[trades] := i; t_maker[trades] := m; t_price[trades] := m_price[m];
            t_size[trades] := fill; t_value[trades] := value; t_taker_fee[trades] := taker_fee; t_maker_fee[trades] := maker_fee;
            remaining := remaining - fill;
            taker_value := taker_value + value; taker_fees := taker_fees + taker_fee;
            m_left[m] := m_left[m] - fill;
            if m_order[m] is not null then
                o_left[m_order[m]] := m_left[m];
            end if;
            if m_left[m] = 0 then
                if buying then sells_head := sells_head + 1; else buys_head := buys_head + 1; end if;
            end if;
        end loop;

        if trades < o_first[i] and o_reason[i] = 'insufficient_funds' then
            o_outcome[i] := 'insufficient_funds'; o_field[i] := 'size';
            continue;
        elsif trades < o_first[i] and o_reason[i] = 'balance_limit' then
            o_outcome[i] := 'balance_limit'; o_field[i] := case when buying then 'base_account_id' else 'quote_account_id' end;
            continue;
        end if;
        any_accepted := true;
        o_last[i] := trades; o_taken[i] := p_sizes[i] - remaining; o_left[i] := remaining;
        if remaining = 0 then
            o_status[i] := 'filled';
        elsif p_times_in_force[i] = 'ioc' or o_reason[i] is not null then
            o_status[i] := 'cancelled';
            o_reason[i] := coalesce(o_reason[i], 'no_more_matches');
        else
            o_status[i] := 'open';
            if buying then
                value := price * remaining;
                a_hold[quote_at] := a_hold[quote_at] + value + floor(value * maker_rate * units) * unit;
            else
                a_hold[base_at] := a_hold[base_at] + remaining;
            end if;
            m := cardinality(m_id) + 1;
            m_id[m] := p_ids[i]; m_order[m] := i; m_user[m] := p_users[i];
            m_rank[m] := case when buying then -price else price end;
            m_price[m] := price; m_left[m] := remaining; m_rested[m] := remaining; m_rate[m] := maker_rate;
            m_base[m] := p_base_accounts[i]; m_quote[m] := p_quote_accounts[i]; m_base_at[m] := base_at; m_quote_at[m] := quote_at;
            -- Behind all that are as good. What of the book was not loaded is out of reach, so its place does not matter.
            if buying then
                k := cardinality(buys) + 1;
                while k > buys_head and m_rank[buys[k - 1]] > m_rank[m] loop k := k - 1; end loop;
                buys := buys[: k - 1] || m || buys[k :];
            else
                k := cardinality(sells) + 1;
                while k > sells_head and m_rank[sells[k - 1]] > m_rank[m] loop k := k - 1; end loop;
                sells := sells[: k - 1] || m || sells[k :];
            end if;
        end if;
    end loop;

    -- Write.
    if any_accepted then
        -- By client order id, so that two calls that share some wait for each other in one direction only.
        insert into orders (id, lane, user_id, client_order_id, product, side, price, rank, size, time_in_force, base_account_id,
                            quote_account_id, maker_fee_rate, taken, taken_trades, taken_reason, remaining, status, created_at,
                            arrival, closed_at)
        select given.id, p_lane, given.user_id, given.client_order_id, p_product, given.side, given.price,
               case given.side when 'sell' then given.price else -given.price end, given.size, given.time_in_force, given.base_account, given.quote_account, maker_rate, given.taken,
               t_id[given.first : given.last], given.reason, given.rest,
               case when given.status = 'open' and given.rest = 0 then 'filled' else given.status end, now_at,
               given.arrival, case when given.status <> 'open' or given.rest = 0 then now_at end
          from (select u.id, u.user_id, u.client_order_id, u.side, u.price, u.size, u.time_in_force, u.base_account,
                       u.quote_account, u.taken, u.first, u.last, u.reason, u.rest, u.status,
                       nextval('order_arrivals') as arrival
                  from unnest(p_ids, p_users, p_client_order_ids, p_sides, p_prices, p_sizes, p_times_in_force, p_base_accounts,
                              p_quote_accounts, o_taken, o_first, o_last, o_reason, o_left, o_status)
                    as u (id, user_id, client_order_id, side, price, size, time_in_force, base_account, quote_account, taken,
                          first, last, reason, rest, status)
                 where u.status is not null) given
         order by given.user_id, given.client_order_id;

        update accounts a
           set balance = given.balance, hold = given.hold, version = a.version + 1, updated_at = now_at
          from unnest(a_id, a_balance, a_hold) as given (id, balance, hold)
         where a.id = given.id and (a.balance <> given.balance or a.hold <> given.hold);
    end if;
    if trades > 0 then
        update orders o
           set remaining = given.rest,
               status = case when given.rest = 0 then 'filled' else 'open' end,
               closed_at = case when given.rest = 0 then now_at end
          from unnest(m_id, m_order, m_left) as given (id, at, rest)
         where given.at is null and o.id = given.id and o.remaining <> given.rest;

        with given as (
            select u.id, u.price, u.size, u.value, p_sides[u.taker] as side, p_headers[u.taker] as headers,
                   p_users[u.taker] as taker_user, p_ids[u.taker] as taker_order, u.taker_fee,
                   p_base_accounts[u.taker] as taker_base, p_quote_accounts[u.taker] as taker_quote,
                   m_user[u.maker] as maker_user, m_id[u.maker] as maker_order, u.maker_fee,
                   m_base[u.maker] as maker_base, m_quote[u.maker] as maker_quote,
                   case p_sides[u.taker] when 'buy' then 1 else -1 end as sign
              from unnest(t_id, t_taker, t_maker, t_price, t_size, t_value, t_taker_fee, t_maker_fee)
                as u (id, taker, maker, price, size, value, taker_fee, maker_fee)
        ), transferred as (
            insert into transfers (id, lane, kind, created_at) select id, p_lane, 'trade', now_at from given
        ), traded as (
            insert into trades (id, lane, product, price, size, executed_at, taker_side, taker_user_id, taker_order_id, taker_fee,
                                maker_user_id, maker_order_id, maker_fee)
            select id, p_lane, p_product, price, size, now_at, side, taker_user, taker_order, taker_fee, maker_user,
                   maker_order, maker_fee
              from given
        ), entered as (
            insert into entries (account_id, transfer_id, line, lane, currency, kind, amount)
            select line.account, given.id, line.no, p_lane, line.currency, line.kind, line.amount
              from given,
                   exchange_account_v1(p_lane, 'fee', quote_currency) fee_account,
                   lateral (values (1, given.taker_quote, quote_currency, 'trade', -given.sign * given.value),
                                   (2, given.maker_quote, quote_currency, 'trade', given.sign * given.value),
                                   (3, given.taker_base, base_currency, 'trade', given.sign * given.size),
                                   (4, given.maker_base, base_currency, 'trade', -given.sign * given.size),
                                   (5, given.taker_quote, quote_currency, 'fee', -given.taker_fee),
                                   (6, given.maker_quote, quote_currency, 'fee', -given.maker_fee),
                                   (7, fee_account, quote_currency, 'fee', given.taker_fee + given.maker_fee)
                           ) as line (no, account, currency, kind, amount)
             where line.amount <> 0
        )
        insert into outbox (id, lane, topic, key, payload, headers)
        select uuid_v7(), p_lane, 'trade.executed', p_product,
               jsonb_build_object(
                   'trade_id', id::text, 'product', p_product, 'price', trim_scale(price)::text, 'size', trim_scale(size)::text,
                   'taker_side', side, 'executed_at', now_at,
                   side || 'er',
                   jsonb_build_object('user_id', taker_user, 'order_id', taker_order, 'fee', trim_scale(taker_fee)::text),
                   case side when 'buy' then 'seller' else 'buyer' end,
                   jsonb_build_object('user_id', maker_user, 'order_id', maker_order, 'fee', trim_scale(maker_fee)::text)),
               coalesce(headers, '{}')
          from given;
    end if;

    -- Answer.
    for i in 1 .. n loop
        outcome := o_outcome[i]; field := o_field[i]; order_id := p_ids[i]; created_at := now_at;
        status := o_status[i]; reason := o_reason[i]; taken := o_taken[i];
        trade_ids := t_id[o_first[i] : o_last[i]]; trade_prices := t_price[o_first[i] : o_last[i]];
        trade_sizes := t_size[o_first[i] : o_last[i]];
        trade_fees := t_taker_fee[o_first[i] : o_last[i]];
        if outcome = 'replayed' then
            select o.id, o.created_at, o.taken, o.taken_reason,
                   case when o.taken = o.size then 'filled'
                        when o.taken_reason is not null then 'cancelled' else 'open' end,
                   o.taken_trades,
                   array(select t.price from trades t where t.id = any (o.taken_trades) order by t.id),
                   array(select t.size from trades t where t.id = any (o.taken_trades) order by t.id),
                   array(select t.taker_fee from trades t where t.id = any (o.taken_trades) order by t.id)
              into order_id, created_at, taken, reason, status, trade_ids, trade_prices, trade_sizes, trade_fees
              from orders o where o.user_id = p_users[i] and o.client_order_id = p_client_order_ids[i];
        end if;
        return next;
    end loop;
end $$;

-- Cancels an open order and releases its hold. Cancelling a cancelled order again is answered the same.
-- `outcome`: `cancelled`, `order_not_found` (also: another user's), `order_filled`.
create function cancel_order_v1(p_lane text, p_user uuid, p_order uuid)
returns table (outcome text, product text, side text, size numeric, remaining numeric, closed_at timestamptz)
language plpgsql security definer set search_path = public, pg_temp as $$
#variable_conflict use_column
declare
    account uuid; current_status text; order_price numeric; rested numeric; rate numeric; unit_scale int;
begin
    select o.product into product from orders o where o.id = p_order and o.user_id = p_user and o.lane = p_lane;
    if not found then
        outcome := 'order_not_found';
        return next;
        return;
    end if;
    perform lock_book_v1(p_lane, product);
    select o.side, o.size, o.remaining, o.status, o.closed_at, o.price, o.size - o.taken, o.maker_fee_rate, p.quote_scale,
           case o.side when 'sell' then o.base_account_id else o.quote_account_id end
      into side, size, remaining, current_status, closed_at, order_price, rested, rate, unit_scale, account
      from orders o join products p on p.symbol = o.product where o.id = p_order;
    if current_status = 'filled' then
        outcome := 'order_filled';
    else
        outcome := 'cancelled';
        if current_status = 'open' then
            closed_at := clock_timestamp();
            update accounts
               set hold = hold - order_hold_v1(side, order_price, rested, remaining, rate, unit_scale), version = version + 1, updated_at = closed_at where id = account;
            update orders set status = 'cancelled', closed_at = cancel_order_v1.closed_at where id = p_order;
        end if;
    end if;
    return next;
end $$;

-- Moves money into a user's account (`deposit`) or out of it (`withdrawal`), against the exchange's external account.
-- A withdrawal names its owner; a deposit comes from outside and has none (null).
-- `outcome`: `posted`, `account_not_found`, `account_frozen`, `insufficient_funds`, `amount_increment`, `balance_limit`.
create function move_external_v1(p_lane text, p_kind text, p_account uuid, p_user uuid, p_amount numeric, p_reference text,
                                 p_headers jsonb)
returns table (outcome text, transfer_id bigint, currency text, balance numeric, hold numeric, created_at timestamptz)
language plpgsql security definer set search_path = public, pg_temp as $$
#variable_conflict use_column
declare
    owner_id uuid; account_state text; change numeric; external_account uuid; found_one boolean;
begin
    -- By the id alone: without statistics, further conditions lead the planner to other indexes.
    select a.user_id, a.currency, a.state, a.balance, a.hold,
           a.lane = p_lane and a.kind = 'user' and a.deleted_at is null and (p_kind = 'deposit' or a.user_id = p_user)
      into owner_id, currency, account_state, balance, hold, found_one
      from accounts a where a.id = p_account for no key update;
    if found_one is not true then
        outcome := 'account_not_found';
    elsif p_kind = 'withdrawal' and account_state <> 'active' then
        outcome := 'account_frozen';
    elsif min_scale(p_amount) > (select scale from currencies where symbol = currency) then
        outcome := 'amount_increment';
    elsif p_kind = 'withdrawal' and balance - hold < p_amount then
        outcome := 'insufficient_funds';
    elsif p_kind = 'deposit' and balance + p_amount >= 1e15 then
        outcome := 'balance_limit';
    else
        outcome := 'posted';
        created_at := clock_timestamp();
        transfer_id := nextval('transfer_ids');
        change := case p_kind when 'deposit' then p_amount else -p_amount end;
        balance := balance + change;
        external_account := exchange_account_v1(p_lane, 'external', currency);
        insert into transfers (id, lane, kind, created_at)
        values (transfer_id, p_lane, p_kind, move_external_v1.created_at);
        insert into transfer_references (transfer_id, lane, user_id, reference)
        select move_external_v1.transfer_id, p_lane, owner_id, p_reference where p_reference is not null;
        insert into entries (account_id, transfer_id, line, lane, currency, kind, amount)
        values (p_account, move_external_v1.transfer_id, 1, p_lane, move_external_v1.currency, 'transfer', change),
               (external_account, move_external_v1.transfer_id, 2, p_lane, move_external_v1.currency, 'transfer', -change);
        update accounts a set balance = a.balance + change, version = version + 1, updated_at = move_external_v1.created_at
         where a.id = p_account;
        insert into outbox (id, lane, topic, key, payload, headers)
        values (uuid_v7(), p_lane, 'transfer.posted', owner_id::text,
                jsonb_build_object('transfer_id', move_external_v1.transfer_id::text, 'kind', p_kind, 'user_id', owner_id,
                                   'account_id', p_account, 'currency', move_external_v1.currency,
                                   'amount', trim_scale(p_amount)::text),
                coalesce(p_headers, '{}'));
    end if;
    return next;
end $$;

-- What is wrong with a lane's books: no row means nothing is.
create function audit_ledger_v1(p_lane text) returns table (problem text, subject text, expected numeric, actual numeric)
language sql stable security definer set search_path = public, pg_temp as $$
    select 'currency does not sum to zero', currency, 0, sum(amount)
      from entries where lane = p_lane group by currency having sum(amount) <> 0
    union all
    select 'transfer does not sum to zero', transfer_id || ' ' || currency, 0, sum(amount)
      from entries where lane = p_lane group by transfer_id, currency having sum(amount) <> 0
    union all
    select 'balance is not the sum of the entries', a.id::text, coalesce(e.total, 0), a.balance
      from accounts a left join (select account_id, sum(amount) as total from entries where lane = p_lane group by account_id) e
        on e.account_id = a.id
     where a.lane = p_lane and a.kind = 'user' and a.balance <> coalesce(e.total, 0)
    union all
    select 'hold is not the sum of the open orders', a.id::text, coalesce(o.total, 0), a.hold
      from accounts a left join (
            select case side when 'sell' then base_account_id else quote_account_id end as account_id,
                   sum(order_hold_v1(side, price, size - taken, remaining, orders.maker_fee_rate, quote_scale)) as total
              from orders join products on symbol = product
             where lane = p_lane and orders.status = 'open' group by 1) o
        on o.account_id = a.id
     where a.lane = p_lane and a.kind = 'user' and a.hold <> coalesce(o.total, 0)
    union all
    select 'available is below zero', id::text, 0, balance - hold from accounts where lane = p_lane and balance < hold
    union all
    select 'transfer without entries', t.id::text, 2, 0
      from transfers t where t.lane = p_lane and not exists (select from entries e where e.transfer_id = t.id)
    union all
    -- What changes hands, by what its receiver gets, and the fees, by what each side pays.
    select 'trade is not its transfer''s entries', trade.id || ' ' || leg.name, leg.expected, coalesce(leg.actual, 0)
      from (select t.id, t.size, t.price * t.size as value, t.taker_fee, t.maker_fee,
                   sum(e.amount) filter (where e.line in (3, 4) and e.amount > 0) as got_size,
                   sum(e.amount) filter (where e.line in (1, 2) and e.amount > 0) as got_value,
                   -sum(e.amount) filter (where e.line = 5) as paid_by_taker,
                   -sum(e.amount) filter (where e.line = 6) as paid_by_maker,
                   sum(e.amount) filter (where e.line = 7) as got_fees
              from trades t left join entries e on e.transfer_id = t.id
             where t.lane = p_lane group by t.id) trade,
           lateral (values ('size', size, got_size), ('value', value, got_value), ('taker fee', taker_fee, paid_by_taker),
                           ('maker fee', maker_fee, paid_by_maker), ('fees', taker_fee + maker_fee, got_fees)
                   ) as leg (name, expected, actual)
     where leg.expected <> coalesce(leg.actual, 0)
    union all
    select 'order is not the sum of its trades', o.id::text, o.size - o.remaining, coalesce(sum(t.size), 0)
      from orders o left join (select taker_order_id as order_id, size from trades where lane = p_lane
                               union all select maker_order_id, size from trades where lane = p_lane) t on t.order_id = o.id
     where o.lane = p_lane group by o.id, o.size, o.remaining having coalesce(sum(t.size), 0) <> o.size - o.remaining
    union all
    select 'account of an open order is missing', o.id::text, 2, there.accounts
      from orders o,
           lateral (select count(*) as accounts from accounts a
                     where a.id in (o.base_account_id, o.quote_account_id) and a.deleted_at is null) there
     where o.lane = p_lane and o.status = 'open' and there.accounts <> 2
    union all
    select 'book is crossed', b.product, min(s.price), max(b.price)
      from (select product, max(price) as price from orders where lane = p_lane and side = 'buy' and status = 'open' group by 1) b
      join (select product, min(price) as price from orders where lane = p_lane and side = 'sell' and status = 'open' group by 1) s
        on s.product = b.product
     group by b.product having min(s.price) <= max(b.price)
$$;
