"""Raises when imported, from a helper of its own."""


def _load_weights() -> None:
    raise RuntimeError("weights are \x1b[31mmissing\x1b[0m")


_load_weights()


def agent(data: object) -> float:
    return 1.0
