"""The page of `make check-real`, with a scripted server."""

from pathlib import Path

from pipeline.config.files import resolve
from pipeline.doctor import Finding
from pipeline.run import generate_dataset
from tests.chat.server import Act, ChatServer, running_chat, task_of
from tests.check_real import describe_run


def test_page_of_a_real_gpu_check_states_speed_tokens_rejections_and_captions(tmp_path: Path) -> None:
    def script(times: int, body: dict[str, object]) -> Act | None:
        return Act(text="no JSON") if task_of(body) == "Task: qa" else None

    with running_chat(ChatServer(script)) as chat:
        server = {"max_failure_frac": 1.0}
        config = resolve(source="scenes", limit=12, base_url=[chat.url], model="model", server=server)
        result = generate_dataset(config, tmp_path / "d")
    page = describe_run(result, [Finding("gpu", True, "1 x NVIDIA L4"), Finding("hub", False, "no token")])
    lines = page.splitlines()
    assert "gpu: 1 x NVIDIA L4" in lines and "hub: no token" not in lines
    assert any(line.startswith("requests: 60 in ") and line.endswith(" per second") for line in lines)
    assert "unusable replies: {'not_json': 36}" in lines
    assert "validate: 24 of 36 {'not_json': '33.3%'}" in lines
    assert "- A small red ring on a white background." in lines
