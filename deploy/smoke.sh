#!/usr/bin/env bash
# Asks a running foldserve, or a router in front of several, what matters and prints a verdict:
#   deploy/smoke.sh http://localhost:8000
# Needs bash, curl and python3. FOLDSERVE_API_KEY: a key, where the server asks for one. METRICS_KEY: one with the scope
# metrics, if that is another. METRICS_URL: where /metrics is, if not at URL (a router does not pass it on): a server's
# address, or empty to leave it out. TIMEOUT: seconds for one answer, 120 by default. The exit status is 0 if all is well,
# 1 if something is not, 2 for a wrong use.
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 URL" >&2
  exit 2
fi
url=${1%/}
metrics_url=${METRICS_URL-$url}
key=${FOLDSERVE_API_KEY:-}
image=iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAgMAAADXB5lNAAAACVBMVEXm5ubIHh4ePMiN2Yb7AAAAl0lEQVR42u3QsQ3CMBSE4S8mNFQUwDweIRIL0tNkhExBTQ8FPZFCkVgxQqAUhIorTk//+Z0t8wstYLnfnRMIKCpbOdigykFEmYGCwQbQh3EEayQnpKzMSp8UUl3x/sQLSG1x+so3QDtMzfSVrh+6D7f0be0IbkhOSFkzgi7vVKKJtKsDOAVcUecP62oX+Yr7cfYf+4PZ9QBa5RgkVBgdrgAAAABJRU5ErkJggg==
timeout_s=${TIMEOUT:-120}
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
failed=0

verdict() { # verdict STATUS NAME [DETAIL]
  if [[ $1 -eq 0 ]]; then
    printf 'ok    %s%s\n' "$2" "${3:+: $3}"
  else
    printf 'FAIL  %s%s\n' "$2" "${3:+: $3}"
    failed=1
  fi
}

ask() { # ask URL [BODY]: prints the status; the body is in $answer
  local options=(--silent --show-error --connect-timeout 10 --max-time "$timeout_s")
  options+=(--output "$answer" --write-out '%{http_code}')
  : > "$answer"
  if [[ $# -gt 1 ]]; then
    options+=(--header 'Content-Type: application/json' --data-binary "$2")
  fi
  # The key comes by a pipe: arguments can be seen by other users of this machine.
  curl "${options[@]}" --config <(
    [[ -z $key ]] || printf 'header = "Authorization: Bearer %s"\n' "$key"
  ) "$1" || true
}

usage() { # usage FIELD: a number of the answer's usage or usage.vision_tokens, -1 if there is none; of a stream, the last one
  python3 -c '
import json, sys
text = open(sys.argv[1]).read()
events = [line[6:] for line in text.splitlines() if line.startswith("data: {")] or [text]
usage = {}
for event in events:
    usage = json.loads(event).get("usage") or usage
print({**usage, **usage.get("vision_tokens", {})}.get(sys.argv[2], -1))' "$answer" "$1" 2> /dev/null || echo -1
}

excerpt() {
  head -c 300 "$answer" | tr '\n' ' '
}

chat() { # chat RATIO [MORE]: a body
  printf '{"messages": [{"role": "user", "content": [%s, %s]}], "max_tokens": 8, "reduction_ratio": %s%s}' \
    '{"type": "image_url", "image_url": {"url": "data:image/png;base64,'"$image"'"}}' \
    '{"type": "text", "text": "What is in this picture?"}' "$1" "${2:-}"
}

status=$(ask "$url/health/ready")
if [[ $status == 404 ]]; then # a router has its own
  status=$(ask "$url/health")
fi
if [[ $status == 200 ]]; then
  verdict 0 "health"
else
  verdict 1 "health" "status $status, $(excerpt)"
fi
if [[ $status == 000 ]]; then # curl has said why; the rest would wait as long, each time
  echo "FAIL  $url: nothing answers there"
  exit 1
fi

status=$(ask "$url/v1/chat/completions" "$(chat 0)")
full=$(usage kept) full_prompt=$(usage prompt_tokens)
if [[ $status == 200 && $full -gt 2 ]]; then
  verdict 0 "chat at ratio 0" "$full vision tokens, prompt of $full_prompt"
else
  verdict 1 "chat at ratio 0" "status $status, $(excerpt)"
fi

status=$(ask "$url/v1/chat/completions" "$(chat 0.66)")
kept=$(usage kept) prompt=$(usage prompt_tokens)
if [[ $status == 200 && $kept -gt 0 && $kept -lt $full && $((full_prompt - prompt)) -eq $((full - kept)) ]]; then
  verdict 0 "chat at ratio 0.66" "$kept vision tokens, prompt of $prompt"
else
  verdict 1 "chat at ratio 0.66" "status $status, kept $kept of $full, prompt of $prompt, $(excerpt)"
fi

status=$(ask "$url/v1/chat/completions" "$(chat 0.66 ', "stream": true, "stream_options": {"include_usage": true}')")
if [[ $status == 200 && $(usage kept) == "$kept" ]] && grep -q '^data: \[DONE\]' "$answer"; then
  verdict 0 "stream" "$(grep -c '^data: {' "$answer") events"
else
  verdict 1 "stream" "status $status, kept $(usage kept), $(excerpt)"
fi

status=$(ask "$url/v1/chat/completions" "$(chat 7)")
if [[ $status == 400 ]] && grep -q '"reduction_ratio"\|"reduction.ratio"' "$answer"; then
  verdict 0 "a bad ratio is refused"
else
  verdict 1 "a bad ratio is refused" "status $status, $(excerpt)"
fi

if [[ -n $metrics_url ]]; then
  status=$(key=${METRICS_KEY:-$key} ask "${metrics_url%/}/metrics")
  if [[ $status == 200 ]] && grep -q '^foldserve_vision_tokens_total{.*stage="kept"' "$answer"; then
    verdict 0 "metrics"
  else
    hint="a router does not pass them on: set METRICS_URL to a server, or empty; with keys, set METRICS_KEY too"
    verdict 1 "metrics" "status $status; $hint"
  fi
fi

if [[ $failed -eq 0 ]]; then
  echo "PASS  $url"
else
  echo "FAIL  $url"
fi
exit "$failed"
