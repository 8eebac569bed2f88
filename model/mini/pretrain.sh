#!/usr/bin/env bash
# Train mini again, after `make setup`: model/mini/pretrain.sh DIR [OPTION OF TRAIN.PY ...]
# DIR contains the texts of texts.tsv as SLUG.txt (README.md).
set -euo pipefail
held_out="emma white-fang the-time-machine"
corpus=$(realpath "${1:?name the directory of the texts}")
shift
cd "$(dirname "$0")/../.."

out=.cache/mini
rm -rf $out/texts $out/model
mkdir -p $out/init $out/texts
cp model/mini/*.json $out/init
cp "$corpus"/*.txt $out/texts
for text in $held_out; do
    rm "$out/texts/$text.txt"
done
python=.venv/bin/python
$python train.py full --base $out/init --book $out/texts --out $out/run \
    --block-size 256 --stride 256 --batch-size 8 --epochs 4 --lr 1.5e-3 \
    --warmup-ratio 0.03 --weight-decay 0.1 --val-fraction 0.005 \
    --precision bf16 --eval-every 2000 --checkpoint-every 5m --log-every 50 --seed 1 "$@"
$python -m adapters.merge --base $out/run --precision fp16 --out $out/model
for text in $held_out; do
    $python evaluate.py --base $out/model --text "$corpus/$text.txt" --block-size 256
done
