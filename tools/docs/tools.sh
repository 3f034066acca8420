#!/usr/bin/env bash
# Puts what builds the site into a virtual environment: mkdocs-material, and Mermaid, which draws the pictures of pages and
# which Material would have readers fetch from another host. Quick when nothing changed.
#   tools/docs/tools.sh PYTHON FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1 folder=$2
mermaid=11.17.2

wanted=$(cat tools/docs/tools.sh tools/docs/requirements.txt <(pwd) | sha256sum)
if [[ $(cat "$folder/stamp" 2> /dev/null) == "$wanted" ]]; then
  exit 0
fi
echo "docs: installing mkdocs-material into $folder; the first time takes a minute"
rm -f "$folder/stamp"
"$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r tools/docs/requirements.txt
bin=$(cd "$folder/bin" && pwd)
(cd "$folder" && PATH=$bin:$PATH npm pack --silent "mermaid@$mermaid" > /dev/null)
tar --extract --gzip --file "$folder/mermaid-$mermaid.tgz" --directory "$folder" --strip-components 2 package/dist/mermaid.min.js
rm "$folder/mermaid-$mermaid.tgz"
echo "$wanted" > "$folder/stamp"
