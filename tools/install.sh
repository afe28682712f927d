#!/usr/bin/env bash
# Install what this machine lacks to run the program and its tests: Debian packages, then a
# virtual environment with the locked dependencies. Quick and silent when everything is there.
#
#   tools/install.sh [VENV]        default: .venv beside the Makefile
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
PATH=$PATH:/usr/sbin:/sbin  # where Debian keeps mkfs.xfs, and no user's PATH leads

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

# Each probe names the Debian package that answers it.
missing_packages() {
    local python=$1 command package
    while read -r command package; do
        command -v "$command" >/dev/null || echo "$package"
    done <<'LIST'
fusermount3 fuse3
mkfs.xfs xfsprogs
fio fio
setfattr attr
setfacl acl
gcc gcc
pkg-config pkg-config
LIST
    echo '#include <stdlib.h>' | gcc -E - >/dev/null 2>&1 || echo libc6-dev
    pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev
    ldconfig -p | grep -q 'libjemalloc\.so' || echo libjemalloc2
    if [ -z "$python" ]; then
        printf '%s\n' python3 python3-dev python3-venv
        return
    fi
    "$python" -c 'import ensurepip' 2>/dev/null || echo python3-venv
    "$python" - 2>/dev/null <<'PYTHON' || echo python3-dev
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
PYTHON
}

install_packages() {
    local packages
    packages=$(missing_packages "$(find_python)" | sort -u | tr '\n' ' ')
    [ -n "${packages// /}" ] || return 0
    say "missing Debian packages: $packages"
    command -v apt-get >/dev/null ||
        die "no apt-get here: install these (or your system's equivalents) and run this again"
    [ "$(id -u)" = 0 ] ||
        die "installing them needs root: sudo apt-get install $packages"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >&2
    # shellcheck disable=SC2086  # a list on purpose
    apt-get install -q -y --no-install-recommends $packages >&2
}

install_venv() {
    local python stamp wanted
    stamp=$venv/.installed
    wanted=$(cat requirements.lock pyproject.toml tools/install.sh | sha256sum)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] &&
        "$venv/bin/python" -c '' 2>/dev/null; then
        return 0
    fi
    python=$(find_python)
    [ -n "$python" ] || die "no Python 3.11 or newer here, and the distribution's is older"
    say "building $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check \
        --require-hashes -r requirements.lock >&2
    "$venv/bin/python" -m pip install -q --disable-pip-version-check \
        --no-deps --no-build-isolation --editable . >&2
    printf '%s\n' "$wanted" >"$stamp"
    say "done"
}

install_packages
install_venv
