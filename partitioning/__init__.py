"""Where it runs: the mesh, the axis vocabulary and the rules between them."""

from partitioning.errors import UserError as UserError
from partitioning.mesh import make_mesh as make_mesh
from partitioning.rules import Placement as Placement
from partitioning.rules import Rules as Rules
from partitioning.rules import constrain as constrain
from partitioning.rules import data as data
from partitioning.rules import fsdp as fsdp
from partitioning.rules import fsdp_tensor as fsdp_tensor
from partitioning.rules import is_cut as is_cut
