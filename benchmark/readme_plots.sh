#!/usr/bin/env bash
# Makes README's pictures, and the tables beside them, from the small files of our own runs in benchmark/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmark/results
python benchmark/plot.py $results/readme/seed-* --labels "BRC, width 128" --out $results/readme/curve.png
python benchmark/plot.py $results/dmc4/seed-* --labels "BRC, width 256" --out $results/dmc4/curve.png
# Figures 9 and 17 need no runs beyond those of Figure 1.
python benchmark/plot.py figure1 figure4 figure5 figure6 figure7 figure9 figure17 --scale laptop \
  --runs $results/laptop/runs --out $results/laptop
rm -f $results/laptop/*.pdf
