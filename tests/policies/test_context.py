"""The context: of a model, and of rotary schemes that change with the length of the batch."""

from types import SimpleNamespace
from typing import Any

import pytest

from grade_lightning.policies.context import context_length


def config(**settings: Any) -> Any:
    text = SimpleNamespace(**settings)
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({}, None),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default"}}, 64),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8},
            },
            64,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8},
            },
            8,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 16},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            16,
        ),
        (
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "longrope"},
            },
            32,
        ),
    ],
)
def test_schemes_that_change_end_at_their_original_context(settings: dict[str, Any], length: int | None) -> None:
    assert context_length(config(**settings)) == length
