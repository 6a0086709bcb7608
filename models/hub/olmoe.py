"""OLMoE as `transformers` lays it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.families.family import Family
from models.hub.layout import Layout, Tensor, same, turned, turned_entry
from models.hub.mixtral import attended, outside, plain, shared_config, theta
from partitioning import UserError


class Olmoe(Layout):
    """See `Layout`."""

    models = ("olmoe",)
    shown = ("layers", "hidden", "tied")

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes by name."""
        if config.get("clip_qkv") is not None:
            raise UserError(f"clip_qkv = {config['clip_qkv']}: expected null")
        return plain(config) | {
            "experts": config["num_experts"],
            "renormalise": bool(config.get("norm_topk_prob", False)),
            "theta": theta(config, 10_000.0),
        }

    def config(self, trunk: Any) -> dict[str, Any]:
        """Their config."""
        return shared_config(trunk) | {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "num_experts": trunk.family["experts"],
            "norm_topk_prob": trunk.family["renormalise"],
            "attention_bias": False,
            "clip_qkv": None,
        }

    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Embeddings, layers, head."""
        yield from outside(family, rows)
        for i in range(family["layers"]):
            theirs, ours = f"model.layers.{i}", f"stack/layers/{i}"
            yield from attended(family, theirs, ours)
            for letter, name in (("q", "query"), ("k", "key")):
                yield same(f"{theirs}.self_attn.{letter}_norm.weight", f"{ours}/mixer/{name}_norm/scale")
            yield turned(f"{theirs}.mlp.gate.weight", f"{ours}/feed_forward/router/kernel")
            for e in range(family["experts"]):
                for word, name in (("gate", "inner"), ("up", "gate"), ("down", "outer")):
                    theirs_e = f"{theirs}.mlp.experts.{e}.{word}_proj.weight"
                    yield turned_entry(theirs_e, f"{ours}/feed_forward/{name}", e)

    def spare(self, name: str) -> bool:
        """A tied head that was written out."""
        return name == "lm_head.weight"
