"""How it learns: runs, stages, optimizers and the loop."""

from training.adafactor import Adafactor as Adafactor
from training.conda import Conda as Conda
from training.ema import Ema as Ema
from training.fira import Fira as Fira
from training.galore import GaLore as GaLore
from training.guard import Guard as Guard
from training.lion import Lion as Lion
from training.muon import Muon as Muon
from training.optimizers import AdamW as AdamW
from training.optimizers import Groups as Groups
from training.optimizers import Lamb as Lamb
from training.optimizers import Sgd as Sgd
from training.ramp import ramp as ramp
from training.run import Run as Run
from training.run import Stage as Stage
from training.schedules import infinite as infinite
from training.schedules import inverse_square_root as inverse_square_root
from training.schedules import rewarm_redecay as rewarm_redecay
from training.schedules import wsd as wsd
from training.tensorboard import TensorBoard as TensorBoard
from training.weights_and_biases import WeightsAndBiases as WeightsAndBiases
