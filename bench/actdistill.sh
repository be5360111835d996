#!/usr/bin/env bash
# ActDistill in closed loop: a VLA on several MetaWorld tasks, its student with a part of the layers' FLOPs, and two baselines with as
# many: always the same layers, and layers drawn by chance. Two to three hours on two CPU cores; interrupted, the same command continues.
# From the repository's root, in an environment where xdfast is installed (PYTHON names its interpreter):
#
#   bash bench/actdistill.sh [runs] [episodes] [half|eighth|words] [seeds]
#
# half: recipe actdistill-metaworld, four layers of eight. eighth: actdistill-metaworld-experts, one of eight. Both take the teacher and
# the first stage from the same folder. words: actdistill-metaworld-words, one of eight on tasks of which two look alike, with a
# teacher of its own (give it another folder). The page is RUNS/half.html; its JSON becomes bench/results/cpu/actdistill.json
# (eighth.html, actdistill_eighth.json; words.html, actdistill_words.json). "0 1 2" trains student and static three times, each seed with
# a first stage of its own; the random baseline is trained once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONSAFEPATH=1
PYTHON="${PYTHON:-python3}"
runs="${1:-runs/actdistill}" episodes="${2:-60}" part="${3:-half}" seeds="${4:-0}"
teacher=vla-metaworld title="ActDistill on five MetaWorld tasks"
tasks="drawer-open drawer-close button-press-topdown door-open window-close"
case "$part" in
  half) recipe=actdistill-metaworld json=actdistill ;;
  eighth) recipe=actdistill-metaworld-experts json=actdistill_eighth ;;
  words)
    recipe=actdistill-metaworld-words json=actdistill_words teacher=vla-metaworld-words
    title="ActDistill on seven MetaWorld tasks, an eighth of the FLOPs"
    tasks="faucet-open faucet-close window-open window-close door-unlock coffee-button handle-press"
    ;;
  *) echo "the third argument is half, eighth or words, got $part" >&2; exit 2 ;;
esac
mkdir -p "$runs"
xdfast() { "$PYTHON" -P -m xdfast "$@"; }

xdfast finetune --recipe "$teacher" --out "$runs/vla"
all=("$runs/vla")
for seed in $seeds; do
  suffix=""; [[ "$seed" = 0 ]] || suffix="-$seed"
  for routing in learned static random; do
    [[ "$routing" = random && "$seed" != "${seeds%% *}" ]] && continue
    run="$runs/$part"; [[ "$routing" = learned ]] || run="$run-$routing"
    xdfast distill --recipe "$recipe" --teacher "$runs/vla" --routing "$routing" --seed "$seed" --stage1 "$runs/stage1$suffix" \
      --out "$run$suffix"
    all+=("$run$suffix")
  done
done
for run in "${all[@]}"; do
  for task in $tasks; do
    xdfast evaluate --model "$run" --task "$task" --episodes "$episodes" --videos 1
  done
done
xdfast report "${all[@]}" --title "$title" --out "$runs/$part.html"
cp "$runs/$part.json" "bench/results/cpu/$json.json"
