#!/usr/bin/env bash
# Puts what these tests need into a virtual environment: vllm-router and Ray from PyPI; prometheus and promtool from PATH or from
# the package of Debian or Ubuntu, which is unpacked, not installed.
set -euo pipefail
cd "$(dirname "$0")/../../.."
bin=$(cd "$1/bin" && pwd)

version=$(sed -n 's/^ARG VLLM_ROUTER_VERSION=//p' deploy/Dockerfile.router)
"$bin/python" -m pip install --quiet --disable-pip-version-check "vllm-router==$version" "ray[data]>=2.60"

unpack() {
  local folder
  folder=$(mktemp -d)
  chmod 755 "$folder"
  (cd "$folder" && apt-get download prometheus > /dev/null && dpkg --extract prometheus_*.deb unpacked) || return 1
  cp "$folder"/unpacked/usr/bin/prom{etheus,tool} "$bin/"
  rm -r "$folder"
}

if [[ ! -x $bin/promtool ]]; then
  if command -v prometheus promtool > /dev/null; then
    ln -sf "$(command -v prometheus)" "$(command -v promtool)" "$bin/"
  elif ! { unpack 2> /dev/null || { apt-get update > /dev/null && unpack; }; }; then
    echo "test-deploy: prometheus and promtool are needed and were not found. Debian, Ubuntu: apt-get install" \
      "prometheus; else put both into $bin" >&2
    exit 1
  fi
fi
"$bin/promtool" --version | head -n 1
