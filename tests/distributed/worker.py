"""Runs the training configurations named as arguments one after the other, as one rank of a group."""

import sys

from stack import config, dist
from stack.train.loop import train
from stack.train.recipe import TrainConfig

dist.init()
for path in sys.argv[1:]:
    train(config.load(TrainConfig, path))
dist.shutdown()
