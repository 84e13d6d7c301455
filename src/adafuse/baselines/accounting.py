"""What an adapter costs in parameters, ranks and bytes, in numbers that compare methods."""

from __future__ import annotations

from dataclasses import dataclass

from adafuse.attached import AttachedModel


@dataclass(frozen=True)
class Account:
    """Of an adapted model.

    trainable: parameters that train. adapter: all of the adapter's parameters. active_rank: the rank of a static LoRA on the same linears
    with as many parameters as a token's experts have. bytes_per_token: what one token must read of the adapter, chosen experts only.
    """

    trainable: int
    adapter: int
    active_rank: float
    bytes_per_token: int

    def __str__(self):
        return (
            f"{self.trainable:,} trainable of {self.adapter:,} adapter parameters, active rank {self.active_rank:.4g}, "
            f"{self.bytes_per_token:,} bytes read per token"
        )


def account(model, itemsize: int | None = None) -> Account:
    """Account of an AdaFuseModel, a baseline, or a PEFT LoRA.

        active = sum over banks (K r + shared_rank) (I + O),     active_rank = active / sum over adapted linears (I + O)
        bytes  = itemsize * active + 4 * parameters of the routers

    itemsize: bytes of an expert's number while it computes; None: that of the base's weights. Routers are fp32.
    """
    itemsize = model.get_base_model().dtype.itemsize if itemsize is None else itemsize
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    active, width, adapter, routers = (_of_attached if isinstance(model, AttachedModel) else _of_peft)(model)
    return Account(trainable, adapter, active / width, itemsize * active + 4 * routers)


def _of_attached(model):
    top_k = model.adafuse_config.top_k
    active = sum(
        ((top_k if bank.num_experts else 0) * bank.r + bank.shared_rank) * (bank.in_features + bank.out_features)
        for bank in model.banks.values()
    )
    width = sum(linear.in_features + linear.out_features for linear in model._linears)
    adapter = sum(tensor.numel() for tensor in model.adapter_tensors().values())
    routers = adapter - sum(bank.a.numel() + bank.b.numel() for bank in model.banks.values())
    return active, width, adapter, routers


def _of_peft(model):
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is neither an adapted model of adafuse nor a PEFT LoRA")
    ranks = [sum(layer.r[name] for name in layer.active_adapters) for layer in layers]
    widths = [layer.in_features + layer.out_features for layer in layers]
    active = sum(r * width for r, width in zip(ranks, widths, strict=True))
    return active, sum(widths), active, 0
