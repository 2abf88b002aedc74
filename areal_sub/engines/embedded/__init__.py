"""The embedded engine: continuous batching over any full-attention Hugging Face causal LM.

    asyncio thread (server)                      decode thread (decoder, owns torch)
    rpc calls ── Request ──► inbox ──────────►  between two steps: join, abort, update, pause
       ▲                                        one step: prefill what joins, decode what runs,
       └── chunks ◄── one call per step ◄─────  sample one token per finished prompt or running row

Who waits for whom: an rpc call waits for its request's chunks; the decode thread waits for its
inbox only when it is paused or has nothing to decode; a weight update is read on a worker thread
and waits for the end of the step in progress, never for the requests.

    settings  the settings file, checked          server    rpc methods, asyncio
    request   one checked sampling request        decoder   the decode thread
    batch     who joins, who moves (pure)         runner    model + cache → next-token logits
    sampling  logits → tokens, logprobs (pure)    cache     keys and values, one row per request
    prefixes  keys and values kept for next turn  weights   loading, checking, updating
    grammars  what a request may sample           matching  the processes that match grammars
    fused     Llama and Qwen2 in few operations
"""
