"""Which experts the tokens of each domain use: the numbers behind a heat map."""

from __future__ import annotations

import torch

from accuracy.items import CHOICES


@torch.no_grad()
def expert_shares(model, evaluation) -> list:
    """[domains][D][E]: share of the K choices of a domain's tokens that fell on an expert; a row sums to 1. D decisions a token.

    model: an AdaFuseModel. The tokens are those of each prompt with its right answer (all but the last, which is not fed).
    """
    split, experts = evaluation.split, model.adafuse_config.num_experts
    counts = 0
    for bucket in evaluation.buckets:
        for i, members in enumerate(bucket.members):
            items = members // CHOICES
            right = (members >= 0) & (members % CHOICES == split.answers[items])
            if right.any():
                counts = counts + _count(model, bucket.batches[i], right, split.domains[items], experts, split)
    shares = counts / counts.sum(-1, keepdim=True)
    return [[[round(share, 4) for share in row] for row in domain] for domain in shares.tolist()]


def _count(model, batch, right, domains, experts, split):
    """[domains, D, E] int64 of the tokens of one batch, on the CPU."""
    rows = torch.from_numpy(right.nonzero()[0]).to(batch.ids.device)
    chosen = model.route(batch.ids[rows]).experts.cpu()  # [B, S, D, K]
    real = batch.mask[rows].bool().cpu()
    decisions, domain_count = chosen.shape[2], int(split.domains.max()) + 1
    domain = torch.from_numpy(domains[right]).long()[:, None].expand(real.shape)[real]
    tokens = chosen[real]  # [T, D, K]
    place = (domain[:, None, None] * decisions + torch.arange(decisions)[:, None]) * experts + tokens
    return torch.bincount(place.flatten(), minlength=domain_count * decisions * experts).view(-1, decisions, experts)
