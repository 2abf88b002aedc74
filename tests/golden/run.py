"""run records."""

from areal_sub.records import RunRequest

RECORD = RunRequest(
    rollout_id="r1",
    target="a.b:C",
    pickled=b"",
    workflow_kwargs={"k": 1},
    data={"q": "?"},
    env={"A": "b"},
    timeout_s=5.0,
    workspace="/tasks/t1",
    outputs=["out"],
    python="/p",
    readable=["/r"],
    argv=["a", "b"],
    stdin="i",
    files={"f": "c"},
    reward="last_line",
    grader=True,
)
BYTES = [
    (
        "89a46b696e64a372756ea17601aa726f6c6c6f75745f6964a27231a6746172676574a5612e623a43"
        "a77069636b6c6564c400af776f726b666c6f775f6b776172677381a16b01a46461746181a171a13f"
        "a3656e7681a141a162a974696d656f75745f73cb4014000000000000"
    ),
    (
        "de0012a46b696e64a372756ea17601aa726f6c6c6f75745f6964a27231a6746172676574a5612e62"
        "3a43a77069636b6c6564c400af776f726b666c6f775f6b776172677381a16b01a46461746181a171"
        "a13fa3656e7681a141a162a974696d656f75745f73cb4014000000000000a9776f726b7370616365"
        "a92f7461736b732f7431a76f75747075747391a36f7574a6707974686f6ea22f70a8726561646162"
        "6c6591a22f72a46172677692a161a162a5737464696ea169a566696c657381a166a163a672657761"
        "7264a96c6173745f6c696e65a6677261646572c3"
    ),
]
