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

# What Debian does not have new enough. Said at the end: `sudo make deps` has another PATH, and installs the packages all the same.
toolchains() {
  modules=$(dirname "$0")/cluster
  wanted_go=$(sed -n 's/^go //p' "$modules/go.mod")
  if ! command -v go >/dev/null; then
    echo "error: Go is missing: install Go $wanted_go or newer and put it into PATH; the test cluster is built with it" >&2
    exit 1
  fi
  # Go itself fetches the version that go.mod asks for, if it may: then this is that version.
  version=$(cd "$modules" && go env GOVERSION) || version=$(GOTOOLCHAIN=local go env GOVERSION)
  oldest=$(printf '%s\n' "go$wanted_go" "$version" | sort --version-sort | head -n 1)
  if [ "$oldest" != "go$wanted_go" ] && [ "${version#go}" != "$version" ]; then
    echo "error: $(command -v go) is $version: install Go $wanted_go or newer and put it first into PATH" >&2
    exit 1
  fi
  if ! command -v cargo >/dev/null; then
    echo "error: cargo is not in PATH: install rustup; the toolchain pinned in rust-toolchain.toml comes by itself" >&2
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
