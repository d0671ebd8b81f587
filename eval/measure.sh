#!/usr/bin/env bash
# Measures the committed figures again and writes them where they are kept.
#   eval/measure.sh accuracy   on the pocket models: what policies keep (about four hours of two cores)
#   eval/measure.sh pretrained   on the pretrained pocket model: what policies keep at three budgets, and of 320 tokens (an hour and a half of two cores)
#   eval/measure.sh best       the README's table: settings compared on some questions, the best ones reported on others (minutes)
#   eval/measure.sh cost       what they cost: time and memory (about three hours; nothing else may run beside it)
#   eval/measure.sh serve      what policies change for a server, in the environment .ci/vllm makes (about ten minutes alone)
#   eval/measure.sh inside     the same of policies inside the decoder, and whether answers stay right (about an hour alone)
# Not among them: eval/results/peers.json (python -m vtr.eval.peers, environments of its own), m3-before.json (weights
# that are no longer shipped) and docs/results/apart.* (python -m vtr.eval.studies.apart, on backbones to be trained first).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH
runs=runs/measure
evaluate() { # NAME QUESTIONS SPECS…: a run of vtr eval
  local name=$1 limit=$2 specs
  specs=$(IFS=';' && echo "${*:3}")
  vtr eval -p "$specs" --limit "$limit" --processes 2 --out "$runs/$name"
}
everything() { # NAME OPTIONS…: all policies at a budget, kept as eval/results/NAME.json
  vtr eval -p all --processes 2 --out "$runs/$1" "${@:2}"
  cp "$runs/$1/results.json" "eval/results/$1.json"
}
pretrained() {
  local part percent of=(--model pocket-pretrained --max-new-tokens 8 --dtype bfloat16)
  python -m vtr.pocket.pretrained build
  for part in 50:160 25:1000 11:520; do # percent of the tokens, questions
    percent=${part%:*}
    everything "pretrained-$percent" "${of[@]}" --budget "0.$percent" --limit "${part#*:}"
  done
  everything pretrained-448 "${of[@]}" --budget 0.25 --data pocket:task=canvases,side=448 --limit 32
  local searched=(--model pocket-pretrained --calibration 24 --evaluation 64 --dtype bfloat16)
  vtr search gsearch "${searched[@]}" --out "$runs/gsearch"
  vtr search psigmoid --budget 0.25 --measure keep "${searched[@]}" --out "$runs/psigmoid"
  local specs="fastv:keep=0.1964;uniform:keep=0.25;random:keep=0.25" found
  for found in gsearch psigmoid; do
    specs+=";gsearch:schedule=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["settings"]["schedule"])' \
      "$runs/$found/vtr_policy.json" | tr -d ' ')"
  done
  vtr eval "${of[@]}" -p "$specs" --limit 1000 --out "$runs/pretrained-searched"
  cp "$runs/pretrained-searched/results.json" eval/results/pretrained-searched.json
}
accuracy() {
  best
  local part learnt="dynamic-llava:weights=pocket-joint"
  local internvl=(--model pocket-internvl --limit 480) joint=(--model pocket-joint --limit 480 --max-new-tokens 4)
  everything pocket --limit 2000
  everything pocket-internvl "${internvl[@]}" -p m3:tokens=1
  everything pocket-joint "${joint[@]}" -p "m3:tokens=1;$learnt"
  for part in 11:0.111 6:0.056; do # in names, of all tokens
    everything "pocket-${part%:*}" --budget "${part#*:}" --limit 2000
    everything "pocket-internvl-${part%:*}" --budget "${part#*:}" "${internvl[@]}"
    everything "pocket-joint-${part%:*}" --budget "${part#*:}" "${joint[@]}"
  done
  python -m vtr.eval.report.lost eval/results/pocket{,-joint,-internvl}{,-11,-6}.json --out docs/results/lost.png
  evaluate inside 2000 'ee-mllm:layers="all"' scm:keep=0.5 {uniform,random}:keep=0.0625,layer=2
  cp "$runs/inside/results.json" eval/results/inside.json
  learnt="none;pmod:weights=pocket-joint;$learnt;$learnt,forget=false"
  vtr eval --model pocket-joint --data pocket:task=listing --metric listing --limit 100 --processes 1 --out "$runs/lists" \
    -p "$learnt;m3:tokens=36;m3:tokens=9;pool:grid=6;uniform:keep=0.25,layer=2;random:keep=0.25,layer=2;fastv:keep=0.25,layer=2;downsample:scale=0.5"
  cp "$runs/lists/results.json" eval/results/listing.json
  evaluate scales 480 m3:tokens={36,9,1} globalcom2:retention={0.75,0.5,0.25,0.1} random:keep=0.1 uniform:keep=0.1 \
    pool:grid=4 fastv:keep=0.1,layer=1
  cp "$runs/scales/results.json" eval/results/scales.json
  python -m vtr.eval.studies.oracle "$runs/scales" -p "none;m3:tokens=36;m3:tokens=9;m3:tokens=1" --out docs/results
  evaluate m3 480 m3:tokens={36,9,1} uniform:keep={0.25,0.0625,0.0069},layer=0
  cp "$runs/m3/results.json" docs/results/m3-trained.json
  python -m vtr.eval.accuracy.kinds before=docs/results/m3-before.json trained=docs/results/m3-trained.json --out docs/results/m3
  local contenders=()
  for kept in 0.75 0.5 0.25 0.1; do
    contenders+=("globalcom2:retention=$kept" "globalcom2:retention=$kept,temperature=Infinity")
    contenders+=("random:keep=$kept,layer=0" "uniform:keep=$kept,layer=0")
  done
  evaluate globalcom2 240 "${contenders[@]}" fastv:keep={0.6875,0.375,0.0625} fastv:keep=0.02,layer=1 \
    pool:grid={10,8,6,4} downsample:scale={0.87,0.71,0.5,0.32}
  cp "$runs/globalcom2/results.json" docs/results/globalcom2.json
  python -m vtr.eval.accuracy.kinds docs/results/globalcom2.json --out docs/results/globalcom2
  python -m vtr.eval.studies.films --rows "$runs/films" --limit 240
  cp "$runs/films/results.json" eval/results/video.json
  python -m vtr.eval.studies.autoscale --out docs/results
  python -m vtr.eval.studies.auto --out docs/results
  python -m vtr.eval.studies.schedules --out docs/results --n 2000 --test-seed 1 --presets vtr/presets/pocket.json
  python -m vtr.eval.studies.budgets --out docs/results
  python -m vtr.eval.studies.budgets --out docs/results/low --keep 0.02 --keep 0.01
}
best() {
  local falling=gsearch:schedule=[1.0,0.6025,0.363,0.2187,0.1318,0.0794,0.0478,0.0288,0.0174,0.0105] spread early=0.1667 late=0.0625
  local settings=("m3:tokens=36" "fastv:keep=$early,layer=1" "fastv:keep=$late,layer=2" "$falling" "$falling,queries=last"
    "$falling,queries=text-max" "gsearch:schedule=[1.0,0.45,0.35,0.25,0.15,0.1,0.08,0.06,0.04,0.02]" gsearch:pocket-sigmoid-0.2)
  for spread in uniform random; do
    settings+=("$spread:keep=0.25" "$spread:keep=0.25,before_decoder=true" "$spread:keep=$early,layer=1" "$spread:keep=$late,layer=2")
  done
  vtr eval -p "$(IFS=';' && echo "${settings[*]}")" --seed 11 --limit 120 --processes 1 --out "$runs/settings"
  cp "$runs/settings/results.json" docs/results/settings.json
  vtr eval -p "$(python -m vtr.eval.studies.best docs/results/settings.json)" --limit 300 --latency 12 --processes 1 --out "$runs/best"
  cp "$runs/best/results.json" eval/results/best.json
}
cost() {
  python -m vtr.eval.studies.trained --out docs/results
  vtr bench engine --repeats 2 --json eval/results/engine.json
  vtr bench policies --small --budget 0.5 --budget 0.25 --budget 0.1 --json eval/results/policies.json
  vtr bench policies --shapes llava-next-mid --budget 0.25 --json eval/results/policies-anyres.json
  vtr bench batch --json eval/results/batch.json
  vtr bench scale --out eval/results
  vtr bench decode --out eval/results/decode.json
}
serve() {
  vllm
  python -m vtr.eval.cost.servable "$runs/mid" --layers 6
  behind serve pocket
  behind serve-mid "$runs/mid" --served-model-name "random LLaVA-1.5 of 6 layers × 512" --num-gpu-blocks-override 64
}
inside() {
  vllm
  local blocks=(--block-size 32 --num-gpu-blocks-override)
  local none=(--served-model-name "random LLaVA-1.5 of 12 layers × 512" "${blocks[@]}" 1536)
  python -m vtr.eval.cost.servable "$runs/mid12" --layers 12
  up inside 8000 "$runs/mid12" --decoder-policies -- "${none[@]}"
  vtr bench serve --inside --rounds 2 --json eval/results/serve-inside.json
  up plain 8001 "$runs/mid12" -- "${none[@]:0:2}" "${blocks[@]}" 256  # as much memory: a block is of all layers
  vtr bench serve --against http://127.0.0.1:8001 --load 1x16x8 --load 8x16x24 --load 8x64x16 --rounds 7 --json docs/results/serve-none.json
  down
  up full 8000 "$runs/mid12" --decoder-policies -- "${none[@]:0:2}" "${blocks[@]}" 700
  vtr bench serve --inside --load 24x64x24 --rounds 2 --json docs/results/serve-full.json
  down
  up pocket 8000 pocket --decoder-policies -- "${blocks[@]}" 1280
  vtr bench serve --inside --load 1x16x8 --load 8x16x24 --load 32x16x32 --load 8x128x16 --json eval/results/serve-inside-pocket.json
  evaluate served 200 "${INSIDE[@]}"
  python -m vtr.eval.accuracy.served "$runs/served" --json docs/results/served.json
  down
  up soak 8000 pocket --decoder-policies -- "${blocks[@]}" 512 --max-num-seqs 16 --mm-processor-cache-gb 0.05
  python -m vtr.eval.cost.soak --seconds 1500 --json docs/results/soak.json
}
INSIDE=(m3:tokens=36 'globalcom2:retention=0.4,budget="exact"' fastv:keep=0.25,layer=2 pyramid:positions=keep pyramid
  "gsearch:schedule=[1.0,0.7678,0.5895,0.4526,0.3475,0.2668,0.2049,0.1573,0.1208,0.0927]" pmod:weights=pocket
  dynamic-llava:weights=pocket pool:grid=8+fastv:keep=0.5,layer=2)
vllm() {
  export PATH=${VTR_VLLM_VENV:-$PWD/.venv-vllm}/bin:$PATH OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
  export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
  trap down EXIT
}
servers=()
up() { # NAME PORT MODEL OPTIONS OF VTR SERVE… -- OPTIONS OF VLLM…: a server, once it answers
  local name=$1 port=$2 model=$3 ours=()
  shift 3
  while [ "$1" != -- ]; do ours+=("$1") && shift; done
  vtr serve "$model" --port "$port" "${ours[@]}" -- --dtype float32 --enforce-eager --max-model-len 2048 \
    --max-num-seqs 32 --no-enable-prefix-caching "${@:2}" > "$runs/$name.log" 2>&1 &
  servers+=($!)
  until curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
    kill -0 $! || { tail "$runs/$name.log" >&2 && exit 1; }
    sleep 1
  done
}
down() { # all of them
  for server in "${servers[@]}"; do kill "$server" 2> /dev/null && wait "$server" || true; done
  servers=()
}
behind() { # RESULT MODEL OPTIONS OF VLLM…: a server, the bench, the server's end
  up "$1" 8000 "$2" -- "${@:3}"
  vtr bench serve --json "eval/results/$1.json"
  down
}
case ${1:-} in
  accuracy | best | pretrained | cost) "$1" ;;
  serve | inside) "$1" && exit ;;
  *) grep '^# ' "$0" | cut -c3- && exit 2 ;;
esac
python -m vtr.eval.report.readme
