"""What the router does with a text: its decisions token by token, and their statistics. `adafuse.page` shows both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from adafuse.evaluation import position_limit
from adafuse.layers import in_eval_mode

COLLAPSED = 0.1  # an expert that gets less than this share of an even load counts as collapsed


@dataclass(frozen=True, eq=False)
class Report:
    """The routing of one text of S tokens.

    pieces: S strings that joined give the text (a token with no text of its own, such as BOS or the later bytes of a character,
    has ""; a tokenizer without offsets gives each token as it decodes alone). token_ids, token_names: S each; a name is the
    vocabulary's own spelling. special: S bools, true for tokens that the tokenizer added to the text. experts [S, D, K] int64
    and weights [S, D, K] float32 on the CPU, best first; D is 1 or the number of blocks. statistics: see `summarise`.
    """

    pieces: tuple[str, ...]
    token_ids: tuple[int, ...]
    token_names: tuple[str, ...]
    special: tuple[bool, ...]
    experts: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    routing: str
    statistics: dict
    model_name: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def inspect_text(model, tokenizer, text: str) -> Report:
    """Route `text` (with the special tokens that the tokenizer adds) through an AdaFuseModel and gather what there is to see.

    Raises ValueError for a text without tokens, and for one of more tokens than the model has positions.
    """
    encoding = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=tokenizer.is_fast)
    ids = encoding.input_ids
    if not text or not ids:
        raise ValueError("the text is empty: there is no token to route")
    limit = position_limit(model)
    if limit is not None and len(ids) > limit:
        raise ValueError(f"the text has {len(ids)} tokens, and the model allows {limit}; inspect a shorter part of it")
    special = tuple(map(bool, encoding.special_tokens_mask))
    with torch.no_grad(), in_eval_mode(model):
        routing = model.route(torch.tensor([ids], device=model.device))
    config = model.adafuse_config
    if tokenizer.is_fast:
        pieces = _cut(text, encoding.offset_mapping)
    else:  # no offsets to cut at: each token as it decodes alone
        pieces = ["" if added else tokenizer.decode([i]) for i, added in zip(ids, special, strict=True)]
    return Report(
        pieces=tuple(pieces),
        token_ids=tuple(ids),
        token_names=tuple(tokenizer.convert_ids_to_tokens(ids)),
        special=special,
        experts=routing.experts[0].cpu(),
        weights=routing.weights[0].float().cpu(),
        num_experts=config.num_experts,
        routing=config.routing,
        statistics=summarise(routing, config.num_experts),
        model_name=_name_of(model),
    )


@torch.no_grad()
def summarise(routing, num_experts: int, mask: torch.Tensor | None = None) -> dict:
    """Statistics of a Routing ([B, S, D, K]) over the tokens where mask [B, S] is not 0, per decision; CPU tensors.

    load [D, E]: share of the K choices of all tokens that fell on an expert (a row sums to 1; even: 1 / E).
    load_entropy [D]: entropy of a row of load, in bits; at most log2(E), when the load is even.
    weight_entropy [D]: mean entropy of a token's weights divided by their sum, in bits; at most log2(K), 0 if K = 1.
    weights [D, K]: mean weight of the best expert, of the second, ...
    collapsed: list of (decision, expert) with a load below a tenth of even.
    same_set, overlap [D]: of consecutive tokens, the share with exactly the same K experts, and the mean share of common experts.
    same_set_chance, overlap_chance [D]: what these would be for the same decisions in random order (same load, no memory).
    Where a batch has no two consecutive tokens the last four are NaN. Raises ValueError if the mask leaves no token.
    """
    experts, weights = routing.experts, routing.weights.float()
    real = torch.ones(experts.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    if not real.any():
        raise ValueError("there is no token to summarise: the mask is 0 everywhere")
    experts, weights = experts.cpu(), weights.cpu()
    pairs = real[:, 1:] & real[:, :-1]
    before, after, tokens = experts[:, :-1][pairs], experts[:, 1:][pairs], experts[real]
    load = _counts(tokens, num_experts) / (tokens.shape[0] * tokens.shape[2])
    per_decision = [_neighbours(before[:, d], after[:, d], tokens[:, d], num_experts) for d in range(tokens.shape[1])]
    share = weights[real] / weights[real].sum(-1, keepdim=True)
    names = ("same_set", "overlap", "same_set_chance", "overlap_chance")
    return {
        "tokens": tokens.shape[0],
        "load": load,
        "load_entropy": _entropy(load),
        "weight_entropy": _entropy(share).mean(0),
        "weights": weights[real].mean(0),
        "collapsed": [tuple(place) for place in (load < COLLAPSED / num_experts).nonzero().tolist()],
        **{name: torch.tensor(values) for name, values in zip(names, zip(*per_decision, strict=True), strict=True)},
    }


def _name_of(model):
    """The hub id of the base, or the name of its folder: a page that is passed on need not tell where that folder was."""
    name = getattr(model.config, "_name_or_path", "")
    return Path(name).name if Path(name).is_absolute() else name


def _cut(text, offsets) -> list[str]:
    """Cut the text at the end of each token: text that no token covers (stripped spaces) goes to the next one, or the last."""
    pieces, done = [], 0
    for _, end in offsets:
        pieces.append(text[done:end])
        done = max(done, end)
    pieces[-1] += text[done:]
    return pieces


def _counts(tokens, num_experts):
    """tokens [N, D, K] -> [D, E] float64: how many tokens chose each expert."""
    flat = tokens.movedim(1, 0).flatten(1)
    return torch.zeros(flat.shape[0], num_experts, dtype=torch.float64).scatter_add_(
        1, flat, torch.ones_like(flat, dtype=torch.float64)
    )


def _entropy(p):
    """Of the last axis, in bits; 0 log 0 = 0."""
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2) + 0.0  # + 0.0: no negative zero


def _neighbours(before, after, tokens, num_experts) -> tuple[float, float, float, float]:
    """Same set and overlap of the pairs before, after [P, K], then of two tokens drawn from tokens [N, K] without replacement."""
    pairs, (n, k) = len(before), tokens.shape
    if not pairs:
        return (math.nan,) * 4
    same = (before.sort(-1).values == after.sort(-1).values).all(-1).double().mean().item()
    overlap = (before[:, :, None] == after[:, None, :]).any(-1).double().mean().item()
    sets = torch.unique(tokens.sort(-1).values, dim=0, return_counts=True)[1].double()
    members = _counts(tokens[:, None], num_experts)[0]
    same_chance, common = (((c * (c - 1)).sum() / (n * (n - 1))).item() for c in (sets, members))
    return same, overlap, same_chance, common / k
