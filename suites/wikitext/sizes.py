"""Sizes of language models, as words of a run. Imports no torch.

With GPT-2's vocabulary of 50,264 words and tied embeddings HGRN2 has 44.66M parameters as published (arXiv 2404.07904), 123.6M, 359.8M and
1.336B in these sizes. The larger ones have the widths of models that are known by these names: 130M those of GPT-2 small, 340M of fla's and
flame's `hgrn2_340M`, 1.3B of fla-hub/hgrn2-1.3B-100B (there with 32,000 words, untied: 1.364B).
"""

VOCABULARY = 50_264
"""GPT-2's 50,257 words in fairseq's dictionary, padded to a multiple of 8."""

PUBLISHED = (
    # recipes of OpenNLPLab/HGRN2 and fairseq-evo's hgrn_lm_base: 6 layers, width 512, GLU without activation, learned lower bound
    "d_model=512",
    "num_layers=6",
    "conv=0",
    "positions=none",
    "lower_bound=inclusive",
    "norm=layernorm",
    "channel_mixer=glu",
    "glu_activation=none",
    "tie_embeddings=true",
    "embed_scale=sqrt",
)
PUBLISHED_WIDTHS = {"hgrn2": 1365, "hgrn2_small": 1024, "hgrn1": 1024}
"""`channel_width` of the published models: 8/3 of the width, or twice it."""
EXPAND_RATIOS = (1, 2, 4, 8, 16, 32, 64, 128)
"""The sweep `hgrn2_lm_outproduct_*`: none of them changes the number of parameters. Its control is `hgrn1.variant=expand2`."""


def size(d_model: int, num_layers: int, channel_width: int) -> tuple[str, ...]:
    """Words of one size: blocks of RMSNorm and SwiGLU without biases, heads of 128 channels where a mixer has as many."""
    heads = d_model // 128
    counted = ("attention", "gla", "gsa", "linear_attention", "retnet", "based")
    return (
        f"d_model={d_model}",
        f"num_layers={num_layers}",
        "channel_mixer=glu",
        f"channel_width={channel_width}",
        "glu_activation=silu",
        "glu_bias=false",
        "norm=rmsnorm",
        "tie_embeddings=true",
        "hgrn2.variant=fla",
        "hgrn2.expand_ratio=128",
        "hgrn2.lower_bound=inclusive",
        "hgrn1.variant=fla",
        "hgrn1.lower_bound=inclusive",
        "attention.positions=rope",
        "attention.bias=false",
        *(f"{model}.num_heads={heads}" for model in counted),
    )


SIZES = {
    "130M": size(768, 12, 2048),
    "340M": size(1024, 24, 2816),
    "1.3B": size(2048, 24, 5632),
}
"""GLU widths by fla's rule: two thirds of four times the width, rounded up to a multiple of 256."""
