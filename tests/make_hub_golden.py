"""Writes models/hub_golden.npz: configs of small models, and the logits that `transformers` gives for them.

python tests/make_hub_golden.py     with the extra `parity`
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
from hub_cases import GOLDEN, HERE, TARGETS, TOKENS, V, weight
from safetensors.numpy import load_file, save_file

SIZES = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1}
DECODER = {"max_position_embeddings": 64, "pad_token_id": 1}
DEBERTA = {"relative_attention": True, "share_att_key": True, "position_biased_input": False, "position_buckets": 6}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p", "type_vocab_size": 0}
T5 = {"d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 8}
T5 |= {"relative_attention_max_distance": 16, "dropout_rate": 0.0, "pad_token_id": 1, "decoder_start_token_id": 1}
QWEN3_NEXT = {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4, "linear_key_head_dim": 6}
QWEN3_NEXT |= {"linear_value_head_dim": 5, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4}
QWEN3_NEXT |= {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 10}
DEEPSEEK = {"first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 8}
DEEPSEEK |= {"n_group": 4, "topk_group": 2, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 7}
DEEPSEEK |= {"kv_lora_rank": 9, "q_lora_rank": 10, "num_key_value_heads": 4, "num_nextn_predict_layers": 0}
SHARP = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "bert": ("Bert", "ForMaskedLM", {"max_position_embeddings": 32, **STILL}),
    "bert tanh": ("Bert", "ForMaskedLM", {"hidden_act": "gelu_new", "type_vocab_size": 3, **STILL}),
    "roberta": (
        "Roberta",
        "ForMaskedLM",
        {"max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-5, **STILL},
    ),
    "modernbert": ("ModernBert", "ForMaskedLM", {"local_attention": 6, "num_hidden_layers": 5, "pad_token_id": 1}),
    "llama, grouped": ("Llama", "ForCausalLM", {"num_key_value_heads": 2, **DECODER}),
    "llama, one head of keys": (
        "Llama",
        "ForCausalLM",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True, **DECODER},
    ),
    "llama, odd heads": (
        "Llama",
        "ForCausalLM",
        {"head_dim": 10, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8}, **DECODER},
    ),
    "llama, linear": ("Llama", "ForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, **DECODER}),
    "llama, yarn": (
        "Llama",
        "ForCausalLM",
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "head_dim": 16,
            **DECODER,
        },
    ),
    "mistral": ("Mistral", "ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 5, **DECODER}),
    "deberta": ("DebertaV2", "ForMaskedLM", {**DEBERTA, "max_position_embeddings": 16, **STILL}),
    "deberta, types": (
        "DebertaV2",
        "ForMaskedLM",
        {**DEBERTA, "max_relative_positions": 10, "type_vocab_size": 2, "layer_norm_eps": 1e-5, **STILL},
    ),
    "t5": ("T5", "ForConditionalGeneration", {**T5, "num_decoder_layers": 2}),
    "t5, gated": (
        "T5",
        "ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 9, "tie_word_embeddings": False},
    ),
    "minimax": (
        "MiniMax",
        "ForCausalLM",
        {"num_key_value_heads": 2, "num_local_experts": 4, "block_size": 8, "rms_norm_eps": 1e-5, **DECODER},
    ),
    "minimax, mostly linear": (
        "MiniMax",
        "ForCausalLM",
        {
            "layer_types": ["linear_attention"] * 2 + ["full_attention"],
            "head_dim": 10,
            "num_key_value_heads": 4,
            "num_local_experts": 3,
            "linear_attn_alpha_factor": 1.5,
            "full_attn_beta_factor": 0.75,
            "mlp_alpha_factor": 2.0,
            "tie_word_embeddings": True,
            **DECODER,
        },
    ),
    "mixtral": ("Mixtral", "ForCausalLM", {"num_key_value_heads": 2, "num_local_experts": 4, **DECODER}),
    "mixtral, windowed": (
        "Mixtral",
        "ForCausalLM",
        {
            "head_dim": 10,
            "num_key_value_heads": 4,
            "num_local_experts": 3,
            "sliding_window": 5,
            "tie_word_embeddings": True,
            **DECODER,
        },
    ),
    "olmoe": ("Olmoe", "ForCausalLM", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 12, **DECODER}),
    "olmoe, renormalised": (
        "Olmoe",
        "ForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            **DECODER,
        },
    ),
    "deepseek": ("DeepseekV3", "ForCausalLM", {**DEEPSEEK, **DECODER}),
    "deepseek, full queries": (
        "DeepseekV3",
        "ForCausalLM",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-3,
            "rope_scaling": SHARP,
            "tie_word_embeddings": True,
            **DECODER,
        },
    ),
    "qwen3": ("Qwen3", "ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8, **DECODER}),
    "qwen3 next": ("Qwen3Next", "ForCausalLM", {**QWEN3_NEXT, **DECODER}),
    "qwen3 next, dense": (
        "Qwen3Next",
        "ForCausalLM",
        {
            **QWEN3_NEXT,
            "num_experts": 0,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "full_attention_interval": 2,
            **DECODER,
        },
    ),
}


def made(name):
    """A case's model, in float32, its weights set by their names."""
    import torch
    import transformers

    kind, task, sizes = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**({"vocab_size": V} if kind == "T5" else SIZES) | sizes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}{task}")(config).float().train()
    if kind == "T5" and not config.scale_decoder_outputs:
        # The library ties what it makes anew; such models as were trained have a head of their own.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    if any(tensor.endswith("experts.gate_up_proj") for tensor, _ in model.named_parameters()):
        return filled(model)
    with torch.no_grad():
        for tensor, value in model.named_parameters():
            value.copy_(torch.tensor(weight(tensor, tuple(value.shape))))
    return model


def filled(model):
    """The model with weights set by the names that its files have, which are not those of its parameters."""
    kept = {name for name, _ in model.named_buffers() if not name.endswith("bias")}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        arrays = load_file(path)
        save_file({n: x if n in kept else weight(n, x.shape) for n, x in arrays.items()}, path, {"format": "pt"})
        return type(model).from_pretrained(folder, attn_implementation="eager").float().train()


def saved(model, values):
    """Values of a model's parameters under the names that its files have."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        parameter.data = values[name]
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def run(model):
    """Its logits of the batch; an encoder-decoder writes the rows in another order beside the ones it reads."""
    import torch

    inputs = {"input_ids": torch.tensor(TOKENS), "attention_mask": torch.tensor(HERE.astype(np.int64))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor(TARGETS)
    return model(**inputs).logits


def main():
    """Writes the file."""
    import torch

    found = {}
    for name in CASES:
        model = made(name)
        with torch.no_grad():
            out = run(model)
        found[f"{name}/logits"] = np.where(HERE[..., None], out.numpy(), 0)
        found[f"{name}/config"] = np.array(json.dumps(model.config.to_dict()))
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main()
