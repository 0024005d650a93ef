"""The command line as a user types it: files that it writes, one-line errors, and Ctrl-C."""

from __future__ import annotations

import inspect
import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from helios_serve import __version__, cli, serve_flags
from helios_serve.settings import Settings, setting_types

SMALL = ("--size", "64x64", "--steps", "1,1,1", "--seed", "3")


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Calls the entry point with arguments, as the installed script does."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["helios-serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out, err)

    yield call
    logger.handlers[:] = handlers
    logger.setLevel(level)


def decode(path: Path) -> npt.NDArray[np.uint8]:
    """[F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def clip() -> npt.NDArray[np.uint8]:
    """[40, 64, 64, 3], a bright square that moves."""
    pixels = np.zeros((40, 64, 64, 3), dtype=np.uint8)
    for index, frame in enumerate(pixels):
        frame[16:48, index // 2 : 32 + index // 2] = (200, 120, 40)
    return pixels


def test_make_tiny_and_generate(run: Run, tmp_path: Path) -> None:
    made = run("make-tiny", "--out", tmp_path / "tiny", "--variant", "base", "--seed", 5)
    assert made == (0, f"wrote a tiny base checkpoint to {tmp_path / 'tiny'}\n", "")
    video = tmp_path / "o.mp4"
    done = run(
        *("generate", "--model", tmp_path / "tiny", "--prompt", "a fox", "--negative-prompt", "blurry"),
        *("--size", "48x32", "--num-frames", 5, "--fps", 12, "--steps", 2, "--guidance-scale", 3.5, "--seed", 1),
        *("-o", video),
    )
    assert (done.status, done.out) == (0, "")
    assert re.search(rf"{re.escape(str(video))}: 5 frames, 48x32, seed 1, [0-9.]+ s, [0-9.]+ FPS", done.err)
    assert decode(video).shape == (5, 32, 48, 3)
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 12
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


@pytest.mark.parametrize(("policy", "num_frames"), [("trim", 40), ("pad", 66), ("reference", 65)])
def test_request_file_and_verification_files(
    run: Run, tiny_distilled: Path, tmp_path: Path, policy: str, num_frames: int
) -> None:
    body = {"prompt": "a fox", "num_frames": 40, "seed": 3, "size": "64x64"}
    (tmp_path / "r.json").write_text(
        json.dumps({**body, "helios": {"steps": [1, 1, 1], "frame_policy": policy}}), encoding="utf-8"
    )
    video, latents, frames = tmp_path / "o.mp4", tmp_path / "l.safetensors", tmp_path / "f.npy"
    done = run(
        *("generate", "--model", tiny_distilled, "--request", tmp_path / "r.json", "-o", video),
        *("--save-latents", latents, "--save-frames", frames),
    )
    assert done.status == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npy", "l.safetensors", "o.mp4", "r.json"]
    (name, tensor), *others = load_file(latents).items()
    assert (name, tuple(tensor.shape), tensor.dtype, others) == ("latents", (1, 16, 18, 8, 8), torch.float32, [])
    pixels = np.load(frames)
    assert (pixels.shape, pixels.dtype) == ((1, num_frames, 64, 64, 3), np.float32)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pixels[0, -1].std() > 0
    shown = decode(video)
    assert shown.shape == (num_frames, 64, 64, 3)
    assert np.abs(shown / 255 - pixels[0]).mean() < 0.1


def test_image_and_video_files(run: Run, tiny_distilled: Path, tmp_path: Path, clip: npt.NDArray[np.uint8]) -> None:
    Image.fromarray(clip[0]).save(tmp_path / "i.png")
    np.save(tmp_path / "v.npy", clip)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    results = {}
    media = {"none": (), "i.png": ("--image",), "v.npy": ("--video",), "v.mp4": ("--video",)}
    for name, flag in media.items():
        given = (*flag, tmp_path / name) if flag else ()
        arguments = ("generate", "--model", tiny_distilled, "--prompt", "p", "--num-frames", 33, *SMALL, *given)
        done = run(*arguments, "-o", tmp_path / "o.mp4", "--save-latents", tmp_path / "l.safetensors")
        assert done.status == 0, done.err
        assert len(decode(tmp_path / "o.mp4")) == 33
        results[name] = load_file(tmp_path / "l.safetensors")["latents"]
    for name in ("i.png", "v.npy", "v.mp4"):
        assert (results[name] - results["none"]).abs().max() > 1e-2
    near, far = ((results["v.npy"] - results[name]).norm() for name in ("v.mp4", "i.png"))
    assert near < far


def test_flags_override_the_request_file(run: Run, tiny_distilled: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"prompt": "p", "num_frames": 99, "helios": {"steps": [9, 9, 9]}}')
    arguments = ("generate", "--model", tiny_distilled, "--request", tmp_path / "r.json", *SMALL, "--num-frames", 7)
    assert run(*arguments, "-o", tmp_path / "o.mp4").status == 0
    assert len(decode(tmp_path / "o.mp4")) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "p", "--size", "65x64"), r"size 65x64: .*64x64"),
        (("--prompt", "p", "--num-frames", "0"), r"num_frames"),
        (("--prompt", "p", "--steps", "1,x"), r"steps 1,x: must be whole numbers, such as 2,2,2"),
        (("--prompt", "p", "--steps", "1,1"), r"steps"),
        (("--prompt", "p", "--guidance-scale", "0.5"), r"guidance_scale"),
        (("--prompt", "p", "--image", "/no/such.png"), r"image /no/such.png: No such file"),
        (("--prompt", "p", "--video", __file__), r"video"),
        (("--request", "/no/such.json"), r"request /no/such.json: No such file"),
        (("--request", __file__), r"request .*not valid JSON"),
        (("--prompt", "p", "--save-frames", "/no/such/f.npy"), r"save_frames .*folder /no/such does not exist"),
        (("--prompt", "p", "-o", "/no/such/o.mp4"), r"output .*folder /no/such does not exist"),
        (("--prompt", "p", "--model", "/no/such"), r"/no/such"),
        (("--prompt", "p", "--device", "cuda"), r"cuda"),
        ((), r"prompt: required"),
    ],
)
def test_errors_are_one_line_and_status_two(
    run: Run, tiny_distilled: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    output = () if "-o" in arguments else ("-o", tmp_path / "o.mp4")
    done = run("generate", "--model", tiny_distilled, *output, *arguments)
    lines = done.err.strip().splitlines()
    assert (done.status, done.out, len(lines)) == (2, "", 1), done.err
    assert re.match(f"error: .*{message}", lines[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--host", "0.0.0.0", "--port", "0"),
        ("serve", "--port", "70000"),
        ("serve", "--max-pack", "0"),
        ("serve", "--admin-bind", "9090"),
        ("serve", "--grpc-reflection"),
        ("serve", "--tls-client-ca", "ca.pem"),
        ("generate", "--model", "m"),
        ("generate", "--model", "m", "-o", "o.mp4", "--num-frames", "x"),
        ("generate", "--model", "m", "-o", "o.mp4", "--device", "tpu"),
        ("make-tiny", "--out", "x", "--variant", "huge"),
        ("fly",),
    ],
)
def test_bad_flags_have_status_two_and_no_traceback(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.status == 2
    assert "Traceback" not in done.err
    assert re.search("error", done.err, re.IGNORECASE)


def test_a_failure_in_the_middle_leaves_no_files(
    run: Run, tiny_distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helios_serve.errors import GenerationError
    from helios_serve.offline import Helios

    def fail(*_: object) -> None:
        raise GenerationError("the disk is full of foxes")

    (tmp_path / "o.mp4").write_bytes(b"an earlier video")
    monkeypatch.setattr(Helios, "encode_segment", fail)
    arguments = ("generate", "--model", tiny_distilled, "--prompt", "p", *SMALL, "--num-frames", 33)
    done = run(*arguments, "-o", tmp_path / "o.mp4", "--save-frames", tmp_path / "f.npy")
    assert done.status == 2
    assert "error: the disk is full of foxes" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["o.mp4"]
    assert (tmp_path / "o.mp4").read_bytes() == b"an earlier video"


def test_version(run: Run) -> None:
    assert run("version") == run("--version") == (0, f"{__version__}\n", "")


def test_the_module_is_a_program_too() -> None:
    command = [sys.executable, "-m", "helios_serve.cli", "version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{__version__}\n"


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """A shell has what it starts in the background ignore Ctrl-C, and so all that is started from there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_ctrl_c_ends_without_a_traceback_or_half_a_file(tiny_distilled: Path, tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("helios-serve"))
    arguments = ("generate", "--model", str(tiny_distilled), "--prompt", "p", *SMALL, "--num-frames", "6600")
    outputs = ("-o", str(tmp_path / "o.mp4"), "--save-frames", str(tmp_path / "f.npy"))
    with subprocess.Popen([program, *arguments, *outputs], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()):  # the frames are being written
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_every_flag_of_serve_sets_a_setting_of_its_type() -> None:
    parameters = inspect.signature(cli.serve).parameters
    assert {*serve_flags.KEYS} == {*parameters} - {"context", "config", "settings"}
    assert {*serve_flags.KEYS.values()} <= {*setting_types()}
    assert {*serve_flags.derived()} <= {*setting_types()}


def test_what_is_typed_reaches_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Settings] = []
    monkeypatch.setattr("helios_serve.server.run_server", loaded.append)
    monkeypatch.setattr("helios_serve.cli.configure_logging", lambda log_format: None)
    monkeypatch.setattr("os.environ", {})
    command = (
        *(
            "serve",
            "some/model",
            "--data-dir",
            str(tmp_path),
            "--device",
            "cpu",
            "--max-pack",
            "3",
            "--executor",
            "ray",
        ),
        *("--cors-origin", "https://a.example", "--cors-origin", "https://b.example", "--grpc-port", "9"),
        *("--no-grpc-reflection", "--admin-bind", "[::1]:9090", "--webhook-private", "--set", "ray.beat_s=0.25"),
    )
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    (settings,) = loaded
    assert (settings.model.model, settings.model.dtype, settings.engine.max_pack) == ("some/model", "float32", 3)
    assert settings.server.cors_origins == ("https://a.example", "https://b.example")
    assert (settings.server.grpc_reflection, settings.server.webhook_private) == (False, True)
    assert settings.server.admin_address == ("::1", 9090)
    assert settings.ray is not None
    assert (settings.ray.beat_s, settings.ray.gpus_per_rank) == (0.25, 0.0)
    assert settings.sources["model.model"] == "MODEL"
    assert settings.sources["server.admin_bind"] == "--admin-bind"
