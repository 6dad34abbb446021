#!/usr/bin/env bash
# Makes the pictures of README and benchmark/results/README.md, and the tables beside them, from our own runs there.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmark/results
python benchmark/plot.py $results/readme/seed-* --labels "BRC, width 128" --out $results/readme/curve.png
python benchmark/plot.py $results/dmc4/seed-* --labels "BRC, width 256" --out $results/dmc4/curve.png
t=$results/transfer/fresh
python benchmark/plot.py $t/{reach-wall,button-press-topdown-wall}-{model,scratch,data}* \
  --labels model scratch data model scratch data --out $results/transfer/curve.png
o=$results/offline
python benchmark/plot.py $o/bc-only* $o/no-bc* $o/mse-0.03_* $o/mse-0.1_* $o/mse-0.3_* $o/mse-1_* --labels "BC only" \
  "c = 0" "c = 0.03" "c = 0.1" "c = 0.3" "c = 1" --out $o/curve.png
python benchmark/plot.py $o/fresh/bc-only* $o/fresh/no-bc* $o/fresh/mse-0.03_* $o/fresh/mse-0.3_* --labels "BC only" \
  "c = 0" "c = 0.03" "c = 0.3" --out $o/fresh/curve.png
python benchmark/plot.py $results/atari/atari2 --labels "narrow encoder" --out $results/atari/curve.png
a=$results/atari/cpu
python benchmark/plot.py $a/updown-* $a/mspacman-* $a/both-* --labels alone alone "one agent of both" --out $a/curve.png
l=$results/laptop
python benchmark/plot.py $l/runs/laptop-6-tasks-brc-128__19d68b__* $l/beside/six-ours-variant-* $l/beside/six-released-* \
  --labels "ours" "ours, --variant released-code" "released code" --out $l/beside/six.png
python benchmark/plot.py $l/beside/dmc-ours-[1-5] $l/beside/dmc-ours-variant-* $l/beside/dmc-released-* \
  --labels "ours" "ours, --variant released-code" "released code" --out $l/beside/dmc.png
m=$l/simba
python benchmark/plot.py $m/bronet__* $m/bronet-normalized__* $m/bronet-256__* $m/simba__* $m/simba-plain__* --labels BroNet \
  "BroNet, normalized observations" "BroNet, width 256" SimBa "SimBa without normalized observations" --out $m/curve.png
python benchmark/plot.py figure1 figure3 figure4 figure5 figure6 figure7 figure9 figure10 figure12 \
  --runs $l/runs --scale laptop --out $l/figures
rm $l/figures/*.pdf
python benchmark/readme_tables.py > $results/tables.md
