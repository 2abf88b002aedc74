"""The proxy: captures what any agent asks of "OpenAI", "Anthropic" or "Gemini", token-exact.

Bottom up: `neutral.py` (what a call is, whatever its dialect), `refusals.py` (why one is refused),
`render.py` (messages → tokens), `decode.py` (tokens → text), `parsers/` (text → tool calls and
reasoning), `constraints.py` (what an answer has to look like → grammar), `choice.py` (one choice
while it is sampled), `history.py` (which earlier turn a call continues), `kept.py` (answers that
later calls may name), `sessions.py` (keys, limits), `turns.py` (one call from its messages to its
records), `dialects/` (wire ↔ neutral), `answering.py` (a call's answer, whole or streamed),
`routes.py` (paths), `app.py` (what every call goes through),
`control.py` (the trainer's side), `server.py` (the listening sockets).
"""
