"""`grade-fit --preflight`: what a run is going to do and to need, found out by small steps of it.

The run is set up as ever, with all that it refuses, up to its first batch. Then a few completions are sampled, scored
and shown, and the memory is measured: whole steps (sampling, reward, loss, backward pass, optimizer) with few
sequences, each as long as the settings allow. What is alive at the same time is counted tensor by tensor; with each
sequence it grows by the same amount, so

    bytes(batch_size) = weights + gradients + optimizer state + max over phases p of (fixed_p + slope_p · batch_size)

over the phases of a step: sampling, scoring, the passes of policy and reference, the pass over the vocabulary and so
on. Not counted is what kernels use inside, what an allocator keeps in pieces, and the runtime itself; a tenth of the
memory is kept free for them.
"""

from .main import preflight

__all__ = ["preflight"]
