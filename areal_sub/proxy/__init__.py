"""The proxy: captures what any agent asks of "OpenAI", token-exact.

Bottom up: `neutral.py` (what a call is, whatever its dialect), `refusals.py` (why one is refused),
`render.py` (messages → tokens), `decode.py` (tokens → text), `parsers/` (text → tool calls),
`constraints.py` (what an answer has to look like → grammar),
`history.py` (which earlier turn a call continues), `sessions.py` (keys, limits), `turns.py` (one
call from its messages to its records), `dialects/` (wire ↔ neutral), `app.py` (routes),
`control.py` (the trainer's side), `server.py` (the listening sockets).
"""
