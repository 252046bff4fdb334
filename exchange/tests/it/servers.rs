//! Real stores and services for tests, in temporary directories and on free ports. They end with their owner, or with
//! the test process, however it ends.

use std::{
    fmt::{self, Display, Formatter, Write as _},
    fs::Permissions,
    io::{BufRead, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::fs::{PermissionsExt as _, chown},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use sqlx::{AssertSqlSafe, ConnectOptions, PgPool, error::DatabaseError, postgres::PgConnectOptions};
use tempfile::TempDir;
use tokio::{net::TcpSocket, sync::OnceCell};

use crate::{releases, stores::Redis};

/// Version 1, which tests are about unless they say otherwise.
pub(crate) const V1: &str = env!("CARGO_BIN_EXE_exchange");
/// Version 2.
pub(crate) const V2: &str = env!("CARGO_BIN_EXE_exchange-2");
/// Version 2 with faults.
pub(crate) const FAULTY: &str = env!("CARGO_BIN_EXE_exchange-faulty");

/// The variables by which `releases` has other tests run with the services of another version, or on the schema and the rows
/// that another version has left.
pub(crate) const SERVICES: &str = "EXCHANGE_TEST_SERVICES";
/// See [`SERVICES`].
pub(crate) const LEFT_BY: &str = "EXCHANGE_TEST_LEFT_BY";

/// The binary of the services.
pub(crate) fn binary() -> String {
    std::env::var(SERVICES).unwrap_or_else(|_| V1.to_owned())
}

/// The debug build starts slowly on a busy machine.
const START: Duration = Duration::from_mins(2);

/// Starts the server again for each line that it reads. Ends it, and removes its directory, when its standard input ends:
/// with this process at the latest.
const KEEPER: &str = r#"
dir=$1; shift
"$@" >"$dir/log" 2>&1 </dev/null & server=$!
echo $server
while read -r again; do
    wait $server
    "$@" >>"$dir/log" 2>&1 </dev/null & server=$!
    echo $server
done
kill -INT $server 2>/dev/null; wait $server
rm -rf "$dir"
"#;

/// A running server and its directory.
pub(crate) struct Server {
    keeper: Child,
    pids: BufReader<ChildStdout>,
    pid: i32,
    directory: PathBuf,
}

impl Server {
    /// Starts a server that keeps its files in `directory`.
    pub(crate) fn start(directory: TempDir, command: &[&str]) -> Self {
        let directory = directory.keep();
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .arg(&directory)
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pids = BufReader::new(keeper.stdout.take().unwrap());
        Self {
            pid: read_pid(&mut pids),
            keeper,
            pids,
            directory,
        }
    }

    /// Kills the server and its children at once, and waits until they are gone.
    pub(crate) fn kill(&self) {
        // Stopped, it has no more children: one that is born meanwhile would hold PostgreSQL's shared memory, and the new
        // server would refuse to start beside it.
        self.signal("STOP");
        let mut pids = self.children();
        pids.push(self.pid.to_string());
        // Without looking at the outcome: a child may have ended by itself.
        let _ = Command::new("kill").arg("-KILL").args(&pids).output().unwrap();
        let deadline = Instant::now() + START;
        while pids.iter().any(|pid| runs(pid)) {
            assert!(Instant::now() < deadline, "killed and still there: {pids:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts a killed server again on the same files.
    pub(crate) fn start_again(&mut self) {
        self.keeper.stdin.as_mut().unwrap().write_all(b"again\n").unwrap();
        self.pid = read_pid(&mut self.pids);
    }

    /// Kills the server and starts it again on the same files.
    pub(crate) fn kill_and_restart(&mut self) {
        self.kill();
        self.start_again();
    }

    /// What the server has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Sends a signal such as `KILL`.
    pub(crate) fn signal(&self, name: &str) {
        output(Command::new("kill").args([format!("-{name}"), self.pid.to_string()]));
    }

    /// What the server and its children have used of the processors so far, also children that have ended.
    pub(crate) fn cpu(&self) -> Duration {
        let children = self.children();
        let running = children
            .iter()
            .map(|pid| processor_time(pid, 2))
            .sum::<Duration>();
        processor_time(&self.pid.to_string(), 4) + running
    }

    fn children(&self) -> Vec<String> {
        let children = format!("/proc/{0}/task/{0}/children", self.pid);
        let children = std::fs::read_to_string(children).unwrap();
        children.split_whitespace().map(str::to_owned).collect()
    }

    /// Waits until the server accepts connections.
    pub(crate) fn await_port(&self, port: &Port) {
        let deadline = Instant::now() + START;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port.number)).is_err() {
            assert!(
                Instant::now() < deadline,
                "nothing listens on {port}: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Whether a process has not ended; a zombie has.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

/// The first fields of what the kernel has counted for a process: its own time as user and in the kernel, then that of
/// the children that it has waited for. Nothing for a process that is gone.
fn processor_time(pid: &str, fields: usize) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in brackets, may hold anything.
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(fields);
    let ticks = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>();
    Duration::from_millis(ticks * 10)
}

fn read_pid(pids: &mut impl BufRead) -> i32 {
    let mut pid = String::new();
    pids.read_line(&mut pid).unwrap();
    pid.trim().parse().unwrap()
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// A port of this machine for a server that cannot choose one itself. While a clone of it lives, the kernel gives it to nobody
/// who asks for any port: neither to another server, nor to a client for its end of a connection.
#[derive(Clone)]
pub(crate) struct Port {
    number: u16,
    _kept: Arc<TcpSocket>,
}

impl Port {
    pub(crate) fn free() -> Self {
        let kept = TcpSocket::new_v4().unwrap();
        // It does not listen, so a server that may reuse the address as well, as all of them may, can.
        kept.set_reuseaddr(true).unwrap();
        kept.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        Self {
            number: kept.local_addr().unwrap().port(),
            _kept: Arc::new(kept),
        }
    }
}

impl Display for Port {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        self.number.fmt(formatter)
    }
}

/// A new directory, for keys and passwords too: for this user only, and removed with what is returned.
pub(crate) fn temporary_directory(name: &str) -> TempDir {
    tempfile::Builder::new()
        .prefix(&format!("exchange-{name}-"))
        .permissions(Permissions::from_mode(0o700))
        .tempdir()
        .unwrap()
}

/// A PostgreSQL server.
pub(crate) struct Postgres {
    /// The process.
    pub(crate) server: Server,
    port: Port,
    /// What another version has left, if tests are to find that.
    left: OnceCell<Database>,
}

impl Postgres {
    /// The server that most tests share, each with a database of its own.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(|| Self::start(&["-c", "fsync=off"]))
    }

    /// A server of its own, for tests that harm it.
    pub(crate) fn start(settings: &[&str]) -> Self {
        let directory = temporary_directory("postgres");
        // PostgreSQL refuses to run as root.
        let as_user: &[&str] = if is_root() {
            let id = |flag| {
                output(Command::new("id").args([flag, "postgres"]))
                    .parse()
                    .unwrap()
            };
            chown(&directory, Some(id("-u")), Some(id("-g"))).unwrap();
            &[
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
            ]
        } else {
            &["env"]
        };
        let (program, arguments) = as_user.split_first().unwrap();
        let data = directory.path().join("data");
        let data = data.to_str().unwrap();
        output(
            Command::new(program)
                .args(arguments)
                .arg(postgres_binary("initdb"))
                .args([
                    "-D",
                    data,
                    "-U",
                    "postgres",
                    "-A",
                    "trust",
                    "--no-sync",
                    "-E",
                    "UTF8",
                    "--locale=C",
                ]),
        );
        let port = Port::free();
        let (binary, port_text) = (postgres_binary("postgres"), port.to_string());
        let mut command = as_user.to_vec();
        command.extend([
            binary.to_str().unwrap(),
            "-D",
            data,
            "-p",
            &port_text,
            "-k",
            "",
            "-c",
        ]);
        command.extend(["listen_addresses=127.0.0.1", "-c", "max_connections=300"]);
        command.extend(settings);
        let server = Server::start(directory, &command);
        let left = OnceCell::new();
        let postgres = Self { server, port, left };
        postgres.server.await_port(&postgres.port);
        postgres
    }

    /// A new, empty database.
    pub(crate) async fn database(&self) -> Database {
        self.copy_of("template0").await
    }

    /// A new database with all that another one has.
    async fn copy_of(&self, original: &str) -> Database {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("exchange_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let options: PgConnectOptions = self.url("postgres", "postgres").parse().unwrap();
        let deadline = Instant::now() + START;
        let mut connection = loop {
            // The port is open before the server has started up.
            match options.connect().await {
                Ok(connection) => break connection,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let sql = format!("create database {name} template {original}");
        // The original may have connections that are about to close.
        while let Err(error) = sqlx::raw_sql(AssertSqlSafe(sql.clone()))
            .execute(&mut connection)
            .await
        {
            let code = error.as_database_error().and_then(DatabaseError::code);
            let in_use = code.is_some_and(|code| code == "55006");
            assert!(in_use && Instant::now() < deadline, "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Database {
            owner_url: self.url("postgres", &name),
            app_url: self.url("exchange_service", &name),
            name,
        }
    }

    fn url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}", self.port)
    }
}

/// A database of a test.
#[derive(Clone)]
pub(crate) struct Database {
    /// Its name on the server.
    pub(crate) name: String,
    /// For migrations, and for looking at everything.
    pub(crate) owner_url: String,
    /// For services: a role that is a member of `exchange_app` and nothing else.
    pub(crate) app_url: String,
}

impl Database {
    /// Runs `exchange migrate --phase <phase>` and returns whether it succeeded, and what it wrote.
    pub(crate) fn migrate(&self, phase: &str, flags: &[&str]) -> (bool, String) {
        self.migrate_by(V1, phase, flags)
    }

    /// The same by a binary of another version.
    pub(crate) fn migrate_by(&self, binary: &str, phase: &str, flags: &[&str]) -> (bool, String) {
        let output = Command::new(binary)
            .args(["migrate", "--phase", phase, "--database-url", &self.owner_url])
            .args(flags)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    }

    /// A pool as the owner.
    pub(crate) async fn owner(&self) -> PgPool {
        PgPool::connect(&self.owner_url).await.unwrap()
    }

    /// A new database of a server, with the schema of version 1 and a role for services; or, for the tests that `releases` runs
    /// once more, one that another version has left.
    pub(crate) async fn migrated(postgres: &Postgres) -> Self {
        let Ok(binary) = std::env::var(LEFT_BY) else {
            return Self::migrated_by(V1, postgres).await;
        };
        let left = async || {
            let database = Self::migrated_by(&binary, postgres).await;
            releases::trade_under(&binary, &database).await;
            database
        };
        let original = postgres.left.get_or_init(left).await;
        postgres.copy_of(&original.name).await
    }

    /// The same with the schema of another version.
    pub(crate) async fn migrated_by(binary: &str, postgres: &Postgres) -> Self {
        let database = postgres.database().await;
        let (succeeded, output) = database.migrate_by(binary, "expand", &[]);
        assert!(succeeded, "{output}");
        database.create_service_role().await;
        database
    }

    /// The role as which services connect, made by an administrator after the first expand.
    pub(crate) async fn create_service_role(&self) {
        sqlx::raw_sql(
            "do $$ begin
                 create role exchange_service login in role exchange_app;
             exception when duplicate_object or unique_violation then null;
             end $$",
        )
        .execute(&self.owner().await)
        .await
        .unwrap();
    }
}

/// A running service of the exchange.
pub(crate) struct Service {
    child: Child,
    /// A client with its own connections.
    pub(crate) client: reqwest::Client,
    lines: Arc<Mutex<String>>,
    /// The public port.
    pub(crate) public: SocketAddr,
    /// The admin port.
    pub(crate) admin: SocketAddr,
}

impl Service {
    /// Starts a service that is always live.
    pub(crate) fn live(service: &str, database: &Database, flags: &[&str]) -> Self {
        Self::start(service, database, &[&["--role", "live"], flags].concat())
    }

    /// Starts a service, and waits until it listens.
    pub(crate) fn start(service: &str, database: &Database, flags: &[&str]) -> Self {
        Self::start_by(&mut Command::new(binary()), service, database, flags)
    }

    /// The same by a binary of another version.
    pub(crate) fn start_by(binary: &mut Command, service: &str, database: &Database, flags: &[&str]) -> Self {
        let given = |names: &[&str]| {
            names.iter().any(|name| flags.contains(name))
                || binary
                    .get_envs()
                    .any(|(name, _)| names.iter().any(|known| name == *known))
        };
        let in_a_file = given(&["--database-url-file", "EXCHANGE_DATABASE_URL_FILE"]);
        // Who does not care which store it is gets one that nobody writes to.
        let market = [
            "--market-data-url",
            "--market-data-url-file",
            "EXCHANGE_MARKET_DATA_URL_FILE",
        ];
        let market = (service == "trade" && !given(&market))
            .then(|| ("EXCHANGE_MARKET_DATA_URL", Redis::shared().url()));
        let mut child = binary
            .args([
                service,
                "--public-address",
                "127.0.0.1:0",
                "--admin-address",
                "127.0.0.1:0",
            ])
            .args(flags)
            .envs((!in_a_file).then_some(("EXCHANGE_DATABASE_URL", &database.app_url)))
            .envs(market)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = Arc::new(Mutex::new(String::new()));
        let (sender, receiver) = std::sync::mpsc::channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        let collected = Arc::clone(&lines);
        std::thread::spawn(move || {
            let mut sender = Some(sender);
            for line in output.lines().map_while(Result::ok) {
                writeln!(collected.lock().unwrap(), "{line}").unwrap();
                // Under load, reading every line would take time from what is measured.
                if sender.is_none() {
                    continue;
                }
                let entry: Value = serde_json::from_str(&line).unwrap_or_default();
                let address = |field: &str| entry[field].as_str().and_then(|text| text.parse().ok());
                if let (Some(public), Some(admin)) =
                    (address("server.address"), address("labels.admin_address"))
                    && let Some(sender) = sender.take()
                {
                    let _ = sender.send((public, admin));
                }
            }
        });
        let (public, admin) = receiver.recv_timeout(START).expect("the service did not start");
        Self {
            child,
            client: client(),
            lines,
            public,
            admin,
        }
    }

    /// The URL of a path on the public port.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.public)
    }

    /// The URL of a path on the admin port.
    pub(crate) fn admin_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }

    /// Waits until `/readyz` says yes.
    pub(crate) async fn ready(self) -> Self {
        eventually("the service is ready", || async {
            let response = self.client.get(self.admin_url("/readyz")).send().await.ok()?;
            response.status().is_success().then_some(())
        })
        .await;
        self
    }

    /// Asks the public port.
    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    /// Asks the admin port.
    pub(crate) async fn admin(&self, path: &str) -> reqwest::Response {
        self.client.get(self.admin_url(path)).send().await.unwrap()
    }

    /// Sends a request of the user service for which it needs its database, and gets 401 if it has it.
    pub(crate) async fn refresh_with_noise(&self) -> reqwest::Response {
        let request = self.client.post(self.url("/token/refresh"));
        request
            .json(&serde_json::json!({"refresh_token": "noise"}))
            .send()
            .await
            .unwrap()
    }

    /// What has been read of the service's log: a line may come later than the answer to the request that it is about.
    pub(crate) fn log(&self) -> String {
        self.lines.lock().unwrap().clone()
    }

    /// Waits until something is in the log, so many times, and returns the whole log.
    pub(crate) async fn logged(&self, words: &str, times: usize) -> String {
        eventually(&format!("`{words}` is logged"), || {
            let log = self.log();
            std::future::ready((log.matches(words).count() >= times).then_some(log))
        })
        .await
    }

    /// Waits until something is in the log, and returns the first line with it.
    pub(crate) async fn logged_entry(&self, words: &str) -> Value {
        let log = self.logged(words, 1).await;
        let line = log.lines().find(|line| line.contains(words)).unwrap();
        serde_json::from_str(line).unwrap()
    }

    /// Sends a signal such as `TERM`.
    pub(crate) fn signal(&self, name: &str) {
        output(Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]));
    }

    /// What the process has used of the processors so far.
    pub(crate) fn cpu(&self) -> Duration {
        processor_time(&self.child.id().to_string(), 2)
    }

    /// Resident memory, in MiB.
    pub(crate) fn memory_mib(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most resident memory so far, in MiB.
    pub(crate) fn most_memory_mib(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, which: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix(which)).unwrap();
        resident.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }

    /// Whether the process has ended, and how.
    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(self.log().as_bytes());
        } else {
            assert_well_named(&self.log());
        }
    }
}

/// What lines of the log may have beside `labels.*`; see `docs/logging.md`.
const LOGGED: [&str; 18] = [
    "@timestamp",
    "client.address",
    "ecs.version",
    "error.message",
    "event.duration",
    "event.id",
    "http.request.method",
    "http.response.status_code",
    "http.route",
    "log.level",
    "log.logger",
    "message",
    "server.address",
    "service.name",
    "service.version",
    "span.id",
    "trace.id",
    "user.id",
];

/// Fails if a line of ours has a field that a schema does not know. The last line may have been cut off.
fn assert_well_named(log: &str) {
    let entries = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    for entry in entries {
        let ours = entry["log.logger"]
            .as_str()
            .is_some_and(|logger| logger.starts_with("exchange"));
        for field in entry.as_object().unwrap().keys() {
            let known = LOGGED.contains(&field.as_str()) || field.starts_with("labels.");
            assert!(known || !ours, "{field} is no name for a field: {entry}");
        }
    }
}

/// Waits until `probe` yields something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut probe: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + START;
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether a statement like this waits for a lock in the database.
pub(crate) async fn waits_for_lock(owner: &PgPool, like: &str) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "select exists (select from pg_stat_activity where wait_event_type = 'Lock'
             and query like $1 and datname = current_database())",
    )
    .bind(like)
    .fetch_one(owner)
    .await
}

/// An HTTP client with connections of its own.
pub(crate) fn client() -> reqwest::Client {
    // Fails when another test was faster.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

fn is_root() -> bool {
    output(Command::new("id").arg("-u")) == "0"
}

/// A program of PostgreSQL, wherever it is installed.
pub(crate) fn postgres_binary(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let installed = versions
        .map(|version| version.path().join("bin").join(name))
        .find(|path| path.exists());
    installed.unwrap_or_else(|| PathBuf::from(name))
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
