#!/usr/bin/env bash
# Kills, stops and cuts off ranks in the middle of calls, and lets ranks call different things: so many
# random cases of each kind and transport, with limits on the times, and their table in Markdown.
# 100 take two to three minutes after the build. Cut links need root and iproute2. The limits are for
# a machine that does little else.
# Usage: benches/faults.sh [CASES] [SEED]
set -euo pipefail
cd "$(dirname "$0")/.."
export COHORT_FAULTS=${1:-100}
[ $# -lt 2 ] || export COHORT_FAULTS_SEED=$2
cargo test --release -p collective --test faults --no-run
log=$(mktemp)
status=0
cargo test --release -p collective --test faults -- --nocapture --test-threads=1 2>&1 | tee "$log" || status=$?
printf '\n| fault | transport | cases | error, median | error, longest | next group, median | longest |\n'
printf '|---|---|---|---|---|---|---|\n'
grep '^| ' "$log"
echo "all lines are in $log"
exit "$status"
