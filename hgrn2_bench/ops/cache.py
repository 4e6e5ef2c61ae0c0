"""Softmax attention of one token over a cache of fixed size: what decoding in place, and hence in a CUDA graph, needs.

Shape letters as in `families`; S rows of the cache, of which the first `position` are filled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_bench.ops.families import SoftmaxInputs, State

LEAST_BUCKET = 256


def bucket(tokens: int) -> int:
    """Rows of the cache that holds `tokens`: the least power of two, at least LEAST_BUCKET."""
    return max(LEAST_BUCKET, 1 << (tokens - 1).bit_length())


def attend(inputs: SoftmaxInputs, cache: State, position: Tensor) -> Tensor:
    """Write the token's key and value into row `position` (1,) of the cache (k_BSHK, v_BSHV) and attend to the rows up to it.

    Gives (B, 1, H, K) in the dtype of v. All S rows are read, whatever the position: torch's kernel takes a mask, not a length.
    """
    k_BSHK, v_BSHV = cache
    k_BSHK.index_copy_(1, position, inputs.k_BTHK.to(k_BSHK.dtype))
    v_BSHV.index_copy_(1, position, inputs.v_BTHV.to(v_BSHV.dtype))
    visible_1S = torch.arange(k_BSHK.shape[1], device=position.device)[None] <= position
    q, k, v = (x.to(v_BSHV.dtype).transpose(1, 2) for x in (inputs.q_BTHK, k_BSHK, v_BSHV))
    o_BH1V = F.scaled_dot_product_attention(q, k, v, visible_1S, scale=inputs.scale)
    return o_BH1V.transpose(1, 2).to(inputs.v_BTHV.dtype)
