"""Runs inside vLLM: takes new weights, from files or by broadcast, and holds outputs to grammars.

The only package of ours that imports vllm. vLLM's own interpreter loads it, in each of its
processes, through the entry point in the `.dist-info` folder beside it: the folder of both is on
the server's PYTHONPATH, and nothing is installed. Of ours it can import nothing else.
"""


def register() -> None:
    from . import grammars, weights  # not above: `group` is for those who have no vLLM, too

    weights.register()
    grammars.register()
