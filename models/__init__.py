"""What computes: trunks, blocks, mixers, feed-forward layers, experts, norms, positions, masks and heads."""

from models.attention import Attention as Attention
from models.block import Block as Block
from models.experts import Experts as Experts
from models.feed_forward import FeedForward as FeedForward
from models.heads import Scores as Scores
from models.heads import TiedHead as TiedHead
from models.masks import Bidirectional as Bidirectional
from models.masks import ByRow as ByRow
from models.masks import Causal as Causal
from models.masks import Chunk as Chunk
from models.masks import Mask as Mask
from models.masks import Matrix as Matrix
from models.masks import Permutation as Permutation
from models.masks import Prefix as Prefix
from models.masks import Sentinel as Sentinel
from models.masks import Window as Window
from models.norms import LayerNorm as LayerNorm
from models.norms import RMSNorm as RMSNorm
from models.positions import LearnedPositions as LearnedPositions
from models.side import Side as Side
from models.stack import Stack as Stack
from models.trunk import Output as Output
from models.trunk import Trunk as Trunk
from models.variables import Buffer as Buffer
from models.vocabulary import Vocabulary as Vocabulary
