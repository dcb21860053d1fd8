"""What a batch is: rows, completions and steps, for every kind of module."""

import pytest

from grade_lightning.errors import InputError
from grade_lightning.records import Batching


def test_a_plain_batch_is_one_step() -> None:
    plain = Batching()
    assert (plain.rows(7), plain.completions(7), plain.steps_per_batch) == (7, 7, 1)
    assert plain.rows_per_optimizer_step(7, micro_batches=4) == 28


def test_a_window() -> None:
    """Two epochs of three optimizer steps of four micro-batches of ten completions, five of each prompt."""
    window = Batching(generations=5, epochs=2, minibatches=3, accumulation=4)
    assert window.steps_per_batch == 24
    assert window.completions(10) == 120
    assert window.rows(10) == 24
    assert window.rows_per_optimizer_step(24, micro_batches=4) == 8
    assert Batching(generations=5, accumulation=1, spare=2).rows(10) == 6
    assert Batching(generations=5, accumulation=1, spare=2).rows_per_optimizer_step(6, micro_batches=1) == 2


def test_rows_of_an_optimizer_step_add_up_to_those_of_an_epoch() -> None:
    for epochs, minibatches, accumulation in ((1, 1, 1), (3, 1, 2), (1, 4, 1), (2, 2, 3)):
        window = Batching(epochs=epochs, minibatches=minibatches, accumulation=accumulation)
        each = window.rows_per_optimizer_step(60, micro_batches=accumulation)
        assert each * minibatches == pytest.approx(60)


@pytest.mark.parametrize(
    ("batching", "size", "message"),
    [
        (Batching(generations=8, accumulation=1), 12, r"12 completions .* model\.num_generations \(8\)"),
        (Batching(generations=8, minibatches=3, accumulation=2), 2, r"12 completions"),
        (Batching("pairs", 2), 5, "data.batch_size = 5: must be a multiple of 2"),
        (Batching(generations=4), 6, "must be a multiple of 4"),
    ],
)
def test_what_cannot_be_shared_out(batching: Batching, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        batching.rows(size)
