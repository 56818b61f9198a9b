#!/usr/bin/env bash
# What this machine's accelerators do, within twelve minutes: whether their numbers can be trusted, the published training
# on all of them, what each technique of sdnb is worth on one, and how it scales.
#
#   benchmarks/gpu.sh [FOLDER]                               results go to FOLDER; default: runs/gpu-<time>
#   REFERENCE=PATH/train_text_to_image.py benchmarks/gpu.sh  also compares with the reference on one
#   MODEL=tiny STEPS=11 benchmarks/gpu.sh                    tries the script, such as on a CPU
#
# Send the folder to whoever lent the machine. Each part has a limit, and a part that fails does not end the others.
set -u
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
MODEL="${MODEL:-sd-v1-4-random}" # the architecture of Stable Diffusion v1-4, with random weights: no download
STEPS="${STEPS:-41}"
out="${1:-runs/gpu-$(date +%Y-%m-%d-%H%M%S)}"
mkdir -p "$out" || exit 1
echo "results: $out"
head -3 /proc/loadavg 2>/dev/null | sed 's/^/load: /'

part() { # NAME SECONDS COMMAND…
    local name="$1" limit="$2" began=$SECONDS status
    shift 2
    echo "== $name"
    timeout -k 10 "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    tail -n 12 "$out/$name.log"
    printf '%s\t%s\t%s s\n' "$name" "$([ $status = 0 ] && echo done || echo "exit $status")" "$((SECONDS - began))" \
        | tee -a "$out/parts.tsv"
}

published=(params/demo.yaml)
[ "$MODEL" = sd-v1-4-random ] && published=(params/reference.yaml --dataset_name openmoji-night --seed 42)
# The ranks of the published training, and those of which the scaling is measured: two where there is no accelerator.
counts=$("$PYTHON" -c '
from sdnb.machine.environment import devices
here = devices()
most = 2 if here.kind.is_host else here.ranks
print(here.ranks, *sorted({1, most} | {count for count in (2, 4) if count < most}))') || exit 1
read -r ranks several <<< "$counts"

part check 220 "$PYTHON" -m sdnb check --page "$out/check.html"
part train 200 "$PYTHON" -m sdnb train "${published[@]}" --pretrained_model_name_or_path "$MODEL" \
    --num_processes "$ranks" --steps "$STEPS" --output_dir "$out/train"
part speed 160 "$PYTHON" benchmarks/speed.py --model "$MODEL" --pairs 1 --steps "$STEPS" --minutes 2 --out "$out" \
    ${REFERENCE:+--reference "$REFERENCE"} --only "all on" "all off" reference sdnb
[ "$several" = 1 ] || part scaling 140 "$PYTHON" benchmarks/scaling.py --model "$MODEL" --ranks $several \
    --rounds 1 --repetitions 3 --out "$out"
echo "== all parts"
cat "$out/parts.tsv"
! grep -q 'exit ' "$out/parts.tsv"
