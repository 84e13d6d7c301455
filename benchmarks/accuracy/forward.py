"""A forward that nothing waits in: causal attention without a mask, and the output head at the answers only."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Registered for attention and not for masks: transformers then makes no mask, whatever attention_mask says, and scaled dot product
# attention is plainly causal. With padding on the right no token sees padding, so the tokens' results are the same; and nothing
# asks the device whether there is padding, which no CUDA graph could hold.
ATTENTION = "adafuse_causal"


class Answers:
    """A model of which only the predictions of the answer tokens are wanted.

    model: a HuggingFace causal LM, a PEFT model or an AdaFuseModel (or one with its interface); its attention and its output head are
    changed until `close`. On a GPU it runs under bf16 autocast, on a CPU as it is.
    """

    def __init__(self, model):
        self.model, self._slots = model, None
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._attention_before = self._base.config._attn_implementation
        AttentionInterface.register(ATTENTION, sdpa_attention_forward)
        self._base.set_attn_implementation(ATTENTION)
        self._hook = self._base.get_output_embeddings().register_forward_pre_hook(self._select)
        settings = getattr(model, "adafuse_config", None)
        self._aux_loss_coef = settings.aux_loss_coef if settings is not None else 0.0

    def close(self):
        self._hook.remove()
        self._base.set_attn_implementation(self._attention_before)

    def nll(self, batch):
        """[N] fp32: -log p of the target in each slot, 0 where not used."""
        return nll_of(self.logits(batch)[0], batch)

    def logits(self, batch):
        """(logits, balance): of the token that follows each slot, [N, V] fp32; coefficient * balance loss, 0 in eval mode."""
        balanced = bool(self._aux_loss_coef) and self.model.training
        self._slots = batch.slots
        with _autocast(batch.ids.device):
            output = self.model(
                input_ids=batch.ids,
                attention_mask=batch.mask,  # for the balance loss alone
                use_cache=False,
                **({"output_router_logits": True} if balanced else {}),
            )
        return output.logits.float(), self._aux_loss_coef * output.aux_loss if balanced else 0.0

    def _select(self, head, arguments):
        """[B, S, H] -> [N, H]."""
        return arguments[0].flatten(0, 1).index_select(0, self._slots)


def nll_of(logits, batch):
    """-log p of each slot's target, 0 where a slot is not used. logits [N, V] fp32 -> [N] fp32."""
    return cross_entropy(logits, batch.targets, reduction="none") * batch.weights


def divergence_of(teacher, student, batch):
    """KL(teacher || student) = sum_v p_teacher(v) (log p_teacher(v) - log p_student(v)) of each slot, 0 where a slot is not used.

    Logits [N, V] fp32 -> [N] fp32.
    """
    apart = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return apart.sum(-1) * batch.weights


def _autocast(device):
    # Without its cache of casts: a cached cast of one graph's pool would be read by another.
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if device.type == "cuda" else nullcontext()
