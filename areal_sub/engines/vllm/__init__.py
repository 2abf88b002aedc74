"""vLLM behind the engine contract: a process of ours that speaks rpc above and HTTP below.

    trainer, proxy ── rpc ──► server ──► calls ──► fleet ──► api ── HTTP ──► vLLM (one or many)
                                           │         │
                                      wire (pure)    ├── member: one server, and whether it is well
                                                     ├── process: starts vLLM, ends it
                                                     ├── probe: what it can do, what is wrong
                                                     ├── update: pause → load → resume → verify
                                                     ├── broadcast: `load` to another machine
                                                     └── adapters: or, with LoRA, beside one another

Who waits for whom: a call waits for its server's tokens, and for a server to be ready again where
its own has died; an update waits for each of its steps, which all have deadlines; a server that
died is brought back by its keeper, which loads the current weights before anyone gets to it.

Nothing here imports vllm. What runs inside vLLM is `plugin/`, on the server's PYTHONPATH.
"""
