"""How it is judged: likelihood and retrieval, each figure independent of batch size and mesh."""

from evaluation.causal import CausalPerplexity as CausalPerplexity
from evaluation.masked import MaskedLikelihood as MaskedLikelihood
from evaluation.ndcg import ndcg as ndcg
from evaluation.pseudo import PseudoPerplexity as PseudoPerplexity
from evaluation.reading import Evaluator as Evaluator
from evaluation.retrieval import Retrieval as Retrieval
