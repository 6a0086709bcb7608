"""What is learned: frozen dataclasses of selection, corruption, loss, companions and preparation."""

from objectives.base import Companion as Companion
from objectives.base import Loss as Loss
from objectives.base import Models as Models
from objectives.base import Objective as Objective
from objectives.base import Term as Term
from objectives.causal_lm import CausalLM as CausalLM
from objectives.compose import Phases as Phases
from objectives.compose import Weighted as Weighted
from objectives.contrastive import InfoNCE as InfoNCE
from objectives.controller import Controller as Controller
from objectives.dpo import DPO as DPO
from objectives.draws import Draws as Draws
from objectives.electra import Electra as Electra
from objectives.emo import EMO as EMO
from objectives.gpt_bert import GPTBert as GPTBert
from objectives.grpo import GRPO as GRPO
from objectives.listwise import ListNet as ListNet
from objectives.masked_diffusion import MaskedDiffusion as MaskedDiffusion
from objectives.masked_lm import MaskedLM as MaskedLM
from objectives.mixing import ExcessLossMixing as ExcessLossMixing
from objectives.momentum_queue import MomentumQueue as MomentumQueue
from objectives.replace import Replace as Replace
from objectives.retromae import RetroMAE as RetroMAE
from objectives.rewards import TokenShare as TokenShare
from objectives.select import RandomTokens as RandomTokens
from objectives.token_loss import TokenLoss as TokenLoss
