"""Models in and out of the Hugging Face layout, for the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from partitioning.errors import UserError


def imported(folder: Path, out: Path) -> list[str]:
    """Checks a model's folder, tensor by tensor, and writes a part of a config that trains on from it.

    Args:
      folder: with `config.json` and safetensors.
      out: the gin file to write.

    Returns:
      Lines that say what was found.

    Raises:
      UserError: the model is none that is known, a file is broken, or `out` is there already.
    """
    import jax
    from flax import nnx

    from data.hub_tokenizers import spec_of
    from models.hub.folder import Folder
    from models.stack import unstack
    from models.variables import flatten
    from models.vocabulary import Vocabulary

    if out.exists():
        raise UserError(f"{out}: is there already: expected a new file")
    opened = Folder.open(folder)
    unknown = Vocabulary(size=opened.config["vocab_size"], pad=-1, bos=-1, eos=-1, mask=-1, cls=-1, sep=-1)
    trunk = nnx.eval_shape(lambda: opened.trunk(unknown, rngs=nnx.Rngs(0)))
    leaves = jax.eval_shape(unstack, flatten(trunk, nnx.Variable))
    found, left = opened.load(trunk, {name: leaf.shape for name, leaf in leaves.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = spec_of(folder)
    out.write_text(_gin(opened, folder, tokenizer), encoding="utf-8")
    count = sum(leaf.size for leaf in flatten(trunk, nnx.Param).values())
    lines = [f"{folder}: a {opened.family} of {count:,} parameters, {len(found)} arrays used"]
    if left:
        lines.append(f"left: {', '.join(left)}")
    if tokenizer is None:
        lines.append(
            f"{folder}: no tokenizer.json: the data's own tokenizer must be the one that the model was trained with"
        )
    else:
        lines.append(f"{tokenizer.path}: `palmette prepare` will use it, specials {dict(tokenizer.specials or {})}")
    return [*lines, f"{out}: written; train with it beside a config of data and objective"]


def _gin(opened: Any, folder: Path, tokenizer: Any) -> str:
    lines = [
        f"# Part: the {opened.config['model_type']} in {folder}, its weights the initial ones.",
        "# Required beside it: training.Run.data, training.Run.objective and an optimizer.",
        "from __gin__ import dynamic_registration",
        "import models",
        "import training",
        "",
        f"training.Run.model = @models.{opened.family}",
        f"training.Run.init_from = {str(folder.resolve())!r}",
    ]
    for size, value in opened.sizes.items():
        name = f"models.{opened.family}.{size}"
        if dataclasses.is_dataclass(value):
            kind = type(value).__name__
            lines.append(f"{name} = @models.{kind}()")
            lines += [f"models.{kind}.{f.name} = {getattr(value, f.name)!r}" for f in dataclasses.fields(value)]
        else:
            lines.append(f"{name} = {value!r}")
    if tokenizer is not None:
        from data.hub_tokenizers import around

        begin, end = around(tokenizer)
        lines.insert(lines.index("import models"), "import data")
        lines += [
            "data.Cached.tokenizer = @data.TokenizerJson()",
            f"data.TokenizerJson.path = {tokenizer.path!r}",
            f"data.TokenizerJson.specials = {dict(tokenizer.specials)!r}",
            f"data.Cached.begin = {begin!r}",
            f"data.Cached.end = {end!r}",
        ]
    return "\n".join(lines) + "\n"


def exported(run: Any, folder: Path, out: Path) -> list[str]:
    """Writes a run's newest trunk as a folder that `transformers` loads.

    Args:
      run: the run, from its config.
      folder: the run's folder.
      out: the folder to write.

    Returns:
      Lines that say what was written.

    Raises:
      UserError: no complete checkpoint, an architecture that the layout does not have, or `out` is not empty.
    """
    import numpy as np
    from flax import nnx

    from data.hub_tokenizers import files_of
    from models.hub.folder import export
    from models.stack import unstack
    from models.variables import flatten

    trunk, tokenizer = run.restore(folder)
    files = files_of(tokenizer)
    values = {name: np.asarray(value) for name, value in unstack(flatten(trunk, nnx.Variable)).items()}
    export(out, trunk, values, files)
    count = sum(value.size for value in flatten(trunk, nnx.Param).values())
    kind = type(tokenizer).__name__
    said = "with its tokenizer" if files else f"without a tokenizer: the run's ({kind}) is no tokenizer.json"
    return [f"{out}: a {trunk.family.name} of {count:,} parameters, {said}"]
