"""How the balance loss reaches a trainer: as part of the loss, or beside it as HuggingFace has it for mixtures."""

from __future__ import annotations

import copy

NO_BALANCE = (
    "this training forward has no labels, so the balance loss is not part of a loss; pass output_router_logits=True and add "
    "aux_loss_coef * output.aux_loss to yours, or set aux_loss_coef=0"
)


def config_with_aux_loss(config, coefficient):
    """A copy of the base's config with the two settings by which trainers know a mixture."""
    config = copy.deepcopy(config)
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        part.output_router_logits, part.router_aux_loss_coef = False, coefficient
    return config


def share_of_labels(given):
    """This micro-batch's share of the label tokens of the optimisation step; 1 where the trainer does not say how many there are."""
    total = given.get("num_items_in_batch")
    if total is None:
        return 1.0
    labels = given["shift_labels"] if given.get("shift_labels") is not None else given["labels"][..., 1:]
    return (labels != -100).sum() / total


def with_aux_loss(output, aux_loss):
    """The output with `.aux_loss`. ValueError for a tuple, which has no place for it."""
    if isinstance(output, tuple):
        raise ValueError(
            "output_router_logits=True needs an output with names; call the model without return_dict=False"
        )
    output["aux_loss"] = aux_loss
    return output


def with_loss_added(output, extra):
    """The output with `extra` added to its loss."""
    if isinstance(output, tuple):
        return (output[0] + extra.to(output[0].device), *output[1:])
    output["loss"] = output["loss"] + extra.to(output["loss"].device)
    return output
