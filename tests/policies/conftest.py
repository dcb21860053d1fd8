"""A model folder."""

from pathlib import Path

import pytest

from tests.conftest import make_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose configuration has dropout."""
    path = tmp_path_factory.mktemp("model")
    model = make_model()
    for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(model.config, key, 0.5)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
