"""Checkpoints of a run: written aside while training goes on, checked when read, restored onto any mesh.

Orbax writes and reshards. Of its two interfaces this uses the first (`CheckpointManager`): in the releases that Python
3.11 can have, the second is still under `orbax.checkpoint.experimental.v1`, and only the first leaves the reading side,
which here has to survive broken folders, separable from the managing side.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

import jax
import jax.numpy as jnp

from checkpoints.agreement import first_fault
from checkpoints.barrier import barrier
from checkpoints.faults import Background, BrokenError, writing
from checkpoints.folder import place
from checkpoints.frozen import Frozen
from checkpoints.leaves import checksums, compare, named_leaves, plain, plain_abstract, table
from checkpoints.preserved import Preserved
from checkpoints.reading import finished, in_bucket, read
from checkpoints.restoring import restored
from partitioning.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1
ASIDE = "aside"
AT_ONCE = 1 << 30
"""Bytes that `verify` holds at once; a larger leaf alone is held whole."""


class Checkpoints(Frozen):
    """The checkpoints in one folder.

    Each holds the arrays of a pytree by path, and a JSON record: the caller's metadata, and shape, dtype and checksum
    of every leaf. It appears under its step's number only when it is whole (in a bucket: with the object that Orbax
    writes last), so a killed write leaves nothing behind that could be taken for one. Reading never changes the folder.
    When a run goes on from a step, later checkpoints (broken ones, or another future's) are moved to `aside/` at its
    first save.

    Args:
      folder: local path or `gs://` address, which needs gcsfs; made by the first save.
      keep: how many of the newest checkpoints stay.
      every: steps between checkpoints, for `due`; None is never.
      best: the name of a figure in the metadata's `figures`, and `min` or `max`: the best checkpoint by it stays too.
      timeout_s: seconds that processes wait for each other, and for a write to end.
      on_broken: called with one line for every checkpoint that is skipped; None logs a warning.

    Raises:
      UserError: the folder is a file, or in a store that is not known; `keep` or `every` is less than 1.
    """

    def __init__(
        self,
        folder: str,
        *,
        keep: int = 3,
        every: int | None = None,
        best: tuple[str, Literal["min", "max"]] | None = None,
        timeout_s: int = 600,
        on_broken: Callable[[str], None] | None = None,
    ):
        from etils import epath

        if keep < 1 or (every is not None and every < 1):
            raise UserError(f"checkpoints: keep ({keep}) and every ({every}) must be 1 or more")
        path = epath.Path(place(folder))
        self.folder = path if in_bucket(folder) else path.expanduser().absolute()
        for part in (self.folder, *self.folder.parents):
            if part.exists():
                if not part.is_dir():
                    raise UserError(f"{part} is a file: checkpoints need a folder")
                break
        self.keep, self.every, self.timeout_s = keep, every, timeout_s
        self.tell = on_broken or (lambda line: log.warning("%s", line))
        self._preserved = Preserved(keep, best)
        self._manager: Any = None
        self._background: Any = None
        self._last: int | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return self.every is not None and step > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; some may prove broken. Unfinished writes do not count."""
        return sorted(int(path.name) for path in self._numbered() if finished(path))

    def _numbered(self) -> list[Any]:
        """The folders of steps, whole or not."""
        if not self.folder.exists():
            return []
        return [path for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir()]

    # -- writing

    def save(self, step: int, arrays: Any, metadata: Mapping[str, Any]) -> bool:
        """Copies the arrays and writes them in the background; the caller may change or donate them at once.

        Waits for the previous write first, and reports its failure: of all checkpoints one at most is not on the disk yet.

        Args:
          step: optimizer steps done.
          arrays: pytree of `jax.Array` (of any sharding, PRNG keys included), numpy arrays and numbers.
          metadata: anything JSON can hold: control log, data identity, versions, hash of the config.

        Returns:
          Whether it was written: False where this object has saved or restored the same step.

        Raises:
          UserError: the disk is full or may not be written to, or the previous write does not end within `timeout_s`.
          TimeoutError: a process did not come within `timeout_s`.
        """
        import orbax.checkpoint as ocp

        if step == self._last:
            return False
        barrier(f"save {step}", timeout_s=self.timeout_s)
        with writing(self.folder):
            self._set_aside()
            manager = self._open()
            self._background.wait(manager, timeout_s=self.timeout_s)
            flat = {name: plain(leaf) for name, leaf in named_leaves(arrays).items()}
            # Orbax refuses what has no elements; the record alone can give it back.
            full = {name: leaf for name, leaf in flat.items() if leaf.size}
            sums = checksums(full)
            leaves = {name: entry | {"checksum": sums.get(name)} for name, entry in table(flat).items()}
            record: dict[str, Any] = {"format": FORMAT, "step": step, "leaves": leaves, "metadata": dict(metadata)}
            self._preserved.note(step, record["metadata"])
            items = {"metadata": ocp.args.JsonSave(json.loads(json.dumps(record)))}
            if full:
                items["arrays"] = ocp.args.StandardSave(full)
            manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._last = step
        return True

    def wait(self) -> None:
        """Waits for the write under way.

        Raises:
          UserError: it failed for want of room or permission, or does not end within `timeout_s`.
        """
        if self._manager is not None:
            with writing(self.folder):
                self._background.wait(self._manager, timeout_s=self.timeout_s)

    def close(self) -> None:
        """Waits for the write under way and ends the threads; raises as `wait`."""
        manager, self._manager = self._manager, None
        if manager is None:
            return
        with writing(self.folder):
            try:
                self._background.wait(manager, timeout_s=self.timeout_s)
            finally:
                # On several hosts the others are not coming to where a failed write ends; one that hangs comes nowhere.
                if self._background.error is None or (jax.process_count() == 1 and not self._background.hangs):
                    manager.close()
                # Not before: the write may fail while it is waited for.
                self._background.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Any:
        """Orbax's manager, made by the first save, since making it clears unfinished writes away."""
        import orbax.checkpoint as ocp

        if self._manager is None:
            self._background = Background(self.folder)
            for step in self.steps():
                with suppress(BrokenError):
                    self._preserved.note(step, self.record(step)["metadata"])
            self.folder.mkdir(parents=True, exist_ok=True)
            processes = jax.process_count()
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=("arrays", "metadata"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._preserved,
                    # Made above; Orbax refuses to make it for named processes.
                    create=False,
                    # In a bucket it takes every folder that is no checkpoint for an unfinished one; see `_set_aside`.
                    cleanup_tmp_directories=not in_bucket(self.folder),
                    async_options=ocp.AsyncOptions(timeout_secs=self.timeout_s),
                    # Barriers over named processes time out; those over "all" are collectives that wait for ever.
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        active_processes=set(range(processes)) if processes > 1 else None
                    ),
                ),
            )
        return self._manager

    def _set_aside(self) -> None:
        """Moves what is newer than the state that this run goes on from out of the way, once."""
        if self._manager is not None:
            return
        if in_bucket(self.folder) and jax.process_index() == 0:
            for path in self._numbered():
                if not finished(path):
                    path.rmtree()
        newer = [step for step in self.steps() if self._last is None or step > self._last]
        if newer and jax.process_index() == 0:
            aside = self.folder / ASIDE
            aside.mkdir(parents=True, exist_ok=True)
            if not aside.exists():
                # A bucket has no empty folders, and nothing is moved to one that is not there.
                (aside / "README").write_text("Checkpoints that the run did not go on from.\n")
            for step in newer:
                (self.folder / str(step)).rename(aside / f"{step}-{time.time_ns()}")
                log.warning("%s: checkpoint %d is not of this run's past: moved to %s", self.folder, step, aside)
        barrier("set aside", timeout_s=self.timeout_s)

    # -- reading

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The newest complete checkpoint, or that of one step, laid out as `abstract` says.

        Args:
          abstract: pytree of `jax.ShapeDtypeStruct` with shardings (or arrays, whose values do not matter): the
            structure, shapes, dtypes and shardings to restore to. Any mesh restores any other's.
          step: None takes the newest that is whole, and reports those it skips.

        Returns:
          The arrays in the structure of `abstract`, and the metadata that was saved with them.

        Raises:
          UserError: there is no checkpoint; none is complete; it is of another model (which leaves differ).
        """
        return restored([self], abstract, step, whole=True)

    def restore_part(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """As `restore`, of some leaves only: parameters without the optimizer, one tree out of several."""
        return restored([self], abstract, step, whole=False)

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of one checkpoint.

        Raises:
          UserError: it is not there, or its record cannot be read.
        """
        try:
            return self.record(step)["metadata"]
        except BrokenError as error:
            raise UserError(f"{self.folder / str(step)}: {error}") from None

    def newest(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shape and dtype of every leaf of the newest checkpoint whose record can be read, and its metadata.

        Raises:
          UserError: there is none.
        """
        for step in reversed(self.steps()):
            try:
                record = self.record(step)
            except BrokenError:
                continue  # Said by the restore that follows.
            return record["leaves"], record["metadata"]
        raise UserError(f"{self.folder} has no checkpoint whose record can be read")

    def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf of a checkpoint as it is stored, for one device.

        Raises:
          UserError: its record cannot be read.
        """
        try:
            leaves = self.record(step)["leaves"]
        except BrokenError as error:
            raise UserError(f"{self.folder / str(step)}: {error}") from None
        shape = lambda entry: jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
        return {name: plain_abstract(shape(entry)) for name, entry in leaves.items()}

    def verify(self, step: int) -> None:
        """Reads a whole checkpoint, a part at a time on one device, and compares every leaf with its checksum.

        Its frozen trees are compared with their hashes.

        Raises:
          UserError: what cannot be read, or which leaves have changed.
        """
        parts: list[dict[str, Any]] = [{}]
        size = 0
        for name, leaf in self.shapes(step).items():
            size += leaf.size * leaf.dtype.itemsize
            if size > AT_ONCE:
                parts.append({})
                size = leaf.size * leaf.dtype.itemsize
            parts[-1][name] = leaf
        try:
            record = self.record(step)
            for part in parts:
                _check_sums(read(self.folder / str(step) / "arrays", part), record["leaves"])
        except BrokenError as error:
            raise UserError(f"{self.folder / str(step)}: {error}") from None
        for reference in record["metadata"].get("frozen", {}).values():
            self.load_frozen(reference, self.frozen_leaves(reference))

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint: its `leaves` with shape, dtype and checksum, and its `metadata`.

        Raises:
          BrokenError: it is missing or cannot be read.
        """
        path = self.folder / str(step) / "metadata" / "metadata"
        try:
            record = json.loads(path.read_text())
            if record["format"] != FORMAT:
                raise UserError(f"{path} is of format {record['format']}; this version reads {FORMAT}")
            if not isinstance(record["leaves"], dict) or not isinstance(record["metadata"], dict):
                raise TypeError("the record's parts are not tables")
        except OSError:
            raise BrokenError("its metadata is missing") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenError(f"its metadata cannot be read ({error})") from None
        return record

    def take(self, step: int, stored: Mapping[str, Any], *, whole: bool) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """A checkpoint's metadata and the leaves `stored` of it, with the bits that were saved; broken on all hosts or none.

        Args:
          step: of a checkpoint that is there.
          stored: abstract leaves by name, as they are stored.
          whole: whether these are all that it should have.

        Raises:
          BrokenError: it cannot be read, or is not as it was saved.
          UserError: it is of another model.
        """
        where, fault = self.folder / str(step), None
        try:
            record = self.record(step)
            compare(record["leaves"], table(stored), where=f"checkpoint {where}", whole=whole)
            flat = read(where / "arrays", stored)
        except BrokenError as error:
            fault = str(error)
        if (fault := first_fault(fault, timeout_s=self.timeout_s)) is not None:
            raise BrokenError(fault)
        _check_sums(flat, record["leaves"])
        return record["metadata"], flat

    def goes_on_from(self, step: int) -> None:
        """What is newer is not of this run's past: the first save moves it aside."""
        self._last = step


def _check_sums(flat: Mapping[str, jax.Array], leaves: Mapping[str, Any]) -> None:
    sums = checksums({name: leaf for name, leaf in flat.items() if leaf.size})
    changed = [name for name, value in sums.items() if value != leaves[name]["checksum"]]
    if changed:
        raise BrokenError(f"{len(changed)} leaves are not as they were saved, first {changed[0]!r}")
