"""AReaL's way to start a run, as a script of one's own:

python3 examples/proxy/train.py --config examples/proxy/config.yaml rollout.openai.mode=subproc
"""

from __future__ import annotations

import sys

from areal_sub import Trainer, load_config


def main(argv: list[str]) -> None:
    config = load_config(argv)
    Trainer(config).train(
        workflow=config.workflow,
        eval_workflow=config.eval_workflow,
        workflow_kwargs=config.workflow_kwargs,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
