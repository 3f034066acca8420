#!/usr/bin/env bash
# Puts what these tests need into a virtual environment: vllm-router and Ray from PyPI; prometheus, promtool and docker-registry
# from PATH or from the packages of Debian or Ubuntu, which are unpacked, not installed.
set -euo pipefail
cd "$(dirname "$0")/../../.."
bin=$(cd "$1/bin" && pwd)

version=$(sed -n 's/^ARG VLLM_ROUTER_VERSION=//p' deploy/Dockerfile.router)
"$bin/python" -m pip install --quiet --disable-pip-version-check "vllm-router==$version" "ray[data]>=2.60"

unpack() { # unpack PACKAGE PROGRAM...
  local folder package=$1
  shift
  folder=$(mktemp -d)
  chmod 755 "$folder"
  (cd "$folder" && apt-get download "$package" > /dev/null && dpkg --extract "$package"_*.deb unpacked) || return 1
  (cd "$folder/unpacked/usr/bin" && cp "$@" "$bin/")
  rm -r "$folder"
}

need() { # need PACKAGE PROGRAM...
  if (cd "$bin" && ls "${@:2}" > /dev/null 2>&1); then
    return
  fi
  if command -v "${@:2}" > /dev/null; then
    command -v "${@:2}" | xargs ln -sf -t "$bin"
  elif ! { unpack "$@" 2> /dev/null || { apt-get update > /dev/null && unpack "$@"; }; }; then
    echo "test-deploy: ${*:2} are needed and were not found. Debian, Ubuntu: apt-get install $1; else put them into" \
      "$bin" >&2
    exit 1
  fi
}

need prometheus prometheus promtool
need docker-registry docker-registry
"$bin/promtool" --version | head -n 1
