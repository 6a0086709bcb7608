"""Folders in the Hugging Face layout: a config and safetensors, read a tensor at a time and written in one go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.families.bert import bert
from models.families.deberta import deberta
from models.families.deepseek import deepseek
from models.families.llama import llama
from models.families.minimax import minimax
from models.families.mixtral import mixtral
from models.families.modernbert import modernbert
from models.families.olmoe import olmoe
from models.families.qwen3_next import qwen3_next
from models.families.t5 import t5
from models.hub.bert import Bert
from models.hub.deberta import Deberta
from models.hub.deepseek import DeepSeek
from models.hub.layout import Layout, Tensor
from models.hub.llama import Llama
from models.hub.minimax import MiniMax
from models.hub.mixtral import Mixtral
from models.hub.modernbert import ModernBert
from models.hub.olmoe import Olmoe
from models.hub.qwen3_next import Qwen3Next
from models.hub.t5 import T5
from partitioning import UserError

# Family functions and layouts by family.
FAMILIES: dict[str, tuple[Callable[..., Any], Layout]] = {
    "bert": (bert, Bert()),
    "deberta": (deberta, Deberta()),
    "deepseek": (deepseek, DeepSeek()),
    "modernbert": (modernbert, ModernBert()),
    "llama": (llama, Llama()),
    "minimax": (minimax, MiniMax()),
    "mixtral": (mixtral, Mixtral()),
    "olmoe": (olmoe, Olmoe()),
    "qwen3_next": (qwen3_next, Qwen3Next()),
    "t5": (t5, T5()),
}
CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Folder:
    """A model on disk in the Hugging Face layout.

    Args:
      path: of the folder.
      config: its `config.json`.
      family: ours, by name.
      sizes: arguments of the family's function.
    """

    path: Path
    config: Mapping[str, Any]
    family: str
    sizes: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Reads the config.

        Raises:
          UserError: there is none, or no family of ours is of that kind.
        """
        path = Path(path)
        config = _json(path / CONFIG)
        kind = config.get("model_type")
        for family, (_, layout) in FAMILIES.items():
            if kind in layout.models:
                try:
                    return cls(path, config, family, layout.sizes(config))
                except KeyError as error:
                    raise UserError(f"{path / CONFIG}: {error.args[0]} is missing") from None
                except UserError as error:
                    raise UserError(f"{path / CONFIG}: {error}") from None
        known = ", ".join(kind for _, layout in FAMILIES.values() for kind in layout.models)
        raise UserError(f"{path / CONFIG}: model_type = {kind!r}: expected one of {known}")

    def trunk(self, vocabulary: Any, **options: Any) -> Any:
        """A trunk of these sizes, with weights of its own."""
        return FAMILIES[self.family][0](vocabulary, **self.sizes, **options)

    def load(
        self, trunk: Any, shapes: Mapping[str, tuple[int, ...]], asked: Collection[str] | None = None
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """The weights under our names.

        Args:
          trunk: of the same family and sizes.
          shapes: of the trunk's parameters and buffers, layers by index.
          asked: those that are wanted; None for all. What the others need not be there, or of their shape.

        Returns:
          The arrays by name, and the tensors that the trunk has no place for.

        Raises:
          UserError: another family or other sizes; a shard or tensor is missing, broken or of the wrong shape; weights
            that are only there pickled.
        """
        mine = trunk.family
        if mine is None or mine.name != self.family:
            raise UserError(
                f"{self.path} holds a {self.family}, the trunk is {'of no family' if mine is None else 'a ' + mine.name}: "
                f"expected training.Run.model = @models.{self.family}"
            )
        some = asked is not None and len(asked) < len(shapes)
        layout = FAMILIES[self.family][1]
        for size, value in self.sizes.items():
            if mine[size] != value and not (some and size in layout.shown):
                raise UserError(f"{self.path}: {size} is {value!r} there and {mine[size]!r} here")
        if mine["vocabulary"] > self.config["vocab_size"] and (asked is None or layout.table in asked):
            raise UserError(
                f"{self.path} has {self.config['vocab_size']} tokens, the data's tokenizer {mine['vocabulary']}: expected "
                "the tokenizer that the model was trained with"
            )
        tensors = {tensor.name: tensor for tensor in layout.tensors(mine, shapes[layout.table][0])}
        asked = shapes if asked is None else asked
        wanted = {name: tensor for name, tensor in tensors.items() if any(leaf in asked for leaf in tensor.leaves)}
        found: dict[str, np.ndarray] = {}
        left = []
        for name, array in self._arrays():
            tensor = wanted.pop(name, None)
            if tensor is None:
                if name not in tensors and not layout.spare(name):
                    left.append(name)
                continue
            for leaf, ours in _ours(tensor, array, shapes, f"{self.path}: tensor {name}").items():
                if tensor.entry is None:
                    found[leaf] = ours
                    continue
                if leaf not in found:
                    found[leaf] = np.empty(shapes[leaf], ours.dtype)
                found[leaf][tensor.entry] = ours
        if wanted:
            raise UserError(f"{self.path}: {len(wanted)} tensors are missing, first {next(iter(wanted))!r}")
        lacking = sorted(name for name in asked if name not in found)
        if lacking:
            raise UserError(
                f"{self.path}: that layout has no place for {len(lacking)} arrays, first {lacking[0]!r}: what is to begin "
                "anew is named by reinitialise"
            )
        return {name: found[name] for name in asked}, left

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor, one in memory at a time."""
        from safetensors import SafetensorError, safe_open

        for shard in self._shards():
            try:
                with safe_open(shard, "numpy") as file:
                    for name in list(file.keys()):
                        yield name, file.get_tensor(name)
            except FileNotFoundError:
                raise UserError(f"{shard}: no such file: a shard that the index names is missing") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{shard}: is no whole safetensors file ({error})") from None

    def _shards(self) -> list[Path]:
        if (self.path / INDEX).is_file():
            names = sorted(set(_json(self.path / INDEX).get("weight_map", {}).values()))
            for name in names:
                if not isinstance(name, str) or Path(name).name != name:
                    raise UserError(f"{self.path / INDEX}: names the file {name!r}: expected one beside it")
            return [self.path / name for name in names]
        if (self.path / WHOLE).is_file():
            return [self.path / WHOLE]
        pickled = [p.name for p in sorted(self.path.iterdir()) if p.suffix in PICKLED]
        if pickled:
            raise UserError(
                f"{self.path}: the weights are pickled ({pickled[0]}), and nothing is unpickled here: convert them where "
                "they are trusted, with `transformers`' save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{self.path}: has neither {WHOLE} nor {INDEX}")


def _ours(
    tensor: Tensor, array: np.ndarray, shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, np.ndarray]:
    wide = array.astype(np.float32) if array.dtype.itemsize < 4 else array
    expected = tensor.go(*(np.broadcast_to(np.float32(0), shapes[leaf]) for leaf in tensor.leaves)).shape
    # A table may have more rows than the tokenizer has tokens.
    if (
        wide.shape[1:] != expected[1:]
        or wide.shape[0] < expected[0]
        or (wide.shape[0] > expected[0] and not tensor.cut)
    ):
        raise UserError(f"{where} has shape {list(wide.shape)}, expected {list(expected)}")
    return dict(zip(tensor.leaves, tensor.come(wide[: expected[0]]), strict=True))


def export(
    folder: str | Path, trunk: Any, values: Mapping[str, np.ndarray], extra: Mapping[str, str] | None = None
) -> Path:
    """Writes a trunk as a folder that `transformers` loads.

    Args:
      folder: made; must not exist, or be empty.
      trunk: of a family that `transformers` has.
      values: its parameters and buffers, layers by index.
      extra: further files by name, such as the tokenizer's.

    Raises:
      UserError: there is something in the folder, or the architecture is none of theirs.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already: expected a new or an empty folder")
    if trunk.family is None or trunk.family.name not in FAMILIES:
        raise UserError(
            f"the run's trunk is of {'no family' if trunk.family is None else 'the family ' + trunk.family.name}, and "
            "`transformers` does not have its architecture: expected a model such as "
            f"{', '.join('@models.' + name for name in FAMILIES)}"
        )
    layout = FAMILIES[trunk.family.name][1]
    config = layout.config(trunk) | {"torch_dtype": "float32"}
    tensors = list(layout.tensors(trunk.family, values[layout.table].shape[0]))
    homeless = sorted(values.keys() - {leaf for tensor in tensors for leaf in tensor.leaves})
    if homeless:
        raise UserError(f"{len(homeless)} arrays have no place in that layout, first {homeless[0]!r}")
    arrays = {
        tensor.name: np.ascontiguousarray(tensor.go(*(values[leaf] for leaf in tensor.leaves))) for tensor in tensors
    }
    with _aside(folder) as aside:
        save_file(arrays, str(aside / WHOLE), metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name, text in (extra or {}).items():
            (aside / name).write_text(text)
    return folder


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder beside, which takes the place of `folder` when all is written, and goes when it is not."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object")
    return found
