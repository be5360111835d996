#!/usr/bin/env bash
# ActDistill in closed loop: a VLA on five MetaWorld tasks, its student with half of the layers' FLOPs, and two baselines with as many:
# always the same layers, and layers drawn by chance. About two hours on two CPU cores; interrupted, the same command continues.
# From the repository's root, in an environment where xdfast is installed (PYTHON names its interpreter):
#
#   bash bench/actdistill.sh [runs] [episodes]
#
# The page is runs/actdistill.html; its JSON becomes bench/results/cpu/actdistill.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONSAFEPATH=1
PYTHON="${PYTHON:-python3}"
runs="${1:-runs/actdistill}" episodes="${2:-60}"
mkdir -p "$runs"
xdfast() { "$PYTHON" -P -m xdfast "$@"; }

xdfast finetune --recipe vla-metaworld --out "$runs/vla"
xdfast distill --recipe actdistill-metaworld --teacher "$runs/vla" --out "$runs/half"
for routing in static random; do
  xdfast distill --recipe actdistill-metaworld --teacher "$runs/vla" --routing "$routing" --stage1 "$runs/half/stage1" --out "$runs/$routing"
done
for run in vla half static random; do
  for task in drawer-open drawer-close button-press-topdown door-open window-close; do
    xdfast evaluate --model "$runs/$run" --task "$task" --episodes "$episodes" --videos 1
  done
done
xdfast report "$runs/vla" "$runs/half" "$runs/static" "$runs/random" --title "ActDistill on five MetaWorld tasks" --out "$runs/actdistill.html"
cp "$runs/actdistill.json" bench/results/cpu/actdistill.json
