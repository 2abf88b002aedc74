"""`areal-sub check-agent`: one agent run against a scripted model, and what that shows of it.

command.py   the command: starts proxy, supervisor and scripted engine, runs the agent, prints
scripted_engine.py   the engine's process: tokens in, tokens out, no model
script.py    what the scripted model says (pure)
tokenizer.py its tokenizer and chat template
findings.py  records → what the agent used, and whether it would be trained exactly (pure)
"""
