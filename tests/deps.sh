#!/bin/sh
# Installs the Debian packages that building and testing needs. Says what and why; does nothing that is done already.
# No service is started, now or with the machine: tests start their own servers.
# With --cluster it first says what else a test cluster needs, before anything has been built.
set -eu

if [ "${1:-}" = --cluster ] && [ "$(id -u)" != 0 ]; then
  echo "error: a test cluster needs root, for namespaces, mounts and cgroups: run this as root, or with sudo" >&2
  exit 1
fi

# package, a file that it brings, what for
wanted='
gcc              /usr/bin/gcc                          compiling Go and Rust code that uses C
libc6-dev        /usr/include/stdio.h                  the same
libseccomp-dev   /usr/include/seccomp.h                runc: pods with a seccomp profile
pkg-config       /usr/bin/pkg-config                   the same: how libseccomp is compiled in
ca-certificates  /etc/ssl/certs/ca-certificates.crt    downloads, and the list of authorities in images
mount            /bin/mount|/usr/bin/mount             the test cluster: volumes of pods, by the kubelet
util-linux       /usr/bin/unshare                      the test cluster: processes that end together
iproute2         /sbin/ip|/bin/ip|/usr/bin/ip          the test cluster: its own network
nftables         /usr/sbin/nft                         the test cluster: Services, by kube-proxy
curl             /usr/bin/curl                         trying the API by hand, as the demonstration says at its end
git              /usr/bin/git                          results: which commit they are of
buildah          /usr/bin/buildah                      images without a container engine
mmdebstrap       /usr/bin/mmdebstrap                   images: root file systems from Debian packages
postgresql-15    /usr/lib/postgresql/15/bin/postgres   integration tests
redis-server     /usr/bin/redis-server                 integration tests
'

missing=
reasons=
while read -r package files reason; do
  [ -n "$package" ] || continue
  found=
  old_ifs=$IFS; IFS='|'
  for file in $files; do [ -e "$file" ] && found=yes; done
  IFS=$old_ifs
  if [ -z "$found" ]; then
    missing="$missing $package"
    reasons="$reasons
  $package: $reason"
  fi
done <<END
$wanted
END

# Ends with how to get a program that is not in PATH: it may be where its installer puts it all the same.
#   not_in_path PROGRAM HOW DIRECTORY…
not_in_path() {
  program=$1
  how=$2
  shift 2
  for directory; do
    if [ -x "$directory/$program" ]; then
      how="it is in $directory: export PATH=\"$directory:\$PATH\""
      [ -z "${SUDO_USER:-}" ] || how="$how, and keep that over sudo: sudo env \"PATH=\$PATH\" make …"
      break
    fi
  done
  echo "error: $program is not in PATH; $how" >&2
  exit 1
}

# True if the first version is older than the second.
is_older() {
  [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | sort --version-sort | head -n 1)" = "$1" ]
}

# What Debian does not have new enough. Said at the end: `sudo make deps` has another PATH, and installs the packages all the same.
toolchains() {
  tests=$(dirname "$0")
  # Who has become root has another home than the one with the programs.
  home=$(getent passwd "${SUDO_USER:-$(id -un)}" | cut -d: -f6)
  go=$(sed -n 's/^go //p' "$tests/cluster/go.mod")
  rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$tests/../Cargo.toml")
  command -v go >/dev/null || not_in_path go "install Go $go or newer: the test cluster is built with it" \
    "$HOME/go/bin" "$home/go/bin" /usr/local/go/bin
  # Go itself fetches the version that go.mod asks for, if it may: then this is that version.
  version=$(cd "$tests/cluster" && go env GOVERSION) || version=$(GOTOOLCHAIN=local go env GOVERSION)
  if [ "${version#go}" != "$version" ] && is_older "${version#go}" "$go"; then
    echo "error: $(command -v go) is $version: install Go $go or newer and put it first into PATH" >&2
    exit 1
  fi
  command -v cargo >/dev/null || not_in_path cargo \
    "install rustup: the toolchain pinned in rust-toolchain.toml comes by itself" "$HOME/.cargo/bin" "$home/.cargo/bin"
  # With rustup this is the pinned one; Debian's own is years old.
  version=$(cd "$tests" && cargo --version | cut -d' ' -f2)
  if is_older "$version" "$rust"; then
    echo "error: $(command -v cargo) is $version: install rustup, and put its directory first into PATH" >&2
    exit 1
  fi
}

if [ -z "$missing" ]; then
  toolchains
  exit 0
fi

if ! command -v apt-get >/dev/null; then
  echo "error: this is not Debian; install by hand what these Debian packages have:$reasons" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "error: Debian packages are missing, and only root can install them:$reasons" >&2
  echo "Run \`sudo make deps\`, or everything as root: the test cluster needs root too." >&2
  exit 1
fi
echo "Installing Debian packages:$reasons"
# Debian's packages start their servers when installed, unless a policy says no.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  trap 'exit 1' HUP INT TERM
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
# They also start with the machine from then on. Those that were here before are somebody else's.
new=
for service in postgresql redis-server; do
  [ -e "/etc/init.d/$service" ] || new="$new $service"
done
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086 # a list of packages
apt-get install -q --yes --no-install-recommends $missing
for service in $new; do
  [ ! -e "/etc/init.d/$service" ] || update-rc.d "$service" disable
done
echo "Installed:$missing"
toolchains
