#!/usr/bin/env bash
# What action.yml runs: inspect the models, then scan them, write the results, and fail as was asked.
# Everything comes through the environment (see action.yml); it runs anywhere else in the same way.
set -euo pipefail

models=${UNBACKDOOR_MODELS:?name the models}
output=${UNBACKDOOR_OUTPUT:-unbackdoor-results}
fail_on=${UNBACKDOOR_FAIL_ON:-undecided}
case $fail_on in found | undecided | never) ;; *)
  echo "fail-on: expected found, undecided or never, got $fail_on" >&2
  exit 2
  ;;
esac

global=()
[[ -z ${UNBACKDOOR_CONFIG:-} ]] || global+=(--config "$UNBACKDOOR_CONFIG")
mkdir -p "$output"
tell() { printf '%s=%s\n' "$1" "$2" >>"${GITHUB_OUTPUT:-/dev/null}"; }

code=0
unbackdoor "${global[@]}" inspect --json --quiet -- "$models" >"$output/inspect.json" || code=$?
json=$output/inspect.json sarif=
if [[ ${UNBACKDOOR_INSPECT_ONLY:-false} != true && $code != 1 ]]; then
  # A file that executes code is never scanned: that answer is enough.
  options=(--json --quiet --force --report "$output/reports" --sarif "$output/scan.sarif")
  [[ -z ${UNBACKDOOR_IMAGES:-} ]] || options+=(--data "$UNBACKDOOR_IMAGES")
  [[ -z ${UNBACKDOOR_CHECKS:-} ]] || options+=(--checks "$UNBACKDOOR_CHECKS")
  [[ -z ${UNBACKDOOR_BUDGET:-} ]] || options+=(--budget "$UNBACKDOOR_BUDGET")
  code=0
  unbackdoor "${global[@]}" scan "${options[@]}" -- "$models" >"$output/scan.json" || code=$?
  json=$output/scan.json
  [[ ! -e $output/scan.sarif ]] || sarif=$output/scan.sarif
fi
tell exit-code "$code"
tell json "$json"
tell sarif "$sarif"
echo "unbackdoor: exit code $code (0 nothing found, 1 found, 2 undecided or an error, 3 unsupported); $json"

case $fail_on in
  never) exit 0 ;;
  found) [[ $code != 1 ]] || exit 1 ;;
  undecided) exit "$code" ;;
esac
