"""Engines: processes that answer `areal_sub.engine_client`'s contract, tokens in and tokens out.

`embedded/` is the one written here, on torch and transformers. Each engine is started as
`python -m areal_sub.engines.<name> SETTINGS.json`; nothing imports an engine, callers only ever
hold its socket.
"""
