//! What a machine must have before a cluster can be started: each lack is one sentence with the way out.

use std::{
    env, fs,
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Result, ensure};
use nix::{sys::statvfs::statvfs, unistd::geteuid};

use crate::{
    cluster::{cache_dir, home},
    progress::say,
    sandbox::{CONTROLLERS, hidden_by, run, search_path},
    scratch::Scratch,
    tools::Tools,
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
const KERNEL: [(Feature, &str); 11] = [
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
        Feature::Making,
        "root may not make namespaces here; in a container, that takes --privileged",
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
        Feature::Nftables(RULES),
        "the kernel has no nftables, or not all that kube-proxy writes with it (CONFIG_NF_TABLES, CONFIG_NFT_NAT, \
         CONFIG_NFT_MASQ, CONFIG_NFT_FIB_IPV4, CONFIG_NFT_NUMGEN, CONFIG_NFT_CT, CONFIG_NFT_REJECT)",
    ),
    (
        Feature::Filters("errno"),
        "the kernel has no filters of system calls (CONFIG_SECCOMP_FILTER), with which a cluster is kept from waiting for the disk",
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

/// How the directory is named in which an overlay is tried, with the process that does.
const OVERLAY_TRY: &str = ".testbed-overlay-";

/// Free space below which images may not fit, in bytes.
const DISK_MIN: u64 = 4 << 30;

/// Free space below which the components may not fit, and what Go keeps of building them, and the images, in bytes. A first run has
/// left 8.1 GB.
const DISK_MIN_TO_BUILD: u64 = 12 << 30;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Feature {
    Namespace(&'static str),
    /// That namespaces can be made.
    Making,
    Cgroups,
    Overlay,
    BridgeFilter,
    Interface(&'static str),
    /// That it takes these rules.
    Nftables(&'static str),
    /// Filters of system calls that can answer so.
    Filters(&'static str),
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
    let lacks = lacks(&Machine {
        has: &is_there,
        has_program: &is_installed,
        home: Disk::of(home()?),
        cache: Disk::of(cache_dir()?),
        has_components: Tools::are_built()?,
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
    /// That of the clusters.
    home: Disk,
    cache: Disk,
    /// They are in the cache, and need not be built.
    has_components: bool,
}

/// A directory, which need not be there yet, and what its disk is good for.
struct Disk {
    directory: PathBuf,
    /// Bytes.
    free: u64,
    /// Images can be put together there.
    takes_overlays: bool,
}

impl Disk {
    fn of(directory: PathBuf) -> Self {
        let there = directory.ancestors().find(|path| path.exists());
        let there = there.unwrap_or(&directory);
        Self {
            free: statvfs(there).map_or(u64::MAX, |disk| disk.blocks_available() * disk.fragment_size()),
            // Without overlayfs, nothing is known of the disk.
            takes_overlays: !is_there(Feature::Overlay) || takes_overlays(there),
            directory,
        }
    }
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
    let makes = (machine.has)(Feature::Making);
    for (feature, lack) in KERNEL {
        let (program, inside) = match feature {
            Feature::Nftables(_) => ("nft", true),
            Feature::Interface(_) => ("ip", true),
            Feature::Making => ("unshare", false),
            _ => ("", false),
        };
        // Without the program that tries it, and a namespace to try it in, nothing is known of the kernel.
        let is_tried = (program.is_empty() || (machine.has_program)(program)) && (makes || !inside);
        if is_tried && !(machine.has)(feature) {
            lacks.push(lack.to_owned());
        }
    }
    let (cached, to_cache) = if machine.has_components {
        ("images need", DISK_MIN)
    } else {
        (
            "the cluster's components, which are built once, and images need",
            DISK_MIN_TO_BUILD,
        )
    };
    for (disk, what, need, variable) in [
        (&machine.home, "images need", DISK_MIN, "TESTBED_HOME"),
        (&machine.cache, cached, to_cache, "TESTBED_CACHE"),
    ] {
        let directory = disk.directory.display();
        if disk.free < need {
            lacks.push(format!(
                "{directory} has {} MiB free, and {what} {} MiB: make room, or set {variable} to a directory on another disk",
                disk.free >> 20,
                need >> 20
            ));
        }
        if makes && !disk.takes_overlays {
            lacks.push(format!(
                "overlayfs cannot write to the file system of {directory}, and images are put together with it: set {variable} \
                 to a directory on another disk"
            ));
        }
    }
    if let Some(directory) = hidden_by(&machine.cache.directory) {
        lacks.push(format!(
            "the cache of built components, {}, is below {directory}, and inside a cluster that is another directory: set \
             TESTBED_CACHE to one elsewhere, such as /var/cache/exchange-testbed",
            machine.cache.directory.display()
        ));
    }
    lacks
}

fn is_there(feature: Feature) -> bool {
    match feature {
        Feature::Namespace(kind) => Path::new("/proc/self/ns").join(kind).exists(),
        Feature::Making => succeeds("unshare", &["--net", "--mount", "--pid", "--fork", "true"]),
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
        Feature::Nftables(rules) => succeeds("unshare", &["--net", "nft", rules]),
        Feature::Filters(action) => {
            let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
            actions.split_whitespace().any(|available| available == action)
        }
    }
}

/// Tries it, by a mount in a namespace of its own, which ends with it.
fn takes_overlays(directory: &Path) -> bool {
    const TRY: &str = "cd \"$0\" && mkdir lower upper work && \
                       mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work probe lower";
    let scratch = Scratch::new(directory.join(format!("{OVERLAY_TRY}{}", process::id())));
    scratch.is_ok_and(|scratch| {
        let place = scratch.path().display().to_string();
        succeeds("unshare", &["--mount", "sh", "-c", TRY, &place])
    })
}

/// Removes what tries have left that were killed: before there is a cluster, there is no home to leave it in.
///
/// # Errors
/// If no home or cache is known.
pub fn remove_leavings() -> Result<()> {
    for place in [home()?, cache_dir()?] {
        place.ancestors().for_each(remove_dead_tries);
    }
    Ok(())
}

/// Some of these directories are everybody's, so only what can be one of our own is touched.
fn remove_dead_tries(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(OVERLAY_TRY));
        let is_dead = |pid: u32| !Path::new("/proc").join(pid.to_string()).exists();
        let is_ours = |it: fs::Metadata| it.is_dir() && it.uid() == geteuid().as_raw();
        if pid.and_then(|pid| pid.parse().ok()).is_some_and(is_dead)
            && fs::symlink_metadata(entry.path()).is_ok_and(is_ours)
            && let Err(error) = fs::remove_dir_all(entry.path())
            && error.kind() != ErrorKind::NotFound
        {
            say(format!("{} cannot be removed: {error}", entry.path().display()));
        }
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

    fn disk(directory: &str) -> Disk {
        Disk {
            directory: directory.into(),
            free: DISK_MIN,
            takes_overlays: true,
        }
    }

    fn machine<'a>(has: &'a dyn Fn(Feature) -> bool, has_program: &'a dyn Fn(&str) -> bool) -> Machine<'a> {
        Machine {
            has,
            has_program,
            home: disk("/var/tmp/clusters"),
            cache: disk("/var/cache/tools"),
            has_components: true,
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
    fn where_no_namespaces_can_be_made_nothing_else_is_known() {
        let untried = |feature| {
            matches!(
                feature,
                Feature::Making | Feature::Interface(_) | Feature::Nftables(_)
            )
        };
        let has = |feature| !untried(feature);
        let mut machine = machine(&has, &|_| true);
        machine.home.takes_overlays = false;
        let lacks = lacks(&machine);
        assert!(lacks.len() == 1 && lacks[0].contains("--privileged"), "{lacks:?}");
    }

    #[test]
    fn a_missing_program_is_named_with_its_package_and_says_nothing_about_the_kernel() {
        let lacks = lacks(&machine(
            &|feature| !matches!(feature, Feature::Interface(_) | Feature::Nftables(_)),
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
    fn what_no_kernel_has_is_not_there() {
        for nowhere in [
            Feature::Namespace("no-such-kind"),
            Feature::Interface("no-such-kind"),
            Feature::Filters("no-such-action"),
            Feature::Nftables(
                "add table ip probe; add chain ip probe out { type no-such-kind hook postrouting priority 0 ; }",
            ),
        ] {
            assert!(!is_there(nowhere), "{nowhere:?}");
        }
        assert!(!takes_overlays(Path::new("/proc")));
    }

    #[test]
    fn only_the_tries_of_the_dead_are_removed() {
        let place = tempfile::tempdir().expect("a directory");
        let of = |pid: u32| place.path().join(format!("{OVERLAY_TRY}{pid}"));
        let (own, dead) = (of(process::id()), of(u32::MAX));
        for directory in [&own, &dead] {
            fs::create_dir_all(directory.join("lower")).expect("a directory");
        }
        let no_try = place.path().join(format!("{OVERLAY_TRY}x"));
        fs::write(&no_try, "").expect("a file");
        remove_dead_tries(place.path());
        assert!(own.exists() && !dead.exists() && no_try.exists());
    }

    #[test]
    fn components_that_are_not_built_yet_need_more_room_than_images() {
        let mut machine = machine(&|_| true, &|_| true);
        machine.has_components = false;
        let lacks = lacks(&machine);
        assert_eq!(lacks.len(), 1, "{lacks:?}");
        let said = "/var/cache/tools has 4096 MiB free, and the cluster's components, which are built once, and images need 12288 MiB";
        assert!(lacks[0].starts_with(said), "{lacks:?}");
        machine.cache.free = DISK_MIN_TO_BUILD;
        assert_eq!(super::lacks(&machine), Vec::<String>::new());
    }

    #[test]
    fn a_disk_that_will_not_do_and_a_hidden_cache_are_named_with_the_way_out() {
        let mut machine = machine(&|_| true, &|_| true);
        let unfit = |directory: &str| Disk {
            free: DISK_MIN - 1,
            takes_overlays: false,
            ..disk(directory)
        };
        machine.home = unfit("/mnt/clusters");
        machine.cache = unfit("/var/lib/jenkins/.cache");
        let lacks = lacks(&machine);
        let way_out = |parts: &[&str]| {
            let said = |lack: &&String| parts.iter().all(|part| lack.contains(part));
            assert_eq!(lacks.iter().filter(said).count(), 1, "{parts:?} in {lacks:?}");
        };
        assert_eq!(lacks.len(), 5, "{lacks:?}");
        way_out(&["/mnt/clusters has", "MiB free", "TESTBED_HOME"]);
        way_out(&["overlayfs", "/mnt/clusters", "TESTBED_HOME"]);
        way_out(&["/var/lib/jenkins/.cache has", "MiB free", "TESTBED_CACHE"]);
        way_out(&["overlayfs", "/var/lib/jenkins/.cache", "TESTBED_CACHE"]);
        way_out(&["below /var/lib,", "TESTBED_CACHE"]);
    }
}
