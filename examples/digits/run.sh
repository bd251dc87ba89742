#!/usr/bin/env bash
# The README's main job: builds `cluster`, trains on two ranks, and shows a prediction.
set -euo pipefail
cd "$(dirname "$0")/../.."

cargo build --release --locked
cluster=${CARGO_TARGET_DIR:-target}/release/cluster

run=$(mktemp -d "${TMPDIR:-/tmp}/cohort-digits.XXXXXX")
"$cluster" submit --local --dir "$run" examples/digits/job.toml

model=$(dirname "$(find "$run/store/jobs/digits/model" -name model.safetensors)")
printf '\nThis image was held out; what is it?\n'
python3 - 2>/dev/null <<'PY' || true
import json
pixels = json.load(open("examples/digits/sample.json"))["pixels"]
for row in range(8):
    print("  " + "".join(" .:-=+*#%@"[min(9, int(p * 9 / 16))] * 2 for p in pixels[8 * row:8 * row + 8]))
PY
"$cluster" predict "$model" --input examples/digits/sample.json
