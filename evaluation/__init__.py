"""How it is judged: likelihood and retrieval, each figure independent of batch size and mesh; and what figures are worth."""

from evaluation.annealing import AnnealingLaw as AnnealingLaw
from evaluation.annealing import fit_annealing_law as fit_annealing_law
from evaluation.causal import CausalPerplexity as CausalPerplexity
from evaluation.comparison import Comparison as Comparison
from evaluation.comparison import compare as compare
from evaluation.comparison import verdict as verdict
from evaluation.curves import Curve as Curve
from evaluation.intervals import Interval as Interval
from evaluation.intervals import over_examples as over_examples
from evaluation.intervals import over_seeds as over_seeds
from evaluation.laws import PowerLaw as PowerLaw
from evaluation.laws import fit_power_law as fit_power_law
from evaluation.masked import MaskedLikelihood as MaskedLikelihood
from evaluation.ndcg import ndcg as ndcg
from evaluation.paired import holm as holm
from evaluation.paired import sign_flip_test as sign_flip_test
from evaluation.paired import t_test as t_test
from evaluation.pseudo import PseudoPerplexity as PseudoPerplexity
from evaluation.reading import Evaluator as Evaluator
from evaluation.retrieval import Retrieval as Retrieval
