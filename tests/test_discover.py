"""Structures that are not plain blocks of plain linears: told apart, left out with a word, or refused."""

import pytest
import torch
from families import BLOCKS, HIDDEN, INTERMEDIATE, VOCAB, batch, family, fill
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from adafuse import AdaFuseConfig, AdaFuseModel

CONFIG = AdaFuseConfig(r=2, num_experts=4)
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": INTERMEDIATE}


def latent_attention():
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = DeepseekV2Config(**SIZES, **ATTENTION, **sizes, first_k_dense_replace=BLOCKS, n_routed_experts=2)
    return DeepseekV2ForCausalLM(config).eval()


def test_latent_attention_leaves_out_what_runs_on_the_cache_and_generates():
    with pytest.warns(UserWarning, match="2 linear.s. are not adapted .*kv_b_proj.*cached tokens"):
        model = AdaFuseModel(latent_attention(), CONFIG)
    fill(model)
    assert not any("kv_b_proj" in path for path in model.banks)
    ids = batch(2, 5)
    new = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        assert torch.equal(new[:, -1], model(new[:, :-1]).logits[:, -1].argmax(-1))
    with pytest.raises(ValueError, match=r"kv_b_proj.*cannot be adapted.*cached tokens"):
        AdaFuseModel(latent_attention(), AdaFuseConfig(target_modules=["kv_b_proj"]))


def test_linears_whose_weights_are_read_past_the_adapter_are_refused():
    base = MambaForCausalLM(MambaConfig(**SIZES, state_size=4))
    with pytest.raises(ValueError, match="no linear to adapt"):
        AdaFuseModel(base, CONFIG)
    with pytest.raises(ValueError, match=r"'out_proj' matches .*read the weights of their linears directly"):
        AdaFuseModel(base, AdaFuseConfig(target_modules=["out_proj"]))


def test_a_router_that_is_a_kind_of_linear_is_no_target():
    config = Llama4TextConfig(
        **SIZES,
        **ATTENTION,
        head_dim=8,
        num_local_experts=2,
        intermediate_size_mlp=INTERMEDIATE,
        interleave_moe_layer_step=1,
    )
    with pytest.warns(UserWarning, match="3-D parameters"):
        model = AdaFuseModel(Llama4ForCausalLM(config), CONFIG)
    assert not any("router" in path for path in model.banks)
    assert torch.isfinite(model(batch()).logits).all()


def test_skipping_blocks_at_random_is_refused():
    base = OPTForCausalLM(
        OPTConfig(**SIZES, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=HIDDEN, layerdrop=0.5)
    )
    with pytest.raises(ValueError, match=r"layerdrop=0\.5.*load it with layerdrop=0\.0"):
        AdaFuseModel(base, CONFIG)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="must be an AdaFuseConfig, got dict"):
        AdaFuseModel(family("llama").build(), {"r": 2})
