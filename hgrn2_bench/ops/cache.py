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


def mask(rows: int, position: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a cache's S rows, (1, S): 0 up to row `position` (1,), minus infinity beyond."""
    hidden_S = torch.arange(rows, device=position.device) > position
    return torch.zeros(1, rows, device=position.device, dtype=dtype).masked_fill(hidden_S, float("-inf"))


def attend(inputs: SoftmaxInputs, cache: State, position: Tensor, mask_1S: Tensor) -> Tensor:
    """Write the token's key and value into row `position` (1,) of the cache (k_BSHK, v_BSHV) and attend to the rows up to it.

    Gives (B, 1, H, K) in the dtype of v. All S rows are read, whatever the position: torch's kernel takes a mask, not a length. On an
    H100 it reads 268 MB of cache at 2.7 TB/s; products written out reach 1.6 TB/s.
    """
    k_BSHK, v_BSHV = cache
    k_BSHK.index_copy_(1, position, inputs.k_BTHK.to(k_BSHK.dtype))
    v_BSHV.index_copy_(1, position, inputs.v_BTHV.to(v_BSHV.dtype))
    q, k, v = (x.to(v_BSHV.dtype).transpose(1, 2) for x in (inputs.q_BTHK, k_BSHK, v_BSHV))
    o_BH1V = F.scaled_dot_product_attention(q, k, v, mask_1S.to(v.dtype), scale=inputs.scale)
    return o_BH1V.transpose(1, 2).to(inputs.v_BTHV.dtype)
