"""A small model folder."""

from pathlib import Path

import pytest

from tests.conftest import make_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", scale=3.0).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
