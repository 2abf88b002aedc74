"""An agent that is a program, with nothing but its interpreter's standard library."""

import json
import os
import sys
import urllib.request

body = {"model": os.environ["OPENAI_MODEL"], "max_tokens": 4, "messages": json.load(sys.stdin)}
request = urllib.request.Request(
    f"{os.environ['OPENAI_BASE_URL']}/chat/completions",
    json.dumps(body).encode(),
    {"content-type": "application/json", "authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
)
with urllib.request.urlopen(request) as answer:
    completion = json.load(answer)
print("the answer to", sys.argv[1], "is", repr(completion["choices"][0]["message"]["content"]))
print(json.dumps({"reward": {completion["id"]: 0.25}}))
