#!/usr/bin/env bash
# The cluster tests, in a small world of their own: processes, network, mounts, /tmp and HOME are new, so that
# `ray stop` reaches nobody else's Ray, and nothing is left when they end, however they end.
# usage: tests/cluster/run.sh PYTHON [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."

not_here() {
  echo "cluster tests not run: $1"
  exit 0
}

[ "$(uname)" = Linux ] || not_here "they need Linux's namespaces"
[ "$(id -u)" = 0 ] || not_here "they make network namespaces and mounts, which only root may"
python=$(realpath -s "${1:?which python}")
shift

missing=()
for tool in sshd:openssh-server ssh:openssh-client ip:iproute2 rsync:rsync pgrep:procps; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "${tool%%:*}" > /dev/null || missing+=("${tool##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get > /dev/null || not_here "${missing[*]} missing, and no apt-get to install them"
  echo "installing ${missing[*]}"
  policy=/usr/sbin/policy-rc.d # installed, not started
  [ -e $policy ] || { trap 'rm -f $policy' EXIT; printf '#!/bin/sh\nexit 101\n' > $policy; chmod +x $policy; }
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
    > /dev/null || not_here "${missing[*]} missing, and apt-get could not install them"
fi

world() { unshare --mount --net --pid --ipc --uts --fork --kill-child --mount-proc "$@"; }
world bash -c 'mount -t tmpfs tmpfs /mnt && mkdir /mnt/{up,work,root} &&
  mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work /mnt/root' 2> /dev/null ||
  not_here "this machine gives no namespaces or overlay mounts (a container needs --privileged)"

mkdir -p build/cluster # logs, which outlive the small world
# A checkout or a python under /tmp stays where it is.
KEPT="$PWD $("$python" -c 'import sys; print(sys.prefix, sys.base_prefix)')"
export KEPT
world bash -c '
  set -e
  mount -t tmpfs tmpfs /mnt
  mkdir /mnt/tmp
  mount --rbind /tmp /mnt/tmp
  mount -t tmpfs tmpfs /tmp
  for place in $KEPT; do
    case "$place" in /tmp/*) mkdir -p "$place" && mount --bind "/mnt$place" "$place" ;; esac
  done
  cd "$PWD"
  mount -t tmpfs tmpfs /dev/shm
  mkdir /tmp/home
  ip link set lo up
  export HOME=/tmp/home TMPDIR=/tmp PATH="$(dirname "$0"):$PATH:/usr/sbin:/sbin"
  "$0" -m pytest -q -m cluster tests/cluster "$@" && exit 0 || exit $?' "$python" "$@"
