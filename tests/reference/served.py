"""Names and shapes of the tensors that servers' loaders look for, written out plainly from a config alone."""

from __future__ import annotations

from typing import Any


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the servers' loaders look for, from a written config alone, copies left out."""
    d, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    eagle = "eagle_config" in config
    width = 2 * d if eagle else d
    m = config["num_aux_hidden_states"] if eagle else len(config["target_layer_ids"])
    want: dict[str, tuple[int, ...]] = {"fc.weight": (d, m * d), "norm.weight": (d,)}
    if config.get("norm_before_fc"):
        want["input_norm.weight"] = (m * d,)
    if not eagle:
        want["hidden_norm.weight"] = (d,)
    for layer in range(config["num_hidden_layers"]):
        inside: dict[str, tuple[int, ...]] = {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (d, query),
            "mlp.gate_proj": (inner, d),
            "mlp.up_proj": (inner, d),
            "mlp.down_proj": (d, inner),
        }
        if eagle:
            inside["hidden_norm"] = (d,)
        if config["model_type"] == "qwen3":
            inside |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        at = "midlayer" if eagle else f"layers.{layer}"
        want |= {f"{at}.{name}.weight": shape for name, shape in inside.items()}
    rank = config.get("markov_rank", 0)
    if rank:
        want |= {f"markov_head.markov_{w}.weight": (vocab, rank) for w in ("w1", "w2")}
        if config["markov_head_type"] == "gated":
            want |= {"markov_head.gate_proj.weight": (rank, d + rank), "markov_head.gate_proj.bias": (rank,)}
        if config["markov_head_type"] == "rnn":
            want["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + d)
            want["markov_head.joint_proj.bias"] = (3 * rank,)
    if config.get("enable_confidence_head"):
        read = d + (rank if config["confidence_head_with_markov"] else 0)
        want |= {"confidence_head.proj.weight": (1, read), "confidence_head.proj.bias": (1,)}
    return want
