#!/usr/bin/env bash
# Makes README's pictures and the tables beside them from the small files in benchmark/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmark/results
python benchmark/plot.py $results/readme/seed-* --out $results/readme/curve.png
python benchmark/plot.py $results/dmc4/seed-* --out $results/dmc4/curve.png
python benchmark/plot.py figure1 figure4 figure5 figure6 figure7 --scale laptop --runs $results/laptop/runs --out $results/laptop
