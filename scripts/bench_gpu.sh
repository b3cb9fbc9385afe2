#!/usr/bin/env bash
# Everything that is measured on a GPU, in under nine minutes: the memory and time of each placement, then every case of
# `inkstream bench --cases gpu` beside diffusers, eager and compiled, as far as it is installed. Records go to
# benchmarks/records/; `python scripts/render_docs.py` then puts them into the docs.
#
#   scripts/bench_gpu.sh              # needs a GPU with 80 GiB for all cases
#   scripts/bench_gpu.sh --rehearse   # the same at tiny size on the CPU, to see that it works; writes no records
set -euo pipefail
cd "$(dirname "$0")/.."
limit=520 # seconds; the last case must have ended 20 before nine minutes are over
today=$(date +%F)

if [[ "${1:-}" == --rehearse ]]; then
    python scripts/plan_peaks.py pocket --pixels 64 --steps 2
    inkstream bench --cases gpu --rehearse --repeats 1
    exit
fi

export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # contenders share one card: what one has freed, another may need
timeout 150 python scripts/plan_peaks.py --date "$today" --record plans-gpu \
    random:z-image-turbo --pixels 1024 --steps 2 --dtype bf16 || echo "no memory of placements: see above" >&2
timeout $((limit - SECONDS)) inkstream bench --cases gpu --seconds $((limit - SECONDS - 110)) --record speed-gpu
