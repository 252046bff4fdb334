#!/bin/bash
# Breaks the operator's guards, each alone, and has it live through the simulated histories: prints the first that comes to harm, as
# a row of the table in docs/architecture.md, and fails if one comes to none. All patches of this directory, or those given. Works
# on HEAD, in a work tree of its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(git -C "$here" rev-parse --show-toplevel)
work=$root/target/mutants
tree=$work/tree
export CARGO_TARGET_DIR=$work/target RUSTFLAGS=--cap-lints=allow RUST_BACKTRACE=0
[ $# -gt 0 ] || set -- "$here"/*.patch

mkdir -p "$work"
git -C "$root" worktree prune
[ -e "$tree" ] || git -C "$root" worktree add --quiet --detach "$tree"
git -C "$tree" checkout --quiet --force --detach "$(git -C "$root" rev-parse HEAD)"
trap 'git -C "$tree" checkout --quiet --force' EXIT

unharmed=0
for patch; do
  name=$(sed -n '1s/^# //p' "$patch")
  git -C "$tree" checkout --quiet --force
  git -C "$tree" apply "$(realpath "$patch")" || { echo "error: $patch does not fit any more: write it anew" >&2; exit 1; }
  log=$work/$(basename "$patch" .patch).log
  cargo test --quiet --manifest-path "$tree/Cargo.toml" --workspace --locked --test decide --no-run
  if cargo test --quiet --manifest-path "$tree/Cargo.toml" --workspace --locked --test decide histories:: &>"$log"; then
    unharmed=$((unharmed + 1))
    echo "| $name | – | nothing, in 10,000 histories |"
  else
    seed=$(sed -n 's/.*make simulate SEED=\([0-9]*\).*/\1/p' "$log" | head -n 1)
    # What follows the steps of the history, up to how it came to that.
    why=$(sed -n '/make simulate SEED=/{n;p;q}' "$log" | cut -c 1-150)
    echo "| $name | $seed | $why |"
  fi
done
[ "$unharmed" = 0 ] || { echo "error: the simulation does not catch $unharmed of them" >&2; exit 1; }
