//! Images without a container engine or a registry: root file systems from Debian packages and Go modules, put
//! together by buildah, kept as archives, imported into containerd.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::statvfs::statvfs;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    cluster::{Cluster, cache_dir},
    progress::{self, Step},
    results, sandbox,
    scratch::Scratch,
    tools::{Tools, hex},
};

/// Images of ours are named `exchange.local/<name>`: no registry has that name, so nothing is ever pulled.
pub const PREFIX: &str = "exchange.local";
/// The tag of images made from Debian packages and Go modules.
const STATIC_TAG: &str = "1";

/// How much of a failed command's output is shown.
const LINES_OF_AN_ERROR: usize = 15;

/// Debian packages of an image's root file system.
struct Recipe {
    name: &'static str,
    packages: &'static str,
}

const HELPER: Recipe = Recipe {
    name: "busybox",
    packages: "busybox,libc6",
};

/// What images of programs stand on.
const BASE: Recipe = Recipe {
    name: "base",
    packages: "libc6,libgcc-s1,ca-certificates",
};

/// libc-bin and the shell are for the charts' start scripts.
const RECIPES: [Recipe; 2] = [
    Recipe {
        name: "redis",
        packages: "redis-server,redis-tools,dash,coreutils",
    },
    Recipe {
        name: "postgres",
        packages: "postgresql-15,dash,coreutils,libc-bin,sed,grep,base-files,tzdata",
    },
];

/// The release of Debian that the packages are of.
const DEBIAN: &str = "bookworm";

/// Where a machine with that release says from where it has its packages. Others' repositories have files of their own.
const SOURCES: [&str; 2] = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"];

/// Users of the images: `store` has the id that the public images of PostgreSQL and Redis use.
const USERS: &str =
    "root:x:0:0::/:/bin/sh\nstore:x:999:999::/var/lib/store:/bin/sh\nnonroot:x:65532:65532::/:/bin/false\n";

/// An image as a file.
#[derive(Clone, Debug)]
pub struct Archive {
    /// The full name with tag.
    pub image: String,
    /// An OCI archive.
    pub path: PathBuf,
}

/// The image of pod sandboxes: the one that a cluster cannot be without.
///
/// # Errors
/// If buildah or mmdebstrap is missing, or a package cannot be fetched.
pub fn helper(tools: &Tools) -> Result<Archive> {
    from_packages(tools, &HELPER, &static_image(HELPER.name), "image")
}

/// The stores' images and the base of all others, from Debian packages and the pinned nats-server.
///
/// # Errors
/// If a package cannot be fetched or an image not be built.
pub fn stores(tools: &Tools) -> Result<Vec<Archive>> {
    let all = RECIPES.len() + 2;
    let title = |number: usize| format!("store image {number} of {all}:");
    let base = from_packages(tools, &BASE, &base_image(tools.dir())?, &title(1))?;
    ensure!(
        stored(&base.image)? || unpack(&base)?,
        "the base image is damaged"
    );
    let argument = format!("BASE={}", base.image);
    let mut archives = vec![base];
    for recipe in &RECIPES {
        let image = static_image(recipe.name);
        archives.push(from_packages(tools, recipe, &image, &title(archives.len() + 1))?);
    }
    let copy = |_: &mut Step, context: &Path| {
        fs::copy(tools.path("nats-server"), context.join("nats-server"))
            .context("cannot copy nats-server")?;
        anyhow::Ok(())
    };
    let key = key_of_recipe(tools.dir(), "nats", &argument)?;
    let args = ["--build-arg", &argument];
    let image = static_image("nats");
    archives.push(cached("nats", &key, &image, &args, &title(all), copy)?);
    Ok(archives)
}

/// The final stages of the Dockerfile that are images of their own.
const TARGETS: [&str; 5] = [
    "exchange-operator",
    "exchange",
    "exchange-user",
    "exchange-trade",
    "exchange-notification",
];

/// The releases of the exchange: tag, binary, and the fault of those that have one.
const RELEASES: [(&str, &str, Option<&str>); 7] = [
    ("1.0.0", "exchange", None),
    ("2.0.0", "exchange-2", None),
    ("2.0.1-fails-smoke", "exchange-faulty", Some("fails-smoke")),
    (
        "2.0.2-fails-verification",
        "exchange-faulty",
        Some("fails-verification"),
    ),
    ("2.0.3-crashes", "exchange-faulty", Some("crashes")),
    ("2.0.4-never-ready", "exchange-faulty", Some("never-ready")),
    ("2.0.5-slows-down", "exchange-faulty", Some("slows-down")),
];

/// The images of the exchange, the operator and the tests' agent, from binaries that cargo has built. An image whose archive is
/// there, made of the same, is not built again.
///
/// # Errors
/// If a binary is missing or an image cannot be built, or if `own`, one more release, has the tag of another.
pub fn services(
    tools: &Tools,
    repository: &Path,
    binaries: &Path,
    tag: &str,
    own: Option<&str>,
) -> Result<Vec<Archive>> {
    let others = || RELEASES.iter().map(|(version, ..)| *version).chain([tag]);
    if let Some(own) = own.filter(|own| others().any(|it| it == *own)) {
        bail!("RELEASE={own}: there is an image of this version already, take another");
    }
    let releases: Vec<_> = RELEASES
        .into_iter()
        .chain(own.map(|own| (own, "exchange-2", None)))
        .collect();
    // Alone: another build would find half a binary in `dist`, and the cleaning at the end would take its unnamed stages.
    let _lock = lock_images(&cache_dir()?.join("images"))?;
    let out = built_in(repository);
    fs::create_dir_all(&out)?;
    let dist = repository.join("dist");
    fs::create_dir_all(&dist)?;
    for binary in [
        "exchange",
        "exchange-2",
        "exchange-faulty",
        "exchange-operator",
        "testbed-agent",
    ] {
        let built = binaries.join(binary);
        ensure!(
            built.exists(),
            "there is no {}: `make images` builds it first",
            built.display()
        );
        // What a debugger wants would be most of an image.
        let mut strip = Command::new("strip");
        strip
            .args(["--strip-debug", "-o"])
            .args([&dist.join(binary), &built]);
        finish("strip", &mut strip, |_| {})?;
    }
    let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/images/agent.Dockerfile");
    let root = repository.join("Dockerfile");
    let base = format!("BASE={}", base_image(tools.dir())?);
    let common = ["--build-arg", &base, "--build-arg", "BINARIES=prebuilt"];
    let mut archives = Vec::new();
    let all = 1 + TARGETS.len() + releases.len();
    // The image's name and tag, its Dockerfile, the context and the binary that goes into it, arguments of its build.
    let mut make = |name: &str, tag: &str, file: &Path, context: &Path, binary: &str, args: &[&str]| {
        let image = format!("{PREFIX}/{name}:{tag}");
        let path = out.join(format!("{name}-{tag}.tar"));
        let made_of = key(&[
            &fs::read(file)?,
            &fs::read(dist.join(binary))?,
            args.join(" ").as_bytes(),
            base.as_bytes(),
        ]);
        let note = path.with_extension("key");
        let number = archives.len() + 1;
        if !(path.exists() && fs::read_to_string(&note).is_ok_and(|it| it == made_of)) {
            let mut step = Step::start(format!("image {number} of {all}: {image}"));
            let args = [&common, args].concat();
            build(&mut step, file, context, &args, &image, &path)?;
            fs::write(&note, made_of)?;
            step.done();
        }
        archives.push(Archive { image, path });
        anyhow::Ok(())
    };
    make("testbed-agent", tag, &agent, &dist, "testbed-agent", &[])?;
    for target in TARGETS {
        let binary = if target == "exchange-operator" {
            target
        } else {
            "exchange"
        };
        make(target, tag, &root, repository, binary, &["--target", target])?;
    }
    for (version, binary, fault) in releases {
        let target = fault.map_or("exchange", |_| "exchange-faulty");
        let arguments = [
            format!("BINARY={binary}"),
            format!("FAULT={}", fault.unwrap_or_default()),
        ];
        let mut args = vec!["--target", target];
        for argument in &arguments {
            args.extend(["--build-arg", argument]);
        }
        make("exchange", version, &root, repository, binary, &args)?;
    }
    // What the names pointed to before, and the stages: unnamed now, a gigabyte each time. An interrupted build has left its
    // container, too, which would keep them.
    buildah(&["rm", "--all"])?;
    buildah(&["rmi", "--prune", "--force"])?;
    Ok(archives)
}

/// Removes what image builds have left that were killed; nothing while one goes on.
///
/// # Errors
/// If it cannot be removed.
pub fn remove_leavings() -> Result<()> {
    let cache = cache_dir()?.join("images");
    let Ok(lock) = fs::File::open(cache.join("lock")) else {
        return Ok(()); // no image has ever been built
    };
    if lock.try_lock().is_err() {
        return Ok(());
    }
    let is_left = |path: &PathBuf| {
        let kind = path.extension().and_then(OsStr::to_str).unwrap_or_default();
        ["context", "scratch", "partial"].contains(&kind)
    };
    let places = [cache, built_in(results::repository()?)];
    let entries = places.iter().filter_map(|place| fs::read_dir(place).ok());
    let left = entries.flatten().flatten().map(|entry| entry.path());
    let left: Vec<PathBuf> = left.filter(is_left).collect();
    for path in &left {
        let removed = if path.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    // The container of the build, too.
    if !left.is_empty() {
        buildah(&["rm", "--all"])?;
    }
    let ours = cache_dir()?.join("buildah").join(LAYERS_ARE_OURS);
    // One in which somebody has put something resists.
    if ours.exists() && fs::remove_dir(LAYERS).is_ok() {
        fs::remove_file(ours)?;
    }
    Ok(())
}

/// Where a clone has the images of its own programs.
fn built_in(repository: &Path) -> PathBuf {
    repository.join("target/images")
}

/// Waits until no other process builds images.
fn lock_images(cache: &Path) -> Result<fs::File> {
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let lock = fs::File::create(cache.join("lock"))?;
    progress::lock(&lock, "another run that builds images").context("cannot lock the image cache")?;
    Ok(lock)
}

fn from_packages(tools: &Tools, recipe: &Recipe, image: &str, title: &str) -> Result<Archive> {
    let key = key_of_recipe(tools.dir(), recipe.name, recipe.packages)?;
    cached(recipe.name, &key, image, &[], title, |step, context| {
        root_file_system(step, recipe, context)
    })
}

/// The name of an image that a cluster has only one of.
fn static_image(name: &str) -> String {
    format!("{PREFIX}/{name}:{STATIC_TAG}")
}

/// The name of the image that others stand on. Clones share buildah's storage: under a name for all, one with other pins would
/// put its own beneath our programs.
fn base_image(pins: &Path) -> Result<String> {
    let key = key_of_recipe(pins, BASE.name, BASE.packages)?;
    Ok(format!("{PREFIX}/{}:{key}", BASE.name))
}

/// What an image is made of, in short.
fn key(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize()).chars().take(12).collect()
}

/// The same of one of the cache: its Dockerfile, its packages or what else it has, the users of all, and the tools' pins, by their
/// directory.
fn key_of_recipe(pins: &Path, name: &str, recipe: &str) -> Result<String> {
    let file = dockerfile(name);
    let file = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let pins = pins.as_os_str().as_encoded_bytes();
    Ok(key(&[&file, recipe.as_bytes(), USERS.as_bytes(), pins]))
}

fn dockerfile(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("cluster/images/{name}.Dockerfile"))
}

/// Builds an image unless the cache has it. The cache's key is everything the image is made of.
fn cached(
    name: &str,
    key: &str,
    image: &str,
    args: &[&str],
    title: &str,
    prepare: impl FnOnce(&mut Step, &Path) -> Result<()>,
) -> Result<Archive> {
    let cache = cache_dir()?.join("images");
    let archive = Archive {
        image: image.to_owned(),
        path: cache.join(format!("{name}-{key}.tar")),
    };
    if archive.path.exists() {
        return Ok(archive);
    }
    let _lock = lock_images(&cache)?;
    if archive.path.exists() {
        return Ok(archive); // somebody else built it while we waited
    }
    let mut step = Step::start(format!("{title} {image}"));
    let context = Scratch::new(cache.join(format!("{name}-{key}.context")))?;
    prepare(&mut step, context.path())?;
    build(
        &mut step,
        &dockerfile(name),
        context.path(),
        args,
        image,
        &archive.path,
    )?;
    step.done();
    Ok(archive)
}

/// Unpacks Debian packages into `rootfs.tar`, from where this machine has its own: a mirror, perhaps, where the Internet
/// cannot be reached.
fn root_file_system(step: &mut Step, recipe: &Recipe, context: &Path) -> Result<()> {
    let tar = context.join("rootfs.tar").display().to_string();
    let include = format!("--include={}", recipe.packages);
    // `extract` only unpacks: no package manager gets in, and no script of a package runs, so the users are ours to make.
    fs::write(context.join("passwd"), USERS)?;
    let authorities = Path::new("/etc/ssl/certs/ca-certificates.crt");
    fs::copy(authorities, context.join("ca-certificates.crt"))
        .with_context(|| format!("cannot copy {}", authorities.display()))?;
    let scratch = Scratch::new(context.join("scratch"))?;
    let mut command = sandbox::bound("mmdebstrap");
    command.args(["--variant=extract", &include, DEBIAN, &tar]);
    let names_it = |file: &&&str| fs::read_to_string(file).is_ok_and(|sources| sources.contains(DEBIAN));
    command.args(SOURCES.iter().find(names_it));
    finish("mmdebstrap", command.env("TMPDIR", scratch.path()), |line| {
        step.update(line);
    })
    .map_err(|error| explain_full_disk(error, context))
}

fn build(
    step: &mut Step,
    file: &Path,
    context: &Path,
    args: &[&str],
    image: &str,
    archive: &Path,
) -> Result<()> {
    let file = file.display().to_string();
    let mut all = vec![
        "build",
        "--isolation=chroot",
        "--pull-never",
        "--format=oci",
        "--layers=false",
        "--file",
        &file,
        "--tag",
        image,
    ];
    all.extend(args);
    let context = context.display().to_string();
    all.push(&context);
    // buildah, killed, leaves files where temporary ones go.
    let scratch = Scratch::new(archive.with_extension("scratch"))?;
    let mut run = |args: &[&str]| {
        let mut command = buildah_command()?;
        finish(
            "buildah",
            command.args(args).env("TMPDIR", scratch.path()),
            |line| {
                step.update(line);
            },
        )
        .map_err(|error| explain_full_disk(error, archive))
    };
    run(&all)?;
    // Written beside and renamed, so that an interrupted run leaves no half archive.
    let partial = archive.with_extension("partial");
    let _ = fs::remove_file(&partial);
    let target = format!("oci-archive:{}:{image}", partial.display());
    if let Err(error) = run(&["push", image, &target]) {
        let _ = fs::remove_file(&partial);
        return Err(error);
    }
    fs::rename(&partial, archive).with_context(|| format!("cannot write {}", archive.display()))
}

/// True if buildah has the image in its own storage, as a base for others.
fn stored(image: &str) -> Result<bool> {
    Ok(buildah_command()?
        .args(["inspect", "--type=image", image])
        .output()?
        .status
        .success())
}

/// Puts an archive back into buildah's storage, under its name, when that was cleared but our cache was not.
fn unpack(archive: &Archive) -> Result<bool> {
    let source = format!("oci-archive:{}", archive.path.display());
    let pulled = buildah_command()?.args(["pull", &source]).output()?;
    let id = String::from_utf8(pulled.stdout)?;
    buildah(&["tag", id.trim(), &archive.image])?;
    stored(&archive.image)
}

/// What buildah remembers of layers, for the whole machine; no option of its own says where.
const LAYERS: &str = "/var/lib/containers";
/// Says, beside our storage, that nobody had that directory before us.
const LAYERS_ARE_OURS: &str = "layers-are-ours";

/// buildah with a storage of ours, and places of ours for whatever else it writes down.
fn buildah_command() -> Result<Command> {
    let own = cache_dir()?.join("buildah");
    let (layers, networks) = (own.join("layers"), own.join("networks"));
    fs::create_dir_all(&layers).with_context(|| format!("cannot create {}", layers.display()))?;
    // Only to be hidden by our own.
    if !Path::new(LAYERS).exists() {
        fs::write(own.join(LAYERS_ARE_OURS), "")?;
        fs::create_dir_all(LAYERS).with_context(|| format!("cannot create {LAYERS}"))?;
    }
    let configuration = own.join("containers.conf");
    let text = format!("[network]\nnetwork_config_dir = \"{}\"\n", networks.display());
    fs::write(&configuration, text).with_context(|| format!("cannot write {}", configuration.display()))?;
    let mut command = sandbox::bound("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg(format!(r#"mount --bind "$0" {LAYERS} && exec buildah "$@""#))
        .arg(layers)
        .arg("--storage-driver=overlay")
        .arg("--root")
        .arg(own.join("root"))
        .arg("--runroot")
        .arg(own.join("run"))
        .env("CONTAINERS_CONF", configuration);
    Ok(command)
}

fn buildah(args: &[&str]) -> Result<()> {
    finish("buildah", buildah_command()?.args(args), |_| {})
}

/// Runs a command to its end; each line of its error output is told, and the last ones are the error if it fails.
fn finish(name: &str, command: &mut Command, mut tell: impl FnMut(&str)) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{name}`"))?;
    let mut last = VecDeque::new();
    if let Some(errors) = child.stderr.take() {
        for line in BufReader::new(errors).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            tell(&line);
            last.push_back(line);
            if last.len() > LINES_OF_AN_ERROR {
                last.pop_front();
            }
        }
    }
    ensure!(
        child.wait()?.success(),
        "`{name}` failed (`make deps` installs what images are built with):\n{}",
        Vec::from(last).join("\n")
    );
    Ok(())
}

/// Whether the cluster's containerd has all images of an archive, complete and unpacked.
#[must_use]
pub fn is_loaded(cluster: &Cluster, tools: &Tools, archive: &Archive) -> bool {
    let index = Command::new("tar")
        .args(["--extract", "--to-stdout", "--file"])
        .arg(&archive.path)
        .arg("index.json")
        .output();
    let index = index.ok().and_then(|it| serde_json::from_slice(&it.stdout).ok());
    let index: Value = index.unwrap_or_default();
    let is_there = |image: &Value| {
        let field = |pointer| image.pointer(pointer).and_then(Value::as_str);
        let name = field("/annotations/org.opencontainers.image.ref.name")?;
        let check = Command::new(tools.path("ctr"))
            .args(["images", "check", &format!("name=={name}")])
            .envs(cluster.environment(tools))
            .output();
        // REF TYPE DIGEST STATUS SIZE UNPACKED
        let check = String::from_utf8(check.ok()?.stdout).ok()?;
        let line = check.lines().find(|line| line.starts_with(name))?;
        let is_whole = line.contains(" complete ") && line.trim_end().ends_with(" true");
        Some(is_whole && line.contains(field("/digest")?))
    };
    let images = index.get("manifests").and_then(Value::as_array);
    images.is_some_and(|images| !images.is_empty() && images.iter().all(|it| is_there(it) == Some(true)))
}

/// Imports an image into the cluster's containerd.
///
/// # Errors
/// If the cluster does not run, the archive is not an image, or the disk is full.
pub fn load(cluster: &Cluster, tools: &Tools, archive: &Archive) -> Result<()> {
    sandbox::supervisor(cluster).with_context(|| cluster.does_not_run())?;
    let import = Command::new(tools.path("ctr"))
        .args(["images", "import"])
        .arg(&archive.path)
        .envs(cluster.environment(tools))
        .output()
        .context("cannot start `ctr`")?;
    if import.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&import.stderr).trim().to_owned();
    let error = anyhow::anyhow!(
        "cannot load {} as an OCI archive into cluster {:?}: {text}",
        archive.path.display(),
        cluster.name()
    );
    Err(explain_full_disk(error, cluster.home()))
}

/// Says what to do when an error comes from a full disk.
fn explain_full_disk(error: anyhow::Error, place: &Path) -> anyhow::Error {
    let directory = place
        .ancestors()
        .find(|path| path.is_dir())
        .unwrap_or_else(|| Path::new("/"));
    let free = statvfs(directory).map_or(u64::MAX, |disk| disk.blocks_available() * disk.fragment_size());
    // As Go says it, and as C does.
    let told = format!("{error:#}").to_lowercase();
    if told.contains("no space left on device") || free < 1 << 20 {
        return error.context(format!(
            "the disk of {} is full: make room and run the same command again; nothing half-written was kept",
            directory.display()
        ));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_with_other_pins_has_a_base_image_of_its_own() {
        let base = |pins: &str| base_image(Path::new(pins)).expect("a Dockerfile");
        assert_eq!(base("/cache/tools-1"), base("/cache/tools-1"));
        assert_ne!(base("/cache/tools-1"), base("/cache/tools-2"));
    }
}
