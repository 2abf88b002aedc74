"""An agent without an SDK: asks for the word it is given, and is right if it gets it back."""

import json
import os
import sys
import urllib.request

word = sys.argv[1]
body = {"model": "m", "messages": [{"role": "user", "content": word}]}
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps(body).encode(),
    {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
)
with urllib.request.urlopen(request) as response:
    answer = json.load(response)
print(float(answer["choices"][0]["message"]["content"] == word))
