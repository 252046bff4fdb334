//! What a machine must have before a cluster can be started: each lack is one sentence with the way out.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use nix::{sys::statvfs::statvfs, unistd::geteuid};

use crate::{
    cluster::{cache_dir, home},
    sandbox::{CONTROLLERS, hidden_by, run, search_path},
};

/// Programs that the launcher and the components call, with the Debian package that has each.
const PROGRAMS: [(&str, &str); 6] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("mount", "mount"),
    ("unshare", "util-linux"),
    ("buildah", "buildah"),
    ("mmdebstrap", "mmdebstrap"),
];

/// What only the kernel can give: what is tried, and what to say if that fails.
const KERNEL: [(Feature, &str); 9] = [
    (
        Feature::Namespace("net"),
        "the kernel has no network namespaces (CONFIG_NET_NS)",
    ),
    (
        Feature::Namespace("mnt"),
        "the kernel has no mount namespaces (CONFIG_NAMESPACES)",
    ),
    (
        Feature::Namespace("pid"),
        "the kernel has no process namespaces (CONFIG_PID_NS)",
    ),
    (
        Feature::Cgroups,
        "the cgroup controllers cpu, cpuset, memory and pids are not all mounted at /sys/fs/cgroup: mount them, for example \
         with `mount -t cgroup2 none /sys/fs/cgroup`",
    ),
    (
        Feature::Overlay,
        "the kernel has no overlayfs (CONFIG_OVERLAY_FS); `modprobe overlay` does not help",
    ),
    (
        Feature::BridgeFilter,
        "the kernel does not filter bridged packets (CONFIG_BRIDGE_NETFILTER), so pods of one node could not reach each \
         other through a Service; `modprobe br_netfilter` does not help",
    ),
    (
        Feature::Interface("veth"),
        "the kernel has no veth interfaces (CONFIG_VETH); `modprobe veth` does not help",
    ),
    (
        Feature::Interface("bridge"),
        "the kernel has no network bridges (CONFIG_BRIDGE); `modprobe bridge` does not help",
    ),
    (
        Feature::Nftables,
        "the kernel has no nftables, or not all that kube-proxy writes with it (CONFIG_NF_TABLES, CONFIG_NFT_NAT, \
         CONFIG_NFT_MASQ, CONFIG_NFT_FIB_IPV4, CONFIG_NFT_NUMGEN, CONFIG_NFT_CT, CONFIG_NFT_REJECT)",
    ),
];

/// Of the kinds that kube-proxy writes.
const RULES: &str = "add table ip probe; add chain ip probe out { type nat hook postrouting priority 100 ; }; \
                     add rule ip probe out fib saddr type local masquerade; \
                     add chain ip probe in { type nat hook prerouting priority -100 ; }; \
                     add rule ip probe in dnat ip to numgen random mod 2 map { 0 : 10.0.0.1, 1 : 10.0.0.2 }; \
                     add chain ip probe through { type filter hook forward priority 0 ; }; \
                     add rule ip probe through ct state new ct status dnat reject";

/// Where a network namespace says what of its bridges it filters.
const BRIDGES: &str = "/proc/sys/net/bridge";

/// Free space below which images may not fit, in bytes.
const DISK_MIN: u64 = 4 << 30;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Feature {
    Namespace(&'static str),
    Cgroups,
    Overlay,
    BridgeFilter,
    Interface(&'static str),
    Nftables,
}

/// Checks who asks: to everybody else a cluster that runs looks like one that does not.
///
/// # Errors
/// Without root.
pub fn root() -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "a test cluster needs root, for namespaces, mounts and cgroups: run this as root, or with sudo"
    );
    Ok(())
}

/// Checks the machine.
///
/// # Errors
/// Lists everything that is missing at once.
pub fn check() -> Result<()> {
    root()?;
    let (home, cache) = (home()?, cache_dir()?);
    let free = |place: &Path| {
        let there = place.ancestors().find(|path| path.exists()).unwrap_or(place);
        statvfs(there).map_or(u64::MAX, |disk| disk.blocks_available() * disk.fragment_size())
    };
    let lacks = lacks(&Machine {
        has: &is_there,
        has_program: &is_installed,
        free: free(&home),
        home,
        free_for_cache: free(&cache),
        cache,
    });
    ensure!(
        lacks.is_empty(),
        "this machine cannot run a test cluster yet:\n  - {}",
        lacks.join("\n  - ")
    );
    Ok(())
}

/// What is asked of a machine.
struct Machine<'a> {
    has: &'a dyn Fn(Feature) -> bool,
    has_program: &'a dyn Fn(&str) -> bool,
    /// Bytes on the disk of the clusters' home.
    free: u64,
    home: PathBuf,
    /// Bytes on the disk of the cache.
    free_for_cache: u64,
    cache: PathBuf,
}

fn lacks(machine: &Machine<'_>) -> Vec<String> {
    let mut lacks = Vec::new();
    for (program, package) in PROGRAMS {
        if !(machine.has_program)(program) {
            lacks.push(format!(
                "`{program}` is not installed: `make deps` installs it (Debian package {package})"
            ));
        }
    }
    for (feature, lack) in KERNEL {
        let program = match feature {
            Feature::Nftables => "nft",
            Feature::Interface(_) => "ip",
            _ => "",
        };
        // Without the program that tries it, nothing is known of the kernel.
        if (program.is_empty() || (machine.has_program)(program)) && !(machine.has)(feature) {
            lacks.push(lack.to_owned());
        }
    }
    if machine.free < DISK_MIN {
        lacks.push(format!(
            "{} has {} MiB free, and images need {} MiB: make room, or set TESTBED_HOME to a directory on another disk",
            machine.home.display(),
            machine.free >> 20,
            DISK_MIN >> 20
        ));
    }
    if machine.free_for_cache < DISK_MIN {
        lacks.push(format!(
            "{} has {} MiB free, and built components and images need {} MiB: make room, or set TESTBED_CACHE to a directory \
             on another disk",
            machine.cache.display(),
            machine.free_for_cache >> 20,
            DISK_MIN >> 20
        ));
    }
    if let Some(directory) = hidden_by(&machine.cache) {
        lacks.push(format!(
            "the cache of built components, {}, is below {directory}, and inside a cluster that is another directory: set \
             TESTBED_CACHE to one elsewhere, such as /var/cache/exchange-testbed",
            machine.cache.display()
        ));
    }
    lacks
}

fn is_there(feature: Feature) -> bool {
    match feature {
        Feature::Namespace(kind) => Path::new("/proc/self/ns").join(kind).exists(),
        Feature::Cgroups => has_controllers(Path::new("/sys/fs/cgroup")),
        Feature::Overlay => {
            let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
            filesystems.contains("overlay") || succeeds("modprobe", &["overlay"])
        }
        Feature::BridgeFilter => Path::new(BRIDGES).exists() || load_bridge_filter(),
        // In a network namespace of its own, which ends with it.
        Feature::Interface(kind) => {
            succeeds("unshare", &["--net", "ip", "link", "add", "probe", "type", kind])
        }
        Feature::Nftables => succeeds("unshare", &["--net", "nft", RULES]),
    }
}

/// The module makes every network namespace filter what its bridges carry. The machine's own go on as before; a cluster's, made
/// later, does not take that over.
fn load_bridge_filter() -> bool {
    let loaded = succeeds("modprobe", &["br_netfilter"]);
    if loaded {
        for packets in ["arptables", "ip6tables", "iptables"] {
            let _ = fs::write(format!("{BRIDGES}/bridge-nf-call-{packets}"), "0");
        }
    }
    loaded
}

/// With cgroup v2 one hierarchy has all controllers, with v1 each has one of its own.
fn has_controllers(root: &Path) -> bool {
    let unified = fs::read_to_string(root.join("cgroup.controllers"));
    CONTROLLERS.iter().all(|controller| match &unified {
        Ok(controllers) => controllers.split_whitespace().any(|other| other == *controller),
        Err(_) => root.join(controller).join("cgroup.procs").exists(),
    })
}

fn is_installed(program: &str) -> bool {
    env::split_paths(&search_path()).any(|directory| directory.join(program).is_file())
}

fn succeeds(program: &str, args: &[&str]) -> bool {
    run(program, args).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine<'a>(has: &'a dyn Fn(Feature) -> bool, has_program: &'a dyn Fn(&str) -> bool) -> Machine<'a> {
        Machine {
            has,
            has_program,
            free: DISK_MIN,
            home: "/var/tmp/clusters".into(),
            free_for_cache: DISK_MIN,
            cache: "/var/cache/tools".into(),
        }
    }

    #[test]
    fn every_missing_kernel_feature_is_named_alone() {
        assert_eq!(lacks(&machine(&|_| true, &|_| true)), Vec::<String>::new());
        for (missing, sentence) in KERNEL {
            assert_eq!(
                lacks(&machine(&|feature| feature != missing, &|_| true)),
                [sentence]
            );
        }
    }

    #[test]
    fn a_missing_program_is_named_with_its_package_and_says_nothing_about_the_kernel() {
        let lacks = lacks(&machine(
            &|feature| !matches!(feature, Feature::Interface(_) | Feature::Nftables),
            &|program| program != "ip" && program != "nft",
        ));
        assert_eq!(lacks.len(), 2, "{lacks:?}");
        assert!(
            lacks
                .iter()
                .any(|lack| lack.contains("`ip`") && lack.contains("iproute2")),
            "{lacks:?}"
        );
    }

    #[test]
    fn every_controller_is_asked_for_in_both_kinds_of_hierarchies() {
        let unified = tempfile::tempdir().expect("a directory");
        let controllers = |names: &str| {
            fs::write(unified.path().join("cgroup.controllers"), names).expect("a file");
            has_controllers(unified.path())
        };
        assert!(controllers("cpuset cpu io memory pids\n"));
        assert!(!controllers("cpuset io memory pids\n"));

        let separate = tempfile::tempdir().expect("a directory");
        for controller in CONTROLLERS {
            assert!(!has_controllers(separate.path()), "{controller} is missing");
            let hierarchy = separate.path().join(controller);
            fs::create_dir(&hierarchy).expect("a directory");
            fs::write(hierarchy.join("cgroup.procs"), "").expect("a file");
        }
        assert!(has_controllers(separate.path()));
    }

    #[test]
    fn a_full_disk_and_a_hidden_cache_are_named_with_the_way_out() {
        let mut machine = machine(&|_| true, &|_| true);
        machine.free = DISK_MIN - 1;
        machine.free_for_cache = DISK_MIN - 1;
        machine.cache = "/var/lib/jenkins/.cache".into();
        let lacks = lacks(&machine);
        assert_eq!(lacks.len(), 3, "{lacks:?}");
        assert!(
            lacks.iter().any(|lack| lack.contains("TESTBED_HOME")),
            "{lacks:?}"
        );
        assert!(
            lacks
                .iter()
                .any(|lack| lack.contains("TESTBED_CACHE") && lack.contains("below /var/lib,")),
            "{lacks:?}"
        );
    }
}
