"""LiteLLM, which gateways put in front of servers like this one, makes, follows and downloads a video."""

from __future__ import annotations

import os
import time
from types import ModuleType
from typing import Any

import pytest

from tests.acceptance.live_server import LiveServer
from tests.acceptance.mp4_boxes import times_s

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
"""LiteLLM keeps its connections open, and uses what pydantic has deprecated."""


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices when it is imported
    module: ModuleType = pytest.importorskip("litellm", reason="litellm is not installed")
    return module


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_create_status_content(litellm: ModuleType, server: LiveServer, provider: str) -> None:
    _skip_unless_it_makes_videos(litellm, provider)
    at: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": "unused"}
    made = litellm.video_generation(
        prompt="a red ball", model=f"{provider}/helios-tiny", size="64x64", seconds="1", **at
    )
    assert made.object == "video"
    assert made.status in ("queued", "in_progress")
    deadline = time.monotonic() + 60
    while (video := litellm.video_status(made.id, **at)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, video
        time.sleep(0.1)
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "1", "64x64")
    assert video.error is None
    assert len(times_s(litellm.video_content(made.id, **at))) == 24


def test_the_servers_refusal_comes_through(litellm: ModuleType, server: LiveServer) -> None:
    with pytest.raises(litellm.BadRequestError, match="nearest: 640x384, 704x384"):
        litellm.video_generation(
            prompt="a", model="openai/helios-tiny", size="650x384", api_base=f"{server.url}/v1", api_key="unused"
        )


def test_remix(litellm: ModuleType, server: LiveServer, finished: str) -> None:
    video = litellm.video_remix(
        finished, "a green ball", custom_llm_provider="openai", api_base=f"{server.url}/v1", api_key="unused"
    )
    assert video.remixed_from_video_id == finished


def _skip_unless_it_makes_videos(litellm: ModuleType, provider: str) -> None:
    from litellm.types.utils import LlmProviders
    from litellm.utils import ProviderConfigManager

    if ProviderConfigManager.get_provider_video_config(model=None, provider=LlmProviders(provider)) is None:
        pytest.skip(f"this version of LiteLLM makes no videos with {provider}/")
