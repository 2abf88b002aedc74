"""API dialects: each a thin translation between its wire form and `neutral.py`.

A dialect is a module with `NAME`, `parse` (body → `Call`), `answer` (choices → body), `Stream`
(deltas → server-sent events) and `error_body` (`Refusal` → body). `app.py` gives it its routes.
"""
