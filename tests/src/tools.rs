//! The components of the cluster, built from the Go modules pinned in `tests/cluster`.
//!
//! The binaries are kept in a cache directory whose name is a hash of the pins, so that a second clone or a
//! CI run finds them. Go's own build cache makes an interrupted build continue where it stopped.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use sha2::{Digest, Sha256};

use crate::{
    cluster::cache_dir,
    progress::{self, Step, say},
    sandbox,
    scratch::Scratch,
};

/// The Go modules with a `tool` block, relative to this crate. The volume provisioner stands alone because it
/// imports a module under an old spelling that collides with the other tools' (`Sirupsen` and `sirupsen`).
const MODULES: [&str; 2] = ["cluster", "cluster/volumes"];

/// The one of those that the exchange's tests need, which do not wait for all of Kubernetes: its package, its binary.
const FIRST: (&str, &str) = ("github.com/nats-io/nats-server/v2", "nats-server");

/// runc needs libseccomp for pods with a seccomp profile; containerd's btrfs snapshotter needs headers nobody has.
const TAGS: &str = "seccomp,no_btrfs";

/// Nobody debugs them, and what is left out of the binaries need not be compiled.
const WITHOUT_DEBUG: &str = "-gcflags=all=-dwarf=false";

/// The file that says that all binaries are there, and how many seconds that took.
const COMPLETE: &str = "complete";

/// The files that are locked while all is built, and while [`FIRST`] is, which may be a part of that.
const LOCKS: [&str; 2] = ["lock", "lock-first"];

/// The file that says how many seconds a build has taken so far.
const SPENT: &str = "spent";

/// Where a build works, beside the binaries: on one file system Go puts a finished binary in its place whole. What it copies
/// there, and is killed, looks finished too.
const SCRATCH: &str = "scratch";

/// How often a build that says nothing is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where the binaries are, once they are built.
#[derive(Clone, Debug)]
pub struct Tools {
    dir: PathBuf,
    /// How long it took to fetch the sources and build, now or when the cache got them, in all attempts together.
    pub built_in: Duration,
    /// That it was now.
    pub built_now: bool,
}

impl Tools {
    /// Finds the binaries in the cache, or builds them, with progress on standard error.
    ///
    /// # Errors
    /// If Go, gcc or libseccomp's headers are missing, or the build fails; the compiler's last lines are part
    /// of the error.
    pub fn ensure() -> Result<Self> {
        let dir = cached()?;
        if let Some(built) = Self::built(&dir) {
            return Ok(built);
        }
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let [all, _] = LOCKS;
        let _lock = locked(&dir.join(all), "another run that builds the components")?;
        if let Some(built) = Self::built(&dir) {
            return Ok(built); // by somebody else, while we waited
        }
        let spent = Spent::go_on(dir.join(SPENT));
        say(format!(
            "Building the cluster's components into {} (once per set of pins).",
            dir.display()
        ));
        build_first(&dir, &spent)?;
        let _scratch = Scratch::new(dir.join(SCRATCH))?;
        for module in MODULES {
            build(&module_dir(module), "tool", &dir, &spent)?;
        }
        let (unnamed, etcd) = (dir.join("server"), dir.join("etcd")); // etcd's main package is called `server`
        if unnamed.exists() {
            fs::rename(&unnamed, &etcd).context("cannot rename the etcd binary")?;
        }
        fs::write(dir.join(COMPLETE), spent.seconds().to_string())?;
        fs::remove_file(dir.join(SPENT))?;
        let built = Self::built(&dir).context("the tool cache is gone")?;
        Ok(Self {
            built_now: true,
            ..built
        })
    }

    /// The directory that has at least what the exchange's tests need, while another run may build the rest.
    ///
    /// # Errors
    /// As [`Self::ensure`].
    pub fn ensure_first() -> Result<PathBuf> {
        let dir = cached()?;
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        build_first(&dir, &Spent::go_on(dir.join(SPENT)))?;
        Ok(dir)
    }

    /// That all binaries are in the cache.
    ///
    /// # Errors
    /// If no cache is known.
    pub fn are_built() -> Result<bool> {
        Ok(Self::built(&cached()?).is_some())
    }

    /// What is in the cache, if all of it is.
    fn built(dir: &Path) -> Option<Self> {
        let took = fs::read_to_string(dir.join(COMPLETE)).ok()?;
        Some(Self {
            dir: dir.to_owned(),
            built_in: Duration::from_secs(took.parse().ok()?),
            built_now: false,
        })
    }

    /// The directory with all binaries, for `PATH`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of one binary.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// `PATH` with the tools in front.
    pub fn path_variable(&self) -> String {
        format!("{}:{}", self.dir.display(), sandbox::search_path())
    }
}

/// Where the cache has the binaries of these pins, or will have them.
fn cached() -> Result<PathBuf> {
    Ok(cache_dir()?.join(format!("tools-{}", pins_key()?)))
}

/// Removes what a build has left that was killed; nothing while one goes on.
///
/// # Errors
/// If it cannot be removed.
pub fn remove_leavings() -> Result<()> {
    let dir = cached()?;
    let scratch = dir.join(SCRATCH);
    // Where there is none, they have never been built.
    let locks: Vec<_> = LOCKS.iter().flat_map(|it| fs::File::open(dir.join(it))).collect();
    if locks.iter().any(|it| it.try_lock().is_err()) || !scratch.exists() {
        return Ok(());
    }
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))
}

/// How long a build has taken so far, earlier attempts included: also one that was killed has noted it.
struct Spent {
    file: PathBuf,
    before: u64,
    begun: Instant,
}

impl Spent {
    fn go_on(file: PathBuf) -> Self {
        let before = fs::read_to_string(&file).unwrap_or_default();
        Self {
            file,
            before: before.parse().unwrap_or(0),
            begun: Instant::now(),
        }
    }

    fn seconds(&self) -> u64 {
        self.before + self.begun.elapsed().as_secs()
    }

    fn note(&self) -> Result<()> {
        fs::write(&self.file, self.seconds().to_string())
            .with_context(|| format!("cannot write {}", self.file.display()))
    }
}

fn module_dir(module: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(module)
}

/// A hash of everything that decides what the binaries are.
fn pins_key() -> Result<String> {
    let mut hash = Sha256::new();
    for module in MODULES {
        for file in ["go.mod", "go.sum"] {
            let path = module_dir(module).join(file);
            hash.update(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        }
    }
    hash.update(
        fs::read(module_dir("cluster/coredns/main.go")).context("cannot read what CoreDNS is made of")?,
    );
    hash.update(TAGS);
    hash.update(ldflags()?);
    Ok(hex(&hash.finalize()).chars().take(12).collect())
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Without the version stamp the API server calls itself v0.0.0 and clients' version checks misbehave.
fn ldflags() -> Result<String> {
    Ok(format!(
        "-s -w -X k8s.io/component-base/version.gitVersion={}",
        kubernetes_version()?
    ))
}

/// The pinned Kubernetes version, such as `v1.37.2`.
///
/// # Errors
/// If `tests/cluster/go.mod` cannot be read or does not pin `k8s.io/kubernetes`.
pub fn kubernetes_version() -> Result<String> {
    let pins = fs::read_to_string(module_dir("cluster").join("go.mod"))?;
    pins.lines()
        .find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes "))
        .and_then(|rest| rest.split_whitespace().next().map(str::to_owned)) // `// indirect` may follow
        .context("tests/cluster/go.mod does not pin k8s.io/kubernetes")
}

/// Go in a module, for binaries in a directory. It ends with us: a build that nobody waits for would run beside the next one.
fn go(module: &Path, bin: &Path) -> Command {
    let mut command = sandbox::bound("go");
    command
        .current_dir(module)
        .env("GOBIN", bin)
        .env("GOTMPDIR", bin.join(SCRATCH))
        .env("TMPDIR", bin.join(SCRATCH)) // of linker and C compiler
        .env("GOFLAGS", "-mod=readonly")
        .env("CGO_ENABLED", "1");
    command
}

/// Builds [`FIRST`] if it is not there. Go puts it there whole.
fn build_first(dir: &Path, spent: &Spent) -> Result<()> {
    let (package, binary) = FIRST;
    let there = || dir.join(binary).exists();
    if there() {
        return Ok(());
    }
    let [_, first] = LOCKS;
    let _lock = locked(&dir.join(first), "another run that builds nats-server")?;
    if there() {
        return Ok(()); // by somebody else, while we waited
    }
    let _scratch = Scratch::new(dir.join(SCRATCH))?;
    let [module, ..] = MODULES;
    build(&module_dir(module), package, dir, spent)
}

/// Locks a file of the cache until it is dropped.
fn locked(path: &Path, waits_for: &str) -> Result<fs::File> {
    let lock = fs::File::create(path)?;
    progress::lock(&lock, waits_for).context("cannot lock the tool cache")?;
    Ok(lock)
}

/// Builds a tool of a module, or all of them, which Go calls `tool`. Go prints each module as it fetches it and each
/// package as it compiles it, which is our progress.
fn build(module: &Path, what: &str, bin: &Path, spent: &Spent) -> Result<()> {
    let name = module
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let ldflags = ldflags()?;
    let pins = fs::read_to_string(module.join("go.mod"))?;
    let most = pins
        .lines()
        .filter(|line| line.starts_with('\t') && line.contains(" v") && !line.contains("=>"))
        .count();
    let mut step = Step::start(format!(
        "{name}: fetching sources, finding what is to be compiled"
    ));
    let mut fetched = 0_usize;
    let mut tell = |line: &str| {
        if let Some(module) = line.strip_prefix("go: downloading ") {
            fetched += 1;
            step.update(&format!("{fetched} modules fetched, of at most {most}: {module}"));
        }
    };
    let tools = listed(
        go(module, bin).args(["list", "-f", "{{.ImportPath}}", what]),
        &mut tell,
    )?;
    let stale = stale_packages(go(module, bin), what, &ldflags, &mut tell)?;
    step.done();

    let mut step = Step::start(format!(
        "{name}: compiling {stale} packages, linking {tools} tools"
    ));
    let mut child = go(module, bin)
        .args([
            "install",
            "-v",
            "-trimpath",
            "-tags",
            TAGS,
            "-ldflags",
            &ldflags,
            WITHOUT_DEBUG,
            what,
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start `go`")?;
    let output = child.stderr.take().context("no output of `go`")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        lines.for_each(|line| drop(sender.send(line)));
    });
    spent.note()?;
    let there_before = count(bin);
    let (mut done, mut last) = (0_usize, Vec::<String>::new());
    loop {
        // While it links, Go says nothing: then the binaries are counted again.
        match receiver.recv_timeout(LOOK_EVERY) {
            Ok(line) => {
                done += 1;
                last.push(line);
                if last.len() > 20 {
                    last.remove(0);
                }
            }
            Err(RecvTimeoutError::Timeout) => spent.note()?,
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let percent = (done * 100 / stale.max(1)).min(100);
        let linked = count(bin).saturating_sub(there_before);
        let newest = last.last().map(String::as_str).unwrap_or_default();
        step.update(&format!("{percent} % compiled, {linked} tools linked: {newest}"));
    }
    if !child.wait()?.success() {
        bail!(
            "building the tools in {} failed; its last lines:\n{}\nRun the same command again to continue: what was \
             compiled is kept.",
            module.display(),
            last.join("\n")
        );
    }
    step.done();
    spent.note()
}

fn count(directory: &Path) -> usize {
    fs::read_dir(directory).map_or(0, Iterator::count)
}

/// How many packages are neither installed nor in the build cache.
fn stale_packages(mut go: Command, what: &str, ldflags: &str, tell: impl FnMut(&str)) -> Result<usize> {
    let template = "{{if and .Stale (ne .StaleReason \"not installed but available in build cache\")}}{{.ImportPath}}{{end}}";
    let args = [
        "list",
        "-deps",
        "-trimpath",
        "-tags",
        TAGS,
        "-ldflags",
        ldflags,
        WITHOUT_DEBUG,
        "-f",
        template,
        what,
    ];
    listed(go.args(args), tell)
}

/// How many lines `go` prints; each line of its error output is told.
fn listed(command: &mut Command, mut tell: impl FnMut(&str)) -> Result<usize> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start `setpriv`")?;
    // Read beside: a full pipe would stop Go, and we would wait for its errors.
    let output = child.stdout.take().context("no output of `go`")?;
    let printed = thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        lines.filter(|line| !line.is_empty()).count()
    });
    let mut errors = String::new();
    for line in BufReader::new(child.stderr.take().context("no output of `go`")?).lines() {
        let line = line?;
        tell(&line);
        if !line.starts_with("go: downloading ") {
            errors += &(line + "\n");
        }
    }
    let printed = printed
        .join()
        .map_err(|_| anyhow!("the output of `go` could not be read"))?;
    if !child.wait()?.success() {
        bail!("{command:?} failed (`make deps` says which Go it must be):\n{errors}");
    }
    Ok(printed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_says_how_long_it_took_to_fill() {
        let cache = tempfile::tempdir().expect("a directory");
        assert!(Tools::built(cache.path()).is_none());
        let spent = Spent::go_on(cache.path().join(SPENT));
        assert_eq!(spent.seconds(), 0);
        fs::write(cache.path().join(SPENT), "811").expect("a file");
        let spent = Spent::go_on(cache.path().join(SPENT));
        spent.note().expect("a file");
        let noted = fs::read_to_string(cache.path().join(SPENT)).expect("a file");
        assert_eq!(noted, "811", "an earlier attempt counts");
        fs::write(cache.path().join(COMPLETE), noted).expect("a file");
        let tools = Tools::built(cache.path()).expect("complete");
        assert_eq!(tools.built_in, Duration::from_secs(811));
    }
}
