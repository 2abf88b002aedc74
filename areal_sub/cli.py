"""The command line: `areal-sub train | chat | inspect | status | replay | check-agent | doctor`.

Imports nothing heavy until a command needs it: a mistyped key is told within a second.
Exit codes: 0 done, 1 the run failed, 2 the input cannot be used, 128+N ended by signal N.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from areal_sub import __version__
from areal_sub.errors import INPUT_ERRORS, ArealSubError

_TRAIN_HELP = """\
Trains the model behind an agent.

  areal-sub train --config examples/proxy/config.yaml rollout.openai.mode=subproc seed=3

KEY=VALUE overrides a setting of the file by its dotted path; docs/configuration.md lists them."""

_CHAT_HELP = """\
Talks to a checkpoint: through the agent that it was trained with (which then uses its tools), or,
with --plain, to the bare model. End with Ctrl-D."""


_INSPECT_HELP = """\
Lists the rollouts of a run with what became of each and why; with ROLLOUT (the beginning of its id
is enough) shows that one: its turns, what was said, and what was trained. A run may be going on.

  areal-sub inspect runs/calculator/default --not-trained
  areal-sub inspect calculator/default g000012-3 --tokens"""


_REPLAY_HELP = """\
Runs a run's agent again on the tasks of recorded rollouts; the model's answers are the recorded
ones, so that a mistake of the agent's comes again. Says where the agent asks for something else.

  areal-sub replay calculator/default g000012-3
  areal-sub replay calculator/default g000012-3 --inline     # in this process: breakpoints work"""


_CHECK_HELP = """\
Runs an agent against a scripted model, sandboxed as in training, and says what it uses, whether it
would be trained token for token, what it wants to reach besides the model, and what to change.

  areal-sub check-agent my_agent.agent
  areal-sub check-agent 'cmd:node agent.js {question}' rollout.openai.agent_env=agents/coder
  areal-sub check-agent --config config.yaml --json"""

_LIMIT_ERROR = "--limit: a number of rollouts, or 0 for all"


def main(argv: Sequence[str] | None = None) -> None:
    """The `areal-sub` command."""
    _complete_streams()
    code = run(sys.argv[1:] if argv is None else argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # as in `run`
        pass
    except OSError as error:
        _complain(f"the output cannot be written: {error.strerror}")
        code = code or 1
    with suppress(OSError):
        sys.stderr.flush()
    # Not sys.exit: after a signal a learner's step may still compute in its thread, and the
    # interpreter would wait for it. Every process of the run has been ended by now.
    os._exit(code)


def _complete_streams() -> None:
    """Whoever prints needs to know nothing of streams that are closed (`>&-`) or not Unicode."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Takes the lowest free descriptor: the one that was closed, before another file does.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr does as much by itself
        sys.stdout.reconfigure(errors="replace")


def _complain(text: str) -> None:
    with suppress(OSError):  # stderr may be gone, and the exit code says it, too
        print(f"areal-sub: {text}", file=sys.stderr)  # noqa: T201


def run(argv: Sequence[str]) -> int:
    """The exit code of the command `argv`; errors of ours are printed, not raised."""
    parser = _parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
        if arguments.command == "train":
            return _train(rest)
        if arguments.command == "check-agent":
            return _check_agent(arguments, rest, parser)
        if arguments.command == "replay":
            return _replay(arguments, rest, parser)
        # argparse does not take an optional positional that stands behind an option.
        is_name = len(rest) == 1 and not rest[0].startswith("-")
        if arguments.command == "inspect" and arguments.rollout is None and is_name:
            arguments.rollout = rest.pop()
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        if arguments.command == "doctor":
            # The sandbox stands on its own, and so does its report.
            command = [sys.executable, "-m", "sandbox", "doctor"]
            return subprocess.run(command, check=False).returncode
        if arguments.command == "inspect":
            return _inspect(arguments, parser)
        if arguments.command == "status":
            from areal_sub.inspection.status import show_status

            return show_status(arguments.run, as_lines=arguments.json)
        return _chat(arguments)
    except BrokenPipeError:  # whoever read our output (`head`, a pager) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:  # argparse's way of ending
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ArealSubError as error:
        _complain(str(error))
        return 2 if isinstance(error, INPUT_ERRORS) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="areal-sub", description="Train the model behind any agent."
    )
    parser.add_argument("--version", action="version", version=f"areal-sub {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train the model behind an agent",
        description=_TRAIN_HELP,
        usage="areal-sub train --config FILE [KEY=VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.set_defaults(command="train")
    chat = commands.add_parser(
        "chat",
        help="talk to a checkpoint",
        description=_CHAT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat.add_argument("checkpoint", help="a run's folder, or a Hugging Face model folder")
    chat.add_argument("--plain", action="store_true", help="the bare model, without the agent")
    chat.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    chat.add_argument("--max-new-tokens", type=int, default=256)
    _add_inspect(commands)
    _add_replay(commands)
    status = commands.add_parser(
        "status",
        help="show who waits for whom in a run that is going on",
        description="Asks each process of a run what it is doing, and what it waits for.",
    )
    status.add_argument("run", metavar="RUN", help="a run's folder, or experiment/trial")
    status.add_argument("--json", action="store_true", help="one JSON object per process")
    _add_check(commands)
    commands.add_parser("doctor", help="show how well agents can be isolated on this machine")
    return parser


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what became of each rollout of a run, and why",
        description=_INSPECT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("run", metavar="RUN", help="a run's folder, or experiment/trial")
    inspect.add_argument("rollout", metavar="ROLLOUT", nargs="?", help="a rollout's id")
    inspect.add_argument("--failed", action="store_true", help="outcomes other than completed")
    inspect.add_argument(
        "--not-trained", action="store_true", help="meant for training, and not trained"
    )
    inspect.add_argument("--reward-below", type=float, metavar="X")
    inspect.add_argument("--split", choices=("train", "valid"))
    inspect.add_argument("--limit", type=int, metavar="N", help="at most N of them; 0: all")
    inspect.add_argument("--tokens", action="store_true", help="of ROLLOUT: token by token")
    inspect.add_argument("--json", action="store_true", help="one JSON object per line")


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay",
        help="run an agent against the answers of a recorded rollout",
        description=_REPLAY_HELP,
        usage="areal-sub replay RUN [ROLLOUT] [--inline] [--limit N] [KEY=VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument("run", metavar="RUN", help="a run's folder, or experiment/trial")
    replay.add_argument("rollout", metavar="ROLLOUT", nargs="?", help="one; else all that ended")
    replay.add_argument("--inline", action="store_true", help="in this process, without a sandbox")
    replay.add_argument("--limit", type=int, default=0, metavar="N", help="the first N; 0: all")


def _replay(arguments: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> int:
    from areal_sub.replay.command import replay_run

    rollout: str | None = arguments.rollout
    if rollout is None and rest and "=" not in rest[0] and not rest[0].startswith("-"):
        rollout, rest = rest[0], rest[1:]  # it stood behind an option
    elif rollout is not None and "=" in rollout:
        rest, rollout = [rollout, *rest], None
    if unknown := [word for word in rest if "=" not in word or word.startswith("-")]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if arguments.limit < 0:
        parser.error(_LIMIT_ERROR)
    return replay_run(arguments.run, rollout, rest, inline=arguments.inline, limit=arguments.limit)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check-agent",
        help="run an agent against a scripted model, and say how it can be trained",
        description=_CHECK_HELP,
        usage="areal-sub check-agent [AGENT] [--config FILE] [options] [KEY=VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("agent", metavar="AGENT", nargs="?", help="an import path, or 'cmd:...'")
    check.add_argument("--config", metavar="FILE", help="a run's configuration, for its agent")
    check.add_argument("--task", metavar="JSON", help="the task it gets: JSON, or a file of it")
    check.add_argument(
        "--script", metavar="JSON", help="what the model says: an array of texts, or a file of it"
    )
    check.add_argument("--num", type=int, default=2, metavar="N", help="runs (default 2)")
    check.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _check_agent(
    arguments: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser
) -> int:
    from areal_sub.checking.command import check_agent

    agent: str | None = arguments.agent
    if agent is not None and "=" in agent and not agent.startswith("cmd:"):
        rest, agent = [agent, *rest], None
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if arguments.num < 1:
        parser.error("--num: at least 1")
    return check_agent(
        agent,
        rest,
        config_file=arguments.config,
        task=arguments.task,
        script=arguments.script,
        num=arguments.num,
        as_json=arguments.json,
    )


def _inspect(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from areal_sub.inspection.command import inspect_rollout, inspect_run
    from areal_sub.inspection.listing import Filter

    which = Filter(
        failed=arguments.failed,
        not_trained=arguments.not_trained,
        reward_below=arguments.reward_below,
        split=arguments.split,
    )
    if arguments.rollout is None:
        if arguments.tokens:
            parser.error("--tokens needs a ROLLOUT")
        if arguments.limit is not None and arguments.limit < 0:
            parser.error(_LIMIT_ERROR)
        code = inspect_run(arguments.run, which, limit=arguments.limit, as_lines=arguments.json)
    else:
        if which != Filter() or arguments.limit is not None:
            parser.error("filters are for a list of rollouts, not for one ROLLOUT")
        code = inspect_rollout(
            arguments.run, arguments.rollout, tokens=arguments.tokens, as_lines=arguments.json
        )
    sys.stdout.flush()  # here, where a closed pipe is expected
    return code


def _train(argv: Sequence[str]) -> int:
    from areal_sub.config import load_config

    config = load_config(argv)
    faulthandler.register(signal.SIGUSR1)  # where each thread stands, to stderr
    from areal_sub.trainer import Trainer
    from areal_sub.trainer.trainer import Interrupted

    try:
        Trainer(config).train()
    except Interrupted as end:
        _complain(str(end))
        return 128 + end.sign
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from areal_sub.trainer.chat import chat

    return chat(
        arguments.checkpoint,
        plain=arguments.plain,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
    )
