"""Trees that never change: written once, under their content's hash."""

from collections.abc import Mapping
from typing import Any

import jax

from checkpoints.agreement import first_fault
from checkpoints.faults import BrokenError, writing
from checkpoints.leaves import content_hash, like_abstract, named_leaves, plain, plain_abstract
from checkpoints.reading import finished, read
from partitioning.errors import UserError

FROZEN = "frozen"


class Frozen:
    """The part of a checkpoints' folder that holds frozen trees.

    Args:
      folder: the checkpoints' own.
      timeout_s: seconds for a write to end.
    """

    folder: Any
    timeout_s: int

    def save_frozen(self, name: str, arrays: Any) -> dict[str, str]:
        """Writes a tree that never changes once, under its content's hash, and returns the reference to keep.

        Args:
          name: the tree's name, one path component.
          arrays: pytree of arrays.

        Returns:
          `{"path": folder relative to the checkpoints, "hash": SHA-256}`, for the metadata of checkpoints.

        Raises:
          UserError: the disk is full or may not be written to.
        """
        import orbax.checkpoint as ocp

        flat = {leaf_name: plain(leaf) for leaf_name, leaf in named_leaves(arrays).items()}
        digest = content_hash(flat)
        reference = {"path": f"{FROZEN}/{name}-{digest[:12]}", "hash": digest}
        target = self.folder / reference["path"]
        if not finished(target):
            with writing(self.folder):
                target.parent.mkdir(parents=True, exist_ok=True)
                with ocp.StandardCheckpointer(async_options=ocp.AsyncOptions(timeout_secs=self.timeout_s)) as writer:
                    # A killed write may have left a part of it in a bucket.
                    writer.save(target, {key: leaf for key, leaf in flat.items() if leaf.size}, force=True)
                    writer.wait_until_finished()
        return reference

    def frozen_leaves(self, reference: Mapping[str, str]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each leaf of a frozen tree.

        Raises:
          UserError: it is missing or cannot be read.
        """
        import orbax.checkpoint as ocp

        where = self.folder / reference["path"]
        if not where.exists():
            raise UserError(f"the frozen tree {where} is missing: copy it there, or start the run anew")
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                found = reader.metadata(where).item_metadata.tree
        # As in `read`.
        except Exception as error:
            raise UserError(f"the frozen tree {where} cannot be read ({type(error).__name__}: {error})") from error
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in found.items()}

    def load_frozen(self, reference: Mapping[str, str], abstract: Any) -> Any:
        """A frozen tree in the structure and shardings of `abstract`, with the content its reference names.

        Raises:
          UserError: it is missing or cannot be read, or its content has another hash.
        """
        where, fault = self.folder / reference["path"], None
        wanted = named_leaves(abstract)
        try:
            flat = read(where, {name: plain_abstract(leaf) for name, leaf in wanted.items()})
        except BrokenError as error:
            fault = f"the frozen tree {where} cannot be restored: {error}"
            if not where.exists():
                fault = f"the frozen tree {where} is missing: copy it there, or start the run anew"
        # The hash is all hosts' work: none begins it alone.
        if (fault := first_fault(fault, timeout_s=self.timeout_s)) is not None:
            raise UserError(fault)
        digest = content_hash(flat)
        if digest != reference["hash"]:
            raise UserError(
                f"the frozen tree {where} has hash {digest[:12]}, not {reference['hash'][:12]}: not that tree"
            )
        leaves = [like_abstract(flat[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
