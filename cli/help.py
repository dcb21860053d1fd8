"""`grade-fit --help` on one screen; it says how to see the rest."""

from argparse import SUPPRESS
from collections.abc import Sequence

from grade_lightning.errors import InputError

TOPICS = ("trainer", "data", "checkpoint", "completions", "export", "gradient_variance", "all")
SHORT = """\
usage: {prog} --model NAME [options]

{what}

  {prog} --model GradeSTE                                   the bundled task: no network, no GPU
  {prog} --model GradeSTE --config configs/imdb_gpt2.yaml   options from a file
  {prog} --model GRPO --model.policy.path my/model --model.reward FunctionReward \\
      --model.reward.function my_rewards.score --data.source LocalFiles --data.source.train prompts.csv

the run
  -c, --config FILE                      options from a file; may be given several times
  --ckpt_path PATH                       a run's folder or `last`, to resume; a .ckpt file, to start from
  --seed_everything 42                   the seed
{own}
the method
  --model NAME                           a method (grade-methods lists them), or a class of yours: package.Class
  --model.policy.path my/model           the language model: a folder or a name on the Hub
  --model.policy.lora.r 16               train adapters of this rank instead of all weights
  --model.reward NAME                    what is maximised (grade-methods lists them, too)
  --model.sampler.max_new_tokens 48      tokens of a completion, at most
  --model.sampler.temperature 1.0        of the sampling
  --model.beta 0.002                     price of a nat of KL to the reference; policy gradients: --model.kl.beta
  --model.optimizer.lr 1e-5              learning rate; the defaults are for the tiny bundled models

the data
  --data.source LocalFiles               or HubDataset, InMemory, BundledReviews, …
  --data.source.train prompts.csv        its files or names
  --data.batch_size 32                   completions of a step
  --data.max_prompt_tokens 64            longer prompts are cut

the trainer
  --trainer.max_steps 300                optimizer steps
  --trainer.devices 8                    and .num_nodes, .strategy, .precision, .logger: Lightning's
  --trainer.val_check_interval 100       steps between measurements
  --trainer.accumulate_grad_batches 1    micro-batches of a step
  --gradient_variance.probe_every_n_steps 50   measure how noisy the gradient is

more
  {prog} --model.help NAME               all options of a method
  {prog} --model NAME --model.policy.help       … of its policy; also .sampler.help, .reward.help REWARD
  {prog} --help TOPIC    all of {topics}
  {prog} --model NAME --print_config     every option with its value, as a file to start from
"""
WHAT = {
    "fit": "Train a language model by a reward, by pairs or by labels; measure before and after.",
    "validate": "Measure a model or a checkpoint on the validation split.",
    "test": "Measure a model or a checkpoint on the test split.",
    "predict": "Write completions of the test prompts, with rewards and KL, as JSON lines.",
}
OWN = {
    "fit": "  --preflight                            show what the run will do and need, then end\n"
    "  --export.folder FOLDER                 where the trained model is written",
    "test": "  --output FILE                          write the completions to this file, too",
    "predict": "  --output FILE                          the file that they are written to",
}


def short(command: str) -> str:
    """The help of a command on one screen.

    Args:
        command: `fit`, `validate`, `test` or `predict`.

    Example:
        >>> short("test").splitlines()[0]
        'usage: grade-test --model NAME [options]'
    """
    own = f"{OWN[command]}\n" if command in OWN else ""
    return SHORT.format(prog=f"grade-{command}", what=WHAT[command], own=own, topics=", ".join(TOPICS))


def topic_of(args: Sequence[str]) -> tuple[list[str], str | None]:
    """Take what help is asked about out of the arguments.

    Args:
        args: those of the command.

    Returns:
        The arguments without it, and the topic: None if help is not asked for, "" if it is asked for alone.

    Raises:
        InputError: there is no such topic.

    Example:
        >>> topic_of(["--help", "trainer"])
        (['--help'], 'trainer')
    """
    rest = list(args)
    at = next((i for i, arg in enumerate(rest) if arg in ("-h", "--help")), None)
    if at is None:
        return rest, None
    if at + 1 == len(rest) or rest[at + 1].startswith("-"):
        return rest, ""
    topic = rest.pop(at + 1)
    if topic not in TOPICS:
        raise InputError(f"--help {topic}: no such topic; there are {', '.join(TOPICS)}, and --model.help NAME")
    return rest, topic


def restrict(parser: object, topic: str) -> None:
    """Leave in the help of a parser only what belongs to a topic.

    Args:
        parser: of the command.
        topic: one of `TOPICS`.
    """
    for action in parser._actions if topic != "all" else ():  # type: ignore[attr-defined]
        if not action.dest.startswith(f"{topic}."):
            action.help = SUPPRESS
    if topic != "all":
        parser.usage = SUPPRESS  # type: ignore[attr-defined]
