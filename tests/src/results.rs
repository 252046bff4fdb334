//! Figures for machines: what a benchmark or an end-to-end run prints for people, as JSON.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// What the table of an end-to-end run shows of a case, if the case has it.
const COLUMNS: [(&str, &str); 7] = [
    ("seconds", "SECONDS"),
    ("requests", "REQUESTS"),
    ("requests_failed", "FAILED"),
    ("connections_cut_off", "CUT OFF"),
    ("swap_milliseconds", "SWAP MS"),
    ("rollback_milliseconds", "BACK MS"),
    ("drain_seconds", "DRAIN S"),
];

/// What a run tells its other processes of its [`Origin`].
const ORIGIN: &str = "TESTBED_ORIGIN";

/// The code that figures are of.
#[derive(Clone, Debug, PartialEq)]
pub struct Origin {
    /// The commit, with `-dirty` if the work tree differed from it; nothing if git did not say.
    commit: Option<String>,
}

impl Origin {
    /// That of this run, noted when it began. Whoever measures asks for it first: by the end, somebody may have committed
    /// something else, or changed a file.
    pub fn of_run() -> &'static Self {
        static OF_RUN: LazyLock<Origin> = LazyLock::new(|| Origin::noted(env::var(ORIGIN).ok(), head));
        &OF_RUN
    }

    /// As the run has noted it for this process, else as it is now.
    fn noted(by_run: Option<String>, now: impl FnOnce() -> Option<String>) -> Self {
        let commit = by_run.or_else(now);
        Self {
            commit: commit.filter(|commit| !commit.is_empty()),
        }
    }

    /// What is written in a file of figures, if they are of this code. Figures of other code are forgotten.
    fn own(&self, mut document: Value) -> Map<String, Value> {
        let is_own = document.get("commit") == Some(&json!(self.commit));
        match document.get_mut("figures").map(Value::take) {
            Some(Value::Object(figures)) if is_own => figures,
            _ => Map::new(),
        }
    }
}

/// Writes `target/results/<name>.json`: the figures, with the machine and the commit they come from. Keys should
/// explain themselves and name their unit (`swap_milliseconds`).
///
/// # Errors
/// If the file cannot be written.
pub fn write(name: &str, figures: &Value) -> Result<PathBuf> {
    let path = place(name)?;
    let commit = &Origin::of_run().commit;
    let document = json!({"name": name, "machine": machine(), "commit": commit, "figures": figures});
    fs::write(&path, format!("{document:#}\n"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The repository's root.
///
/// # Errors
/// If the crate has been moved out of it.
pub fn repository() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no repository")
}

fn place(name: &str) -> Result<PathBuf> {
    let directory = repository()?.join("target/results");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory.join(format!("{name}.json")))
}

/// Begins a run, `e2e` or another of its kind: forgets the cases of the one before, and says what all of its processes should find in their
/// environment, `variable=value`.
///
/// # Errors
/// If the old figures cannot be removed.
pub fn begin(run: &str) -> Result<String> {
    let path = place(&of_run(run))?;
    if path.exists() {
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    let commit = Origin::of_run().commit.as_deref().unwrap_or_default();
    Ok(format!("{ORIGIN}={commit}"))
}

/// Ends a run, with a line for all of it: a test may fail before it is a case.
///
/// # Errors
/// As [`add_case`].
pub fn end(run: &str, passed: bool) -> Result<()> {
    let verdict = if passed { "passed" } else { "failed" };
    let all = ("all-tests".to_owned(), json!({"verdict": verdict}));
    add(&of_run(run), [all]).map(drop)
}

/// Name of the figures of a run on the cluster that this process is about.
fn of_run(run: &str) -> String {
    of_cluster(run, &env::var("TESTBED_NAME").unwrap_or_else(|_| "dev".into()))
}

/// Name of figures that each cluster has: of the one that is used when none is named, or of the named one. Two runs may go on
/// at the same time.
#[must_use]
pub fn of_cluster(name: &str, cluster: &str) -> String {
    match cluster {
        "dev" => name.to_owned(),
        cluster => format!("{name}-{cluster}"),
    }
}

/// Adds a case to the figures of the end-to-end run. Cases may end at the same time.
///
/// # Errors
/// If the figures cannot be read or written.
pub fn add_case(case: &str, figures: Map<String, Value>) -> Result<()> {
    add(&of_run("e2e"), [(case.to_owned(), figures.into())]).map(drop)
}

/// Adds to what is written already under a name, or replaces it. Figures of other code are forgotten.
///
/// # Errors
/// If the figures cannot be read or written.
pub fn add(name: &str, more: impl IntoIterator<Item = (String, Value)>) -> Result<PathBuf> {
    let lock = File::create(place(name)?.with_extension("lock"))?;
    lock.lock()?;
    let mut figures = read(name)?;
    figures.extend(more);
    write(name, &figures.into())
}

/// A run as a table: a line per case, with its number in the proof, its verdict, and what it measured.
///
/// # Errors
/// If the figures cannot be read.
pub fn table(run: &str) -> Result<String> {
    let mut lines = vec![row("CASE", "VERDICT", COLUMNS.map(|(_, title)| title.to_owned()))];
    let number = |figures: &Value| figures.get("case").and_then(Value::as_u64);
    let mut cases: Vec<_> = read(&of_run(run))?.into_iter().collect();
    cases.sort_by_key(|(name, figures)| (number(figures), name.clone()));
    for (name, figures) in cases {
        let shown = |key: &str| match figures.get(key) {
            None | Some(Value::Null) => "-".to_owned(),
            Some(value) => value.to_string(),
        };
        let verdict = figures.get("verdict").and_then(Value::as_str).unwrap_or("?");
        let case = number(&figures).map_or_else(|| name.clone(), |number| format!("{number:>2} {name}"));
        lines.push(row(&case, verdict, COLUMNS.map(|(key, _)| shown(key))));
    }
    lines.push(format!("  {}", place(&of_run(run))?.display()));
    Ok(lines.join("\n"))
}

fn row(case: &str, verdict: &str, figures: [String; COLUMNS.len()]) -> String {
    let figures = figures.map(|figure| format!("{figure:>9}")).join(" ");
    format!("  {case:<28} {verdict:<8} {figures}")
}

fn read(name: &str) -> Result<Map<String, Value>> {
    let path = place(name)?;
    if !path.exists() {
        return Ok(Map::new());
    }
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Origin::of_run().own(serde_json::from_slice(&text)?))
}

fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let find = |text: &str, key: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with(key))
            .unwrap_or_default();
        line.split(':').nth(1).unwrap_or_default().trim().to_owned()
    };
    let cpu = read("/proc/cpuinfo");
    let memory = find(&read("/proc/meminfo"), "MemTotal");
    let memory: Option<u64> = memory.trim_end_matches(" kB").parse().ok();
    json!({
        "processor": find(&cpu, "model name"),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "memory_kibibytes": memory,
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
    })
}

/// The commit that is checked out, with `-dirty` if the work tree differs from it; nothing if git does not say.
fn head() -> Option<String> {
    let git = Command::new("git")
        .current_dir(repository().ok()?)
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output();
    let said = String::from_utf8(git.ok()?.stdout).ok()?;
    Some(said.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(commit: &str) -> Origin {
        Origin::noted(Some(commit.to_owned()), || None)
    }

    #[test]
    fn a_run_is_of_the_commit_that_it_began_with() {
        let now = || Some("of-somebody-who-commits-meanwhile".to_owned());
        assert_eq!(
            Origin::noted(Some("at-the-beginning".into()), now),
            origin("at-the-beginning")
        );
        assert_eq!(
            Origin::noted(None, now),
            origin("of-somebody-who-commits-meanwhile")
        );
        // Where there is no git, nobody has noted anything.
        assert_eq!(Origin::noted(Some(String::new()), now).commit, None);
    }

    #[test]
    fn figures_of_other_code_are_forgotten() {
        let document = json!({"commit": "one", "figures": {"requests": 5}});
        let own = origin("one").own(document.clone());
        assert_eq!(Value::from(own), json!({"requests": 5}));
        for other in ["one-dirty", "two", ""] {
            assert!(origin(other).own(document.clone()).is_empty(), "{other}");
        }
    }
}
