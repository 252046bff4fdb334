//! `exchange smoke`: the whole way from registration to a settled trade and its notification, with two synthetic
//! users in a test lane of their own. Leaves nothing behind.

use std::{
    fmt::{self, Write as _},
    io::{self, Write as _},
    mem,
    path::PathBuf,
    time::{Duration, Instant},
};

use http::StatusCode;
use rust_decimal::Decimal;
use secrecy::SecretString;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;

use crate::trader::{BASE, Call, CallError, Client, Endpoints, LaneKey, PRODUCT, QUOTE, Trader, field, list};

const PRICE: &str = "20000";
const SIZE: &str = "0.01";
/// How long the notification of a trade may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long nothing, or another stack, may answer at first: each node learns by itself, some seconds later, that a Service has
/// pods or leads to other ones.
const ROUTED_WITHIN: Duration = Duration::from_secs(20);
/// How long it is tried to erase the lane: a database that changes its host is away for less.
const ERASURE: Duration = Duration::from_mins(1);
/// When it is tried again if nobody has said when.
const AGAIN: Duration = Duration::from_secs(1);

/// The flags of `exchange smoke`.
#[derive(Clone, Debug, clap::Args)]
pub struct SmokeArgs {
    #[command(flatten)]
    endpoints: Endpoints,
    /// The colour of the stack under test.
    #[arg(long, env = "EXCHANGE_COLOUR")]
    colour: String,
    /// The revision of the stack under test.
    #[arg(long, env = "EXCHANGE_REVISION")]
    revision: String,
    /// The secret that opens the stack's test lanes.
    #[arg(
        long,
        env = "EXCHANGE_LANE_SECRET",
        hide_env_values = true,
        required_unless_present = "lane_secret_file"
    )]
    lane_secret: Option<SecretString>,
    /// A file with that secret.
    #[arg(long, env = "EXCHANGE_LANE_SECRET_FILE", conflicts_with = "lane_secret")]
    lane_secret_file: Option<PathBuf>,
    /// Where to write a JUnit report.
    #[arg(long)]
    junit: Option<PathBuf>,
}

/// A step that was taken.
#[derive(Debug)]
struct Step {
    name: &'static str,
    took: Duration,
    failure: Option<String>,
}

/// One line, and a second one if it has failed.
impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, took, failure } = self;
        let verdict = if failure.is_none() { "ok  " } else { "FAIL" };
        write!(formatter, "{verdict} {:>6} ms  {name}", took.as_millis())?;
        match failure {
            None => Ok(()),
            Some(failure) => write!(formatter, "\n     {failure}"),
        }
    }
}

/// What happened, step by step.
#[derive(Debug, Default)]
struct Report(Vec<Step>);

impl Report {
    /// Takes a step, and says and keeps what came of it.
    async fn step<T>(
        &mut self,
        name: &'static str,
        step: impl Future<Output = Result<T, CallError>>,
    ) -> Option<T> {
        let start = Instant::now();
        let result = step.await;
        let failure = result.as_ref().err().map(ToString::to_string);
        let step = Step {
            name,
            took: start.elapsed(),
            failure,
        };
        // Who has stopped reading the report does not keep the lane from being erased.
        let _ = writeln!(io::stdout(), "{step}");
        self.0.push(step);
        result.ok()
    }

    /// Whether the stack has answered: before that nobody is registered.
    fn reached(&self) -> bool {
        self.0.first().is_some_and(|step| step.failure.is_none())
    }

    fn failed(&self) -> bool {
        self.0.iter().any(|step| step.failure.is_some())
    }

    fn junit(&self) -> String {
        let failures = self.0.iter().filter(|step| step.failure.is_some()).count();
        let mut text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"smoke\" tests=\"{}\" failures=\"{failures}\">\n",
            self.0.len()
        );
        for Step { name, took, failure } in &self.0 {
            let (name, seconds) = (escape(name), took.as_secs_f64());
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                "  <testcase classname=\"exchange.smoke\" name=\"{name}\" time=\"{seconds:.3}\""
            );
            let _ = match failure {
                None => writeln!(text, "/>"),
                Some(failure) => {
                    writeln!(
                        text,
                        ">\n    <failure message=\"{}\"/>\n  </testcase>",
                        escape(failure)
                    )
                }
            };
        }
        text.push_str("</testsuite>\n");
        text
    }
}

/// Text for an XML attribute. What XML cannot hold at all becomes a question mark.
fn escape(text: &str) -> String {
    text.chars()
        .fold(String::with_capacity(text.len()), |mut escaped, character| {
            match character {
                '&' => escaped.push_str("&amp;"),
                '<' => escaped.push_str("&lt;"),
                '>' => escaped.push_str("&gt;"),
                '"' => escaped.push_str("&quot;"),
                '\n' => escaped.push_str("&#10;"),
                control if control.is_control() => escaped.push('?'),
                other => escaped.push(other),
            }
            escaped
        })
}

/// Runs the smoke test until it is told to end, prints what happens, and says whether all of it was right.
pub async fn run(args: SmokeArgs) -> anyhow::Result<bool> {
    let secret = match (args.lane_secret, args.lane_secret_file) {
        (Some(secret), _) => secret,
        (None, Some(file)) => SecretString::from(tokio::fs::read_to_string(file).await?.trim_end()),
        (None, None) => anyhow::bail!("--lane-secret or --lane-secret-file is required"),
    };
    let stack = format!("{}-{}", args.colour, args.revision);
    let lane = format!("test-{stack}.{}", Uuid::now_v7().simple()).parse()?;
    let client = Client::new(args.endpoints, Some(LaneKey { lane, secret }), Some(stack))?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut report = Report::default();
    let told_to_end = tokio::select! {
        // What has been reached does not matter: the report says where it ended.
        _ = exercise(&client, &mut report) => false,
        _ = interrupt.recv() => true,
        _ = terminate.recv() => true,
    };
    if told_to_end {
        let cut_off = async { Err::<(), _>(CallError::Wrong("a signal came before".to_owned())) };
        report.step("come to the end", cut_off).await;
    }
    if report.reached() {
        report.step("erase the lane", erase(&client, ERASURE)).await;
    }
    if let Some(file) = args.junit {
        tokio::fs::write(file, report.junit()).await?;
    }
    Ok(!report.failed())
}

/// Erases the lane. What cannot be done right now is tried again: it would be left behind.
async fn erase(client: &Client, patience: Duration) -> Result<(), CallError> {
    let start = Instant::now();
    let mut told = false;
    loop {
        let Err(error) = client.erase_lane().await else {
            return Ok(());
        };
        let wait = match &error {
            CallError::Transport { .. } => AGAIN,
            CallError::Status { retry_after, .. } if error.is_unavailable() => retry_after.unwrap_or(AGAIN),
            _ => return Err(error),
        };
        if start.elapsed() + wait > patience {
            return Err(error);
        }
        // Once: of a long text the beginning is lost, and that is where the step stands that has failed.
        if !mem::replace(&mut told, true) {
            let patience = patience.as_secs();
            let _ = writeln!(
                io::stderr(),
                "the lane is not erased yet, it is tried for {patience} s: {error}"
            );
        }
        tokio::time::sleep(wait).await;
    }
}

/// Waits until this node's requests to each service get to the stack under test.
async fn reach(client: &Client, patience: Duration) -> Result<(), CallError> {
    let start = Instant::now();
    let endpoints = &client.endpoints;
    let services = [
        &endpoints.user_url,
        &endpoints.trade_url,
        &endpoints.notification_url,
    ];
    for service in services {
        let version = || client.call(Call::get(format!("{service}/version")), StatusCode::OK);
        while let Err(error) = version().await {
            if !error.went_elsewhere() || start.elapsed() >= patience {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}

/// Every step needs the ones before it; the first that fails is the last.
async fn exercise(client: &Client, report: &mut Report) -> Option<()> {
    report
        .step("the stack under test answers", reach(client, ROUTED_WITHIN))
        .await?;
    let mut buyer = report
        .step("register and log in the buyer", client.join("buyer"))
        .await?;
    let mut seller = report
        .step("register and log in the seller", client.join("seller"))
        .await?;
    report
        .step("add accounts", async {
            for trader in [&mut buyer, &mut seller] {
                client.open_account(trader, BASE).await?;
                client.open_account(trader, QUOTE).await?;
            }
            Ok(())
        })
        .await?;
    report
        .step("deposit", async {
            client
                .deposit(&buyer.token, account(&buyer, QUOTE)?, "1000")
                .await?;
            client.deposit(&seller.token, account(&seller, BASE)?, "1").await
        })
        .await?;
    let sell = Client::order(&seller, "sell", PRICE, SIZE, "smoke-sell");
    let resting = report
        .step("place an order", client.send_order(&seller, sell))
        .await?;
    report
        .step("the order rests", async {
            expect(&resting.body, "status", "open")
        })
        .await?;
    let buy = Client::order(&buyer, "buy", PRICE, SIZE, "smoke-buy");
    let taken = report
        .step("place the counter-order", client.send_order(&buyer, buy.clone()))
        .await?;
    let fill = report
        .step("the orders are matched", async {
            expect(&taken.body, "status", "filled")?;
            match list(&taken.body, "trades") {
                [fill] => Fill::read(fill),
                _ => Err(CallError::Wrong(format!("expected one trade in {}", taken.body))),
            }
        })
        .await?;
    report
        .step("the same order again is the same order", async {
            let again = client.send_order(&buyer, buy).await?;
            if again.repeated && again.body == taken.body {
                return Ok(());
            }
            Err(CallError::Wrong(format!(
                "expected the first answer again, got {}",
                again.body
            )))
        })
        .await?;
    report
        .step(
            "both accounts are right",
            balances(client, &buyer, &seller, &fill),
        )
        .await?;
    report
        .step("both trade lists are right", async {
            for trader in [&buyer, &seller] {
                for currency in [BASE, QUOTE] {
                    let trades = client.trades(trader, account(trader, currency)?).await?;
                    let trades: Vec<_> = trades.into_iter().map(|trade| trade.trade_id).collect();
                    same("the trades of an account", &trades, &vec![fill.trade_id.clone()])?;
                }
            }
            Ok(())
        })
        .await?;
    report
        .step("both are notified", async {
            for trader in [&buyer, &seller] {
                let told = until(|| client.notified_trades(trader)).await?;
                same(
                    "the trades that a user was told of",
                    &told,
                    &vec![fill.trade_id.clone()],
                )?;
            }
            Ok(())
        })
        .await?;
    report
        .step("the market shows the trade", async {
            let shown = until(|| market_trades(client, &buyer)).await?;
            same("the trades of the market", &shown, &vec![fill.trade_id.clone()])
        })
        .await
}

struct Fill {
    trade_id: String,
    fee: Decimal,
}

impl Fill {
    fn read(fill: &Value) -> Result<Self, CallError> {
        let fee = field(fill, "fee")?;
        let fee = fee
            .parse()
            .map_err(|_| CallError::Wrong(format!("the fee {fee:?} is no number")))?;
        expect(fill, "price", PRICE)?;
        expect(fill, "size", SIZE)?;
        Ok(Self {
            trade_id: field(fill, "trade_id")?,
            fee,
        })
    }
}

/// Buyer and seller have exchanged 0.01 BTC for 200 USD, and each paid a fee. The seller's is what is missing: at
/// least nothing, and no more than the buyer's, who came second.
async fn balances(client: &Client, buyer: &Trader, seller: &Trader, fill: &Fill) -> Result<(), CallError> {
    let (hundredth, value) = (Decimal::new(1, 2), Decimal::from(200));
    let mut found = Vec::new();
    for trader in [buyer, seller] {
        let accounts = client.accounts(trader).await?;
        for currency in [BASE, QUOTE] {
            let account = accounts.iter().find(|account| account.currency == currency);
            let account =
                account.ok_or_else(|| CallError::Wrong(format!("the {currency} account is missing")))?;
            same("what is on hold", &account.hold, &Decimal::ZERO)?;
            found.push(account.balance);
        }
    }
    let [bought, paid, sold, earned] = found.as_slice() else {
        return Err(CallError::Wrong("expected four accounts".to_owned()));
    };
    same("the buyer's BTC", bought, &hundredth)?;
    same("the buyer's USD", paid, &(Decimal::from(1000) - value - fill.fee))?;
    same("the seller's BTC", sold, &(Decimal::ONE - hundredth))?;
    let seller_fee = value - *earned;
    if seller_fee < Decimal::ZERO || seller_fee > fill.fee {
        return Err(CallError::Wrong(format!(
            "the seller has {earned} USD after selling for {value}"
        )));
    }
    Ok(())
}

async fn market_trades(client: &Client, trader: &Trader) -> Result<Vec<String>, CallError> {
    let url = format!("{}/market/trades?product={PRODUCT}", client.endpoints.trade_url);
    let answer = client
        .call(Call::get(url).token(&trader.token), StatusCode::OK)
        .await?;
    list(&answer.body, "trades")
        .iter()
        .map(|trade| field(trade, "id"))
        .collect()
}

/// Asks until there is an answer that is not empty; what happens after a trade takes a moment, and a store may be busy.
async fn until<F: Future<Output = Result<Vec<String>, CallError>>>(
    ask: impl Fn() -> F,
) -> Result<Vec<String>, CallError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = ask().await;
        let later = match &found {
            Ok(found) => found.is_empty(),
            Err(error) => error.is_unavailable(),
        };
        if !later || Instant::now() >= deadline {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn account(trader: &Trader, currency: &str) -> Result<Uuid, CallError> {
    trader
        .account(currency)
        .ok_or_else(|| CallError::Wrong(format!("there is no {currency} account")))
}

fn expect(body: &Value, name: &str, expected: &str) -> Result<(), CallError> {
    same(name, &field(body, name)?, &expected.to_owned())
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, actual: &T, expected: &T) -> Result<(), CallError> {
    if actual == expected {
        return Ok(());
    }
    Err(CallError::Wrong(format!(
        "{what}: expected {expected:?}, got {actual:?}"
    )))
}

#[cfg(test)]
mod tests {
    use std::iter;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        task::JoinHandle,
    };

    use super::*;

    /// A client of services that give these answers, each on a connection of its own, and then the last one for ever.
    async fn client_of(
        answers: &'static [&'static str],
        last: &'static str,
        stack: Option<&str>,
    ) -> (Client, JoinHandle<()>) {
        // Fails when another test was faster.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = tokio::spawn(async move {
            for answer in answers.iter().chain(iter::repeat(&last)) {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
                if !answer.is_empty() {
                    let answer = format!("HTTP/1.1 {answer}connection: close\r\ncontent-length: 0\r\n\r\n");
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            }
        });
        let endpoints = Endpoints {
            user_url: url.clone(),
            trade_url: url.clone(),
            notification_url: url,
        };
        let client = Client::new(endpoints, None, stack.map(ToOwned::to_owned)).unwrap();
        (client, serving)
    }

    const NO_ANSWER: &str = "";

    async fn erase_against(answers: &'static [&'static str]) -> Result<(), CallError> {
        let (client, serving) = client_of(answers, "204 No Content\r\n", None).await;
        let erased = erase(&client, Duration::from_secs(30)).await;
        serving.abort();
        erased
    }

    async fn reach_against(answers: &'static [&'static str], last: &'static str) -> Result<(), CallError> {
        let (client, serving) = client_of(answers, last, Some("green-2")).await;
        let reached = reach(&client, Duration::from_secs(2)).await;
        serving.abort();
        reached
    }

    #[tokio::test]
    async fn a_node_that_still_leads_to_the_stack_before_is_given_time() {
        const BEFORE: &str = "200 OK\r\nx-exchange-stack: blue-1\r\n";
        const UNDER_TEST: &str = "200 OK\r\nx-exchange-stack: green-2\r\n";
        // The services are moved one after the other.
        reach_against(&[BEFORE, UNDER_TEST, BEFORE, BEFORE], UNDER_TEST)
            .await
            .unwrap();
        let other = reach_against(&[], BEFORE).await.unwrap_err();
        assert!(matches!(other, CallError::Stack { .. }), "{other}");
        // Who has got there, and is not answered, has found a fault.
        reach_against(&[NO_ANSWER], UNDER_TEST).await.unwrap_err();
        reach_against(
            &["500 Internal Server Error\r\nx-exchange-stack: green-2\r\n"],
            UNDER_TEST,
        )
        .await
        .unwrap_err();
    }

    #[tokio::test]
    async fn a_lane_that_cannot_be_erased_right_now_is_erased_later() {
        erase_against(&[NO_ANSWER, "503 Service Unavailable\r\nretry-after: 2\r\n"])
            .await
            .unwrap();
        for for_good in [
            &["403 Forbidden\r\n"],
            &["503 Service Unavailable\r\nretry-after: 60\r\n"],
        ] {
            erase_against(for_good).await.unwrap_err();
        }
    }

    #[tokio::test]
    async fn what_is_awaited_is_asked_for_again() {
        let answer = CallError::answered;
        let busy = answer(StatusCode::SERVICE_UNAVAILABLE);
        let answers = std::sync::Mutex::new(vec![Ok(vec!["1".to_owned()]), Ok(Vec::new()), Err(busy)]);
        let found = until(|| async { answers.lock().unwrap().pop().unwrap() }).await;
        assert_eq!(found.unwrap(), ["1"]);
        let refused = until(|| async { Err(answer(StatusCode::FORBIDDEN)) }).await;
        assert!(refused.is_err());
    }

    #[tokio::test]
    async fn a_failed_step_fails_the_report_in_both_forms() {
        let mut report = Report::default();
        assert!(report.step("first", async { Ok(7) }).await == Some(7));
        assert!(!report.failed());
        let failure = async { Err::<(), _>(CallError::Wrong("a \"b\" <c> & \u{1}d".into())) };
        assert!(report.step("second", failure).await.is_none());
        assert!(report.failed());
        let junit = report.junit();
        assert!(junit.contains("tests=\"2\" failures=\"1\""), "{junit}");
        assert!(
            junit.contains("<failure message=\"a &quot;b&quot; &lt;c&gt; &amp; ?d\"/>"),
            "{junit}"
        );
        let [first, second] = report.0.as_slice() else {
            panic!("{report:?}");
        };
        assert!(first.to_string().starts_with("ok ") && second.to_string().starts_with("FAIL "));
    }
}
