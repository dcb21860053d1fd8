"""Where a network is cut, and what is refused: kinds of models that are arranged otherwise than most."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grade_lightning.errors import InputError
from grade_lightning.policies import LoRA, Policy
from grade_lightning.policies.anatomy import distance, examine, examine_backbone, some_tokens
from tests.conftest import make_model, make_tokenizer
from tests.policies.tiny import tiny_model


def test_a_decoder_within_the_base_model_is_the_body() -> None:
    """OPT's head calls `model.decoder`; its final states may be narrower than its embeddings."""
    found = examine(tiny_model("opt", word_embed_proj_dim=16).eval(), "opt")
    assert (found.body, found.width) == ("model.decoder", 16)


def test_every_layer_of_a_head_gets_its_gradient() -> None:
    """A head of several layers, as BERT's: each of their parameters is among those of the head."""
    model: Any = make_model("gpt2").eval()
    first = nn.Linear(16, 16)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = first, nn.LayerNorm(16), model.lm_head

        @property
        def weight(self) -> Any:
            return self.last.weight

        def forward(self, hidden: Tensor) -> Tensor:
            logits: Tensor = self.last(self.norm(self.first(hidden)))
            return logits

    model.lm_head = Head()
    model.get_output_embeddings = lambda: model.lm_head.last
    policy = Policy.from_model(model, make_tokenizer(), reference=False)
    names = {name.removeprefix("lm_head.") for name in policy.anatomy.head}
    assert names == {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight"}
    hidden = torch.randn(4, policy.width)
    policy.vocabulary(hidden).map(lambda logits, rows: [logits.log_softmax(-1)[:, 3]])[0].sum().backward()
    assert first.weight.grad is not None
    assert first.weight.grad.any()


def test_what_cannot_be_cut_is_used_whole(recwarn: pytest.WarningsRecorder) -> None:
    """A head that reads more than the last hidden state."""
    model: Any = make_model("gpt2").eval()
    plain = model.forward

    def forward(**kwargs: Any) -> Any:
        output = plain(**kwargs, output_hidden_states=True)
        output.logits = output.logits + model.lm_head(output.hidden_states[0])
        return output

    model.forward = forward
    policy = Policy.from_model(model, make_tokenizer(), reference=False)
    assert policy.anatomy.body is None
    assert any("it is used whole" in str(warning.message) for warning in recwarn.list)
    ids = some_tokens(model, 2, 5)
    mask = torch.ones_like(ids)
    logits = policy.logits(policy.embed(ids), mask, 3)
    torch.testing.assert_close(logits, forward(input_ids=ids).logits[:, -3:])
    columns = policy.vocabulary(policy.hidden(policy.embed(ids), mask, 3).flatten(0, 1)).map(
        lambda x, rows: x.unbind(-1)
    )
    torch.stack(columns, -1).square().sum().backward()
    ours = model.lm_head.weight.grad.clone()
    model.zero_grad()
    forward(input_ids=ids).logits[:, -3:].square().sum().backward()
    torch.testing.assert_close(ours, model.lm_head.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("bert", {}, "is not a causal model: a later token changes its logits"),
        ("rwkv", {}, "its logits of a row change with the padding of its batch"),
        ("gemma3n_text", {}, "does not make of embeddings what it makes of tokens"),
    ],
)
def test_what_cannot_be_trained_rightly_is_refused(kind: str, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Policy.from_model(tiny_model(kind, **overrides), make_tokenizer())
    assert str(caught.value).count("\n") == 0


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    model: Any = make_model("gpt2")
    model.transformer.ln_f.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="logits differ by nan"):
        Policy.from_model(model, make_tokenizer())


def test_parameters_that_no_text_reaches_are_named() -> None:
    model: Any = make_model("gpt2")
    model.tower = nn.Linear(2, 2)
    with pytest.warns(
        UserWarning, match=r"no text reaches 2 of the trainable parameters of GPT2LMHeadModel, such as tower"
    ):
        policy = Policy.from_model(model, make_tokenizer(), reference=False)
    assert policy.anatomy.unused == ("tower.bias", "tower.weight")
    assert Policy.from_model(make_model("llama"), make_tokenizer(), LoRA(r=2)).anatomy.unused == ()


def test_what_was_trained_before_is_trained_after() -> None:
    model: Any = make_model("gpt2").eval()
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    examine(model, "x")
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(p.grad is not None for p in model.parameters())


def test_a_backbone_has_the_width_of_its_states() -> None:
    narrow: Any = tiny_model("opt", word_embed_proj_dim=16).eval()
    assert examine_backbone(narrow.model, "x") == 16
    with pytest.raises(InputError, match="hidden states of a row change with the padding"):
        examine_backbone(tiny_model("rwkv").eval().base_model, "x")


def test_tokens_that_a_configuration_names_are_not_tried() -> None:
    model = make_model("gpt2")
    model.config.eos_token_id, model.config.pad_token_id, model.config.image_token_id = list(range(2, 17)), 1, 17
    assert set(some_tokens(model, 4, 20).flatten().tolist()) == {18}


def test_a_model_of_a_short_context_is_tried_on_less() -> None:
    model: Any = tiny_model("gpt2", n_positions=5).eval()
    assert some_tokens(model, 2, 20).shape == (2, 5)
    assert examine(model, "x").body == "transformer"


def test_distances() -> None:
    right = torch.tensor([0.0, 2.0, -torch.inf])
    assert distance(right, right) == 0
    assert distance(torch.tensor([0.0, torch.nan, -torch.inf]), right) != distance(right, right)
    assert distance(torch.ones(2), right) == float("inf")
