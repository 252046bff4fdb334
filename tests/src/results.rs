//! Figures for machines: what a benchmark or an end-to-end run prints for people, as JSON.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Writes `target/results/<name>.json`: the figures, with the machine and the commit they come from. Keys should
/// explain themselves and name their unit (`swap_milliseconds`).
///
/// # Errors
/// If the file cannot be written.
pub fn write(name: &str, figures: &Value) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no repository")?;
    let directory = root.join("target/results");
    fs::create_dir_all(&directory)?;
    let path = directory.join(format!("{name}.json"));
    let document = json!({"name": name, "machine": machine(), "commit": commit(root), "figures": figures});
    fs::write(&path, format!("{document:#}\n"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
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
    json!({
        "processor": find(&cpu, "model name"),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": find(&read("/proc/meminfo"), "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
    })
}

/// The commit, with `-dirty` if the work tree differs from it.
fn commit(root: &Path) -> String {
    let git = Command::new("git")
        .current_dir(root)
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output();
    git.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}
