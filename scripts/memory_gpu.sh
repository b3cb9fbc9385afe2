#!/bin/sh
# Peak memory and time of Z-Image-Turbo at 1024 pixels, for every plan and precision, on a GPU, at random weights.
#
#   sh scripts/memory_gpu.sh [FOLDER] [PRECISION ...]
#
# Models are made in FOLDER (about 60 GB for all) and stay there: a command that was cut off goes on. Each precision has
# a record of its own, benchmarks/records/memory-gpu-PRECISION.json. MODEL, PIXELS, STEPS and DEVICE may be set: a
# rehearsal on the CPU is  MODEL=pocket PIXELS=64 STEPS=1 DEVICE=cpu sh scripts/memory_gpu.sh /tmp/rehearsal
set -eu
folder=${1:-/tmp/inkstream-memory}
[ $# -gt 0 ] && shift
precisions=${*:-bf16 fp8 q8_0 q4_k nf4}
model=${MODEL:-z-image-turbo}
mkdir -p "$folder"
if [ ! -d "$folder/bf16" ]; then
    rm -rf "$folder/making"
    python -c "
import sys
from pathlib import Path
from inkstream.bench.random_model import write_random
from inkstream.families import SPECS
write_random(SPECS[sys.argv[1]], Path(sys.argv[2]))
" "$model" "$folder/making"
    mv "$folder/making" "$folder/bf16"
fi
for precision in $precisions; do
    [ -d "$folder/$precision" ] || inkstream convert "$folder/bf16" "$folder/$precision" --quant "$precision"
    python scripts/plan_peaks.py "$folder/$precision" --device "${DEVICE:-cuda}" --pixels "${PIXELS:-1024}" \
        --steps "${STEPS:-8}" --date "$(date +%F)" --record "memory-gpu-$precision${REHEARSAL:-}"
done
