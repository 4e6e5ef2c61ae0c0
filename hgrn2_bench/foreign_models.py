"""What a built language model of another maker is: counted from its tensors. See `hgrn2_bench.foreign_config`."""

from typing import Any

from torch import nn

from hgrn2_bench.plan import Description


def describe(model: Any) -> Description:
    """Its size; how long its state is and what a token costs are not known. Nothing is trained.

    As of our own models, parameters that are no embedding leave out tables of tokens and positions and the output head.
    """
    heads = [model.get_output_embeddings(), *(module for module in model.modules() if isinstance(module, nn.Embedding))]
    tables = {id(p): p.numel() for head in heads if head is not None for p in head.parameters()}
    total = sum(p.numel() for p in model.parameters())
    return Description(
        parameters=total,
        non_embedding_parameters=total - sum(tables.values()),
        state_bytes=None,
        train_flops_per_token=None,
        steps=0,
        tokens=0,
        seconds=None,
        effective={
            "class": f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}",
            "weights_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "local_mixing": "its own",
            "positions": "its own",
        },
    )
