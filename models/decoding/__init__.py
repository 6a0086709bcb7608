"""Generation: from prompts to continuations."""

from models.decoding.beam import Beam as Beam
from models.decoding.contrastive import Contrastive as Contrastive
from models.decoding.decoder import Decoder as Decoder
from models.decoding.decoder import Prompts as Prompts
from models.decoding.decoder import TrunkDecoder as TrunkDecoder
from models.decoding.filters import MinP as MinP
from models.decoding.filters import TopK as TopK
from models.decoding.filters import TopP as TopP
from models.decoding.loop import Continuations as Continuations
from models.decoding.loop import Stop as Stop
from models.decoding.loop import Strategy as Strategy
from models.decoding.loop import finish as finish
from models.decoding.loop import generate as generate
from models.decoding.sampler import Greedy as Greedy
from models.decoding.sampler import Sampler as Sampler
from models.decoding.sampling import Samples as Samples
from models.decoding.sampling import sample as sample
from models.decoding.two_sided import TwoSidedDecoder as TwoSidedDecoder
from models.decoding.two_sided import decoder_of as decoder_of
from models.decoding.unrolled import unrolled as unrolled
