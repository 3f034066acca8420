#!/usr/bin/env bash
# Puts the clients into a folder: two virtual environments, since they don't agree on a version of openai, with Node from
# PyPI, and Node's packages. Quick when nothing changed. A JDK must be there.
#   tests/clients/tools.sh PYTHON FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1 folder=$2
here=tests/clients

if ! java --list-modules 2> /dev/null | grep --quiet '^jdk.compiler@\(1[7-9]\|[2-9][0-9]\)'; then
  echo "test-clients: a JDK, 17 or later, is needed in PATH and was not found. Debian, Ubuntu: apt-get install" \
    "default-jdk-headless" >&2
  exit 1
fi

wanted=$(cat "$here"/tools.sh "$here"/*.txt "$here"/node/* "$here"/node/.npmrc <(pwd) | sha256sum)
if [[ $(cat "$folder/stamp" 2> /dev/null) == "$wanted" ]]; then
  exit 0
fi
echo "test-clients: installing the clients into $folder; the first time takes a minute or two"
rm -f "$folder/stamp"
mkdir -p "$folder/node"

install() {
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r "$here/$1.txt"
}

node_packages() {
  cp "$here"/node/* "$here"/node/.npmrc "$folder/node/"
  PATH=$(cd "$folder/openai-3/bin" && pwd):$PATH npm --prefix "$folder/node" ci --silent
}

install openai-2 &
other=$!
trap 'kill "$other" 2> /dev/null || true' EXIT
install openai-3
node_packages
wait "$other"
echo "$wanted" > "$folder/stamp"
