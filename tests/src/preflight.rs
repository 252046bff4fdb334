//! What a machine must have before a cluster can be started: each lack is one sentence with the way out.

use std::{fs, path::Path, process::Command};

use anyhow::{Result, bail};
use nix::{sys::statvfs::statvfs, unistd::geteuid};

/// Programs that the launcher and the components call, with the Debian package that has each.
const PROGRAMS: [(&str, &str); 4] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("mount", "mount"),
    ("buildah", "buildah"),
];

/// Free space below which images may not fit, in bytes.
const DISK_MIN: u64 = 4 << 30;

/// Checks the machine.
///
/// # Errors
/// Lists everything that is missing at once.
pub fn check(home: &Path) -> Result<()> {
    if !geteuid().is_root() {
        bail!(
            "a test cluster needs root, for namespaces, mounts and cgroups: run this as root, or with sudo"
        );
    }
    let mut lacks = Vec::new();
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.contains("overlay") && !loads("overlay") {
        lacks.push(
            "the kernel has no overlayfs (CONFIG_OVERLAY_FS); `modprobe overlay` does not help".to_owned(),
        );
    }
    if !Path::new("/proc/sys/net/bridge").exists() && !loads("br_netfilter") {
        lacks.push(
            "the kernel does not filter bridged packets (CONFIG_BRIDGE_NETFILTER), so pods of one node could not \
             reach each other through a Service; `modprobe br_netfilter` does not help"
                .to_owned(),
        );
    }
    for namespace in ["net", "mnt", "pid"] {
        if !Path::new("/proc/self/ns").join(namespace).exists() {
            lacks.push(format!("the kernel has no {namespace} namespaces"));
        }
    }
    if !Path::new("/sys/fs/cgroup").is_dir()
        || fs::read_dir("/sys/fs/cgroup").is_ok_and(|mut all| all.next().is_none())
    {
        lacks.push("no cgroups are mounted at /sys/fs/cgroup".to_owned());
    }
    for (program, package) in PROGRAMS {
        if !is_installed(program) {
            lacks.push(format!(
                "`{program}` is not installed: `make deps` installs it (Debian package {package})"
            ));
        }
    }
    if is_installed("nft") && !succeeds("nft", &["list", "tables"]) {
        lacks.push("the kernel has no nftables (CONFIG_NF_TABLES): `nft list tables` fails".to_owned());
    }
    let there = home.ancestors().find(|path| path.exists()).unwrap_or(home);
    if let Ok(disk) = statvfs(there) {
        let free = disk.blocks_available() * disk.fragment_size();
        if free < DISK_MIN {
            lacks.push(format!(
                "{} has {} MiB free, and images need {} MiB: make room, or set TESTBED_HOME to a directory on another \
                 disk",
                home.display(),
                free >> 20,
                DISK_MIN >> 20
            ));
        }
    }
    if !lacks.is_empty() {
        bail!(
            "this machine cannot run a test cluster yet:\n  - {}",
            lacks.join("\n  - ")
        );
    }
    Ok(())
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).is_file())
}

fn loads(module: &str) -> bool {
    succeeds("modprobe", &[module])
}

fn succeeds(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .output()
        .is_ok_and(|output| output.status.success())
}
