"""How it learns: runs, stages, optimizers and the loop."""

from training.ema import Ema as Ema
from training.guard import Guard as Guard
from training.muon import Muon as Muon
from training.optimizers import AdamW as AdamW
from training.optimizers import Groups as Groups
from training.optimizers import Lamb as Lamb
from training.optimizers import Sgd as Sgd
from training.run import Run as Run
from training.run import Stage as Stage
