# shellcheck shell=bash
# What scripts/run, scripts/test and scripts/bench share: installing what a fresh Debian lacks.

# How long another apt may hold its lock.
readonly APT_LOCK_SECS_MAX=300

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root to install Debian packages: run it as root, or install sudo, or install them yourself: $NEEDED"
    fi
}

# need COMMAND PACKAGE...: installs the Debian packages when the command is missing.
need() {
    local command=$1
    shift
    if command -v "$command" >/dev/null; then
        return
    fi
    NEEDED="$*"
    command -v apt-get >/dev/null || die "'$command' is missing, and this is no Debian: install it yourself"
    say "installing $* ('$command' is missing)"
    apt_install "$@" || die "'$command' is missing, and apt-get cannot install: $*"
    command -v "$command" >/dev/null || die "'$command' is still missing after installing: $*"
}

apt_install() {
    local options=(-o "DPkg::Lock::Timeout=$APT_LOCK_SECS_MAX" -y -q --no-install-recommends)
    # The index of a fresh system is empty, and that of an old one names packages that are gone.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "$@" >/dev/null 2>&1 || {
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "$@" >&2
    }
}

# The Rust that Cargo.toml asks for, or newer.
need_rust() {
    enter_cargo
    need cc build-essential
    local wanted
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    if rust_is_at_least "$wanted"; then
        return
    fi
    say "Rust $wanted or newer is missing: installing it"
    # Debian has rustup as a package from version 13 on; its own Rust is too old for this project.
    NEEDED=rustup
    command -v rustup >/dev/null || apt_install rustup || install_rustup || true
    if command -v rustup >/dev/null; then
        rustup toolchain install stable --profile minimal --component rustfmt --component clippy >&2 || true
        rustup default stable >&2 || true
    fi
    rust_is_at_least "$wanted" || die "keyfold needs Rust $wanted or newer and it could not be installed here: see https://rustup.rs"
}

install_rustup() {
    need curl curl ca-certificates
    local script
    script=$(mktemp)
    curl --proto '=https' --tlsv1.2 -sSf --connect-timeout 20 -o "$script" https://sh.rustup.rs &&
        sh "$script" -y --profile minimal --no-modify-path >&2 && enter_cargo
}

# What rustup installs is not in the PATH of a shell that is already open.
enter_cargo() {
    if [ -f "$HOME/.cargo/env" ]; then
        # shellcheck disable=SC1091
        . "$HOME/.cargo/env"
    fi
}

rust_is_at_least() {
    command -v cargo >/dev/null || return 1
    local have
    have=$(cargo --version 2>/dev/null | sed -n 's/^cargo \([0-9.]*\).*/\1/p')
    [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$1" "$have" | sort -V | head -n 1)" = "$1" ]
}
