"""Sketches: a few numbers in the place of a long vector.

Letters in shapes: d components, k buckets.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def count_sketch(
    vector: Float[Tensor, " d"], buckets: int, seed: int, chunk: int = 2**20
) -> Float[Tensor, " {buckets}"]:
    """A few numbers whose inner products are, on average over seeds, those of the vectors.

    Each component is added to a random bucket with a random sign. Linear; a relative standard deviation of about
    √(2 / buckets). The same seed and chunk give the same buckets and signs on every process of the same kind of device.

    Args:
        vector: what to sketch, in any floating type; the sketch is float32 or better.
        buckets: its length.
        seed: of buckets and signs.
        chunk: components that are worked on at a time: the memory that is needed.

    References:
        | Finding Frequent Items in Data Streams (Charikar, Chen and Farach-Colton, 2002)
        | Feature Hashing for Large Scale Multitask Learning (Weinberger et al., 2009), https://arxiv.org/abs/0902.2206

    Example:
        >>> one, two = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
        >>> a, b = (count_sketch(x, 64, seed=1) for x in (one, two))
        >>> bool(torch.allclose(count_sketch(one + two, 64, seed=1), a + b, atol=1e-5))
        True
    """
    generator = torch.Generator(vector.device).manual_seed(seed)
    sketch = vector.new_zeros(buckets, dtype=torch.promote_types(vector.dtype, torch.float32))
    for part in vector.split(chunk):
        draw = torch.randint(2 * buckets, part.shape, generator=generator, device=vector.device)
        signed = torch.where(draw % 2 == 0, part, -part).to(sketch.dtype)
        sketch.index_add_(0, draw // 2, signed)
    return sketch
