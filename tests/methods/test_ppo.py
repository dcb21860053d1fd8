"""PPO: advantages, returns and both losses against plain loops; what the value head is and what it may touch."""

import itertools
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from grade_lightning.kl import KL
from grade_lightning.methods import PPO
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Rollout
from grade_lightning.rewards import FunctionReward
from tests.conftest import make_model, make_tokenizer
from tests.methods.toy_task import Toy, fit, make
from tests.modules.toys import Choosy, Keep, begun, build, distance, flat, prompts, run

both_trunks = pytest.mark.parametrize("trunk", ["detached", "shared"])


pytestmark = pytest.mark.usefixtures("own_random_state")


def make_ppo(begun: bool = True, **kwargs: Any) -> PPO:
    """On prescribed completions; `begun`: with a value head that has learnt something already."""
    module = build(PPO, **{"num_generations": 4, "epochs": 2} | kwargs)
    assert isinstance(module, PPO)
    assert module.critic is not None
    assert module.critic.head is not None
    if begun:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            module.critic.head.weight.copy_(0.1 * torch.randn(module.critic.head.weight.shape, generator=generator))
            module.critic.head.bias.fill_(0.1)
        module.critic.head.double()
    return module


def by_hand(state: dict[str, Tensor], rollout: Rollout) -> tuple[torch.nn.Module, list[Tensor], list[Tensor]]:
    """Log-probabilities of the tokens and values of the positions that they were chosen at, row by row, unpadded."""
    model: Any = make_model("gpt2", torch.float64)
    own = {name.removeprefix("policy.model."): x for name, x in state.items() if name.startswith("policy.model.")}
    model.load_state_dict(own, strict=False)  # the head is the table
    model.eval()
    logps, values = [], []
    for row in range(len(rollout.ids)):
        ids = rollout.ids[row][rollout.mask[row].bool()].unsqueeze(0)
        length = int(rollout.lengths[row])
        output = model(input_ids=ids, output_hidden_states=True)
        chosen_at = slice(-length - 1, -1)
        picked = output.logits[0, chosen_at].log_softmax(-1).gather(-1, ids[0, -length:, None])
        logps.append(picked.squeeze(-1))
        hidden = output.hidden_states[-1][0, chosen_at]
        values.append(hidden @ state["critic.head.weight"][0] + state["critic.head.bias"])
    return model, logps, values


@both_trunks
def test_everything_against_plain_loops(trunk: Literal["detached", "shared"]) -> None:
    """KL and reward in each token's reward, GAE, whitening, returns, both clipped losses: the second epoch's gradient.

    The departures from a plain computation that are meant: values are rounded to float32.
    """
    beta, gamma, lam, epsilon, near, coefficient = 0.3, 0.97, 0.9, 0.05, 0.05, 0.7
    module = make_ppo(
        trunk=trunk,
        kl=KL(beta),
        gamma=gamma,
        lam=lam,
        epsilon=epsilon,
        epsilon_value=near,
        vf_coef=coefficient,
        lr=0.2,
    )
    # the reference is what it began as; the first window moves the policy away from it
    watch = run(module, prompts(4), prompts(4, seed=1), callbacks=[keep := Keep()])
    rollout, window = keep.window.rollout, keep.window
    _, reference, _ = by_hand(watch.before[0], rollout)
    _, old, old_values = by_hand(watch.before[2], rollout)
    model, new, new_values = by_hand(watch.before[3], rollout)

    scores = Toy().score(rollout).total.double()
    estimates = []
    for row, (logp, ref, value) in enumerate(zip(old, reference, old_values, strict=True)):
        length = len(logp)
        rewards = [-beta * float(logp[t] - ref[t]) for t in range(length)]
        rewards[-1] += float(scores[row]) - watch.logged[0]["train/reward"]  # the mean of the first window
        after = [*value.tolist()[1:], 0.0]
        errors = [r + gamma * v2 - v for r, v2, v in zip(rewards, after, value.tolist(), strict=True)]
        estimates.append([sum((gamma * lam) ** (u - t) * errors[u] for u in range(t, length)) for t in range(length)])
    every = torch.tensor(list(itertools.chain(*estimates)), dtype=torch.float64)
    white = [(torch.tensor(e, dtype=torch.float64) - every.mean()) / every.std() for e in estimates]
    returns = [torch.tensor(e, dtype=torch.float64) + v.detach() for e, v in zip(estimates, old_values, strict=True)]
    assert window.advantages is not None
    assert window.returns is not None
    mask = rollout.completion_mask
    torch.testing.assert_close(window.advantages[mask].double(), torch.cat(white), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(window.returns[mask].double(), torch.cat(returns), rtol=1e-4, atol=1e-5)
    assert not window.advantages[~mask].any()

    ratio = torch.cat([(a - b.detach()).exp() for a, b in zip(new, old, strict=True)])
    a, r = torch.cat(white), torch.cat(returns)
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a).mean()
    (surrogate.neg()).backward(retain_graph=True)
    v, v0 = torch.cat(new_values), torch.cat(old_values).detach()
    held = v0 + (v - v0).clamp(-near, near)
    value_loss = torch.maximum((v - r) ** 2, (held - r) ** 2).mean() / 2
    if trunk == "shared":
        (coefficient * value_loss).backward()
    truth = {f"policy.model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = {name: g for name, g in watch.gradients[3].items() if name.startswith("policy.")}
    assert distance(ours, truth) < 1e-4
    beyond = ((a > 0) & (ratio > 1 + epsilon)) | ((a < 0) & (ratio < 1 - epsilon))
    assert watch.logged[3]["train/clip_fraction"] == pytest.approx(float(beyond.double().mean()), rel=1e-5)
    assert 0 < beyond.sum() < len(beyond)
    assert watch.logged[3]["value/loss"] == pytest.approx(float(value_loss), rel=1e-4)
    explained = 1 - float((r - v0).var() / r.var())
    assert watch.logged[3]["value/explained_variance"] == pytest.approx(explained, rel=1e-3)


def test_a_reward_that_is_always_the_same_teaches_nothing() -> None:
    """Nor that the end comes early, although a new value head expects 0 everywhere."""
    module = make_ppo(begun=False, reward=FunctionReward(lambda completions, **_: [0.75] * len(completions)), kl=KL())
    watch = run(module, prompts(4), callbacks=[keep := Keep()])
    assert keep.window.advantages is not None
    assert keep.window.advantages.abs().max() < 1e-5
    assert all(g.abs().max() < 1e-5 for name, g in watch.gradients[0].items() if name.startswith("policy."))


@both_trunks
def test_a_detached_trunk_has_no_gradient_of_the_values(trunk: Literal["detached", "shared"]) -> None:
    """A hundredfold weight of the value loss: the same gradient of the policy where it is detached, else another."""
    little, much = (
        run(make_ppo(trunk=trunk, vf_coef=coefficient, lr=1e-3), prompts(4)).gradients[0] for coefficient in (0.1, 10.0)
    )
    policy = [{name: g for name, g in found.items() if name.startswith("policy.")} for found in (little, much)]
    head = [{name: g for name, g in found.items() if name.startswith("critic.head.")} for found in (little, much)]
    if trunk == "detached":
        assert torch.equal(flat(policy[0]), flat(policy[1]))
    else:
        assert distance(policy[0], policy[1]) > 0.5
    assert distance({name: 100 * g for name, g in head[0].items()}, head[1]) < 1e-6


def test_the_value_head_is_zero_at_first_and_stays_what_it_is_when_the_model_is_configured_again() -> None:
    module = make_ppo(begun=False, kl=KL())
    assert module.critic is not None
    assert module.critic.head is not None
    assert not flat(dict(module.critic.head.named_parameters())).any()
    experience = module.collect(prompts(4))
    assert experience.old is not None
    assert experience.old.values is not None
    assert experience.returns is not None
    assert not experience.old.values.any()
    last = experience.rollout.lengths.unsqueeze(1) - 1
    scores = experience.scores.total
    torch.testing.assert_close(experience.returns.gather(1, last).squeeze(1).float(), scores - scores.mean())
    head = module.critic.head
    module.configure_model()
    assert module.critic.head is head


def long_prompts(prompts: list[str], **_: Any) -> list[float | None]:
    return [float(len(prompt.split()) - 4) for prompt in prompts]


@pytest.mark.parametrize(("trunk", "share"), [pytest.param("detached", 0.35, marks=pytest.mark.slow), ("shared", 0.7)])
def test_values_learn(trunk: str, share: float) -> None:
    """A reward that the prompt decides: at first nothing of its variance is explained, soon most of it."""
    module = build(
        PPO,
        torch.float32,
        reward=FunctionReward(long_prompts),
        num_generations=4,
        kl=KL(),
        lam=1.0,
        epsilon_value=10.0,
        vf_coef=1.0,
        trunk=trunk,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    watch = run(module, *[prompts(6)] * 7)
    explained, losses = (
        [line[f"value/{name}"] for line in watch.logged[:: module.epochs]] for name in ("explained_variance", "loss")
    )
    assert explained[0] == pytest.approx(0, abs=1e-6)  # all values are 0
    assert explained[-1] > share
    assert losses[-1] < (1 - share) * losses[0]


@both_trunks
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lora_with_bfloat16_weights(trunk: Literal["detached", "shared"], precision: str) -> None:
    module = make(PPO, trunk=trunk, epochs=2)
    model = make_model("llama", torch.bfloat16)
    module.policy = Policy.from_model(model, make_tokenizer(), LoRA(r=2, dropout=0.0))
    recorder = fit(module, 4, precision=precision)
    assert isinstance(module, PPO)
    assert module.critic is not None
    assert module.critic.head is not None
    assert {p.dtype for p in module.critic.head.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(torch.tensor(step["train/loss"]).isfinite() for step in recorder.steps)
    assert recorder.without_gradient[-1] == set()
    assert module.critic.head.weight.any()


def test_completions_without_a_reward_change_nothing_for_the_others() -> None:
    """Advantages (whitened) and returns of the others are those of a window without them; theirs are 0."""
    window = begun(prompts(6))
    whole = make_ppo(kl=KL(0.2), reward=Choosy()).collect(window)
    answered = ~whole.scores.total.isnan()
    rows = answered.nonzero().flatten()
    assert 0 < len(rows) < len(answered)

    columns = {"completions": [[window["columns"]["completions"][i // 4][i % 4]] for i in rows.tolist()]}
    some = {name: window[name][rows // 4] for name in ("input_ids", "attention_mask")}
    alone = make_ppo(kl=KL(0.2), num_generations=1).collect(some | {"columns": columns})
    mask = whole.rollout.completion_mask
    for ours, truth in ((whole.advantages, alone.advantages), (whole.returns, alone.returns)):
        assert ours is not None
        assert truth is not None
        torch.testing.assert_close(ours[answered][mask[answered]], truth[alone.rollout.completion_mask])
        assert ours.isfinite().all()
    assert whole.advantages is not None
    assert not whole.advantages[~answered].any()
