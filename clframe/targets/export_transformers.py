"""Language models as folders of the transformers library: the backbone decoder is a Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import ClframeError, UnsupportedError
from clframe.nn.backbones.decoder import CausalAttention, DecoderBlock, GatedFFN
from clframe.nn.backbones.pretrained import require_package
from clframe.nn.low_rank import AdaptedLinear
from clframe.nn.network import Network

_LAYERS = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.q_proj", "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj", "self_attn.o_proj": "attention.o_proj",
    "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj",
}  # fmt: skip
"""Layers of a block of Llama, and of ours."""


def write_llama(network: Network, folder: Path, *, tokenizer: str = "") -> None:
    """Write a decoder as a folder that ``AutoModelForCausalLM`` loads, with its tokenizer.

    Only the last exit is written. The logits of the model in the folder are compared with the network's.

    Args:
        network: A network with the backbone ``decoder`` with a SwiGLU FFN.
        folder: An existing folder.
        tokenizer: Content of a ``tokenizer.json``; empty writes none.

    Raises:
        UnsupportedError: Another network, or transformers is not installed.
    """
    if network.choice is not None:
        raise UnsupportedError(
            f"export: found the adapters of several domains (components.{network.choice.owner}), between which a Llama "
            f"cannot choose; train with merge=experience or merge=never"
        )
    library = require_package("transformers", where="export")
    blocks = _blocks(network)
    attention, ffn = blocks[0].attention, blocks[0].mlp
    assert isinstance(attention, CausalAttention) and isinstance(ffn, GatedFFN)
    config = library.LlamaConfig(
        vocab_size=network.vocabulary, hidden_size=network.backbone.features,
        intermediate_size=ffn.up_proj.out_features, num_hidden_layers=len(blocks),
        num_attention_heads=attention.heads, num_key_value_heads=attention.heads,
        max_position_embeddings=network.input_shape[0] - 1, rms_norm_eps=blocks[0].attention_norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": attention.base}, attention_bias=False, mlp_bias=False,
        tie_word_embeddings=network.backbone.tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = library.LlamaForCausalLM(config).eval()
    model.load_state_dict(_weights(network, blocks))
    _compare(network, model)
    model.save_pretrained(folder)
    if tokenizer:
        tokenizers = require_package("tokenizers", where="export")
        fast = library.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer))
        fast.save_pretrained(folder)


def _blocks(network: Network) -> list[DecoderBlock]:
    found: list[DecoderBlock] = []
    for stage in network.backbone.stages[1:]:
        block = stage[0] if isinstance(stage, nn.Sequential) else stage
        if not isinstance(block, DecoderBlock) or not isinstance(block.mlp, GatedFFN):
            raise UnsupportedError(
                "export: found a network that is not a Llama; --format transformers needs backbone=decoder with "
                "ffn=swiglu, without experts"
            )
        found.append(block)
    return found


def _weights(network: Network, blocks: list[DecoderBlock]) -> dict[str, Tensor]:
    """State dict of the Llama."""
    norm = network.backbone.stages[-1].get_submodule("1")
    state = {
        "model.embed_tokens.weight": network.backbone.stages[0].get_submodule("table").weight,
        "model.norm.weight": norm.weight,
        "lm_head.weight": network.final.weight,
    }
    for number, block in enumerate(blocks):
        for theirs, ours in _LAYERS.items():
            state[f"model.layers.{number}.{theirs}.weight"] = _weight(block.get_submodule(ours))
    return {name: weight.detach() for name, weight in state.items() if isinstance(weight, Tensor)}


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, AdaptedLinear) and layer.active:
        return weight + layer.scale * layer.up_OR @ layer.down_RI
    return weight


@torch.no_grad()
def _compare(network: Network, model: Any) -> None:
    ids = torch.randint(network.vocabulary, (2, network.input_shape[0]), generator=torch.Generator().manual_seed(0))
    expected, found = network(ids).last, model(ids[:, :-1]).logits.flatten(0, 1)
    if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ClframeError(
            f"export: the logits of the Llama differ from the model's by {float((expected - found).abs().max()):.2g}; "
            f"use another version of transformers"
        )
