"""The VAE with its columns over ranks against one rank: threads, then real processes; wrong ways, which must be seen;
and what travels. With a GPU, its kernels too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helios_serve.model_executor.vae import PARITY, VaeConfig, VaeOptions, WanVAE
from helios_serve.parallel.collectives import ALONE, Axis, RankGroup, Transfer
from helios_serve.parallel.mesh import Degrees, Mesh, build_mesh
from helios_serve.parallel.vae_shards import WHOLE, WidthShard, shard_width
from tests.parallel.ranks import run_ranks
from tests.parallel.threads import run_threads

CONFIG = VaeConfig(base_dim=8)
UNFOLDED = VaeOptions(layout="channels_last")
FOLDED = VaeOptions(layout="channels_last", is_upsample_folded=True)
WINDOWED = VaeOptions(
    layout="channels_last", is_upsample_folded=True, windowed_channels=(8, 32), windowed_encoder_channels=(8, 16)
)
EACH = {"plain": PARITY, "unfolded": UNFOLDED, "folded": FOLDED, "windowed": WINDOWED}
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
CLEARLY_WRONG = 1e-3
CELL = CONFIG.scale_factor_spatial

Remake = Callable[[WidthShard], WidthShard]


def same(columns: WidthShard) -> WidthShard:
    return columns


@functools.cache
def vae_of(name: str, dtype: torch.dtype = torch.float64) -> WanVAE:
    """A VAE whose outputs neither vanish nor meet the clamp."""
    made = WanVAE(CONFIG, EACH[name]).requires_grad_(False).to(torch.float64)
    generator = torch.Generator().manual_seed(11)
    for key, parameter in made.named_parameters():
        if key.endswith("gamma"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif key.endswith("bias"):
            parameter.normal_(0.0, 0.1, generator=generator)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    made.decoder.conv_out.weight.mul_(0.4)
    made.to(dtype).prepare()
    return made


def latents(num_frames: int, width: int, dtype: torch.dtype = torch.float64, num_clips: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randn(num_clips, 16, num_frames, 3, width, generator=generator, dtype=torch.float64).to(dtype)


def pixels(num_frames: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    shape = (1, 3, num_frames, 2 * CELL, width * CELL)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max())


def decode_on(vae: WanVAE, z: Tensor, axis: Axis, slab_frames: int | None = None, remake: Remake = same) -> Tensor:
    """All columns, on every rank."""
    columns = remake(shard_width(z.shape[-1], axis))
    with torch.inference_mode():
        own = vae.decode(z, slab_frames, columns)
    assert own.shape[-1] == CELL * (columns.bounds[axis.rank + 1] - columns.bounds[axis.rank])
    return columns.gather(own, CELL)


def encode_on(vae: WanVAE, x: Tensor, axis: Axis, slab_frames: int | None = None, remake: Remake = same) -> Tensor:
    columns = remake(shard_width(x.shape[-1] // CELL, axis))
    with torch.inference_mode():
        posterior = torch.cat(vae.encode(x, slab_frames, columns), dim=1)
    return columns.gather(posterior)


def on_threads(num_ranks: int, body: Callable[[Axis], Tensor]) -> Tensor:
    """What every rank has in the end."""

    def run(mesh: Mesh) -> Tensor:
        return body(mesh.tokens)

    results = run_threads(Degrees(ulysses=num_ranks), run)
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


def alone(vae: WanVAE, z: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.decode(z)


def encoded_alone(vae: WanVAE, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat(vae.encode(x), dim=1)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(
    ("num_ranks", "width", "num_frames", "slab_frames"),
    [(2, 6, 3, None), (2, 5, 9, 4), (3, 7, 2, None), (4, 7, 5, 2), (4, 4, 1, None), (8, 10, 3, 1)],
)
def test_decode_equals_one_rank(
    name: str, num_ranks: int, width: int, num_frames: int, slab_frames: int | None
) -> None:
    """Even and uneven shards, single columns, fewer frames than ranks."""
    vae, z = vae_of(name), latents(num_frames, width)
    expected = alone(vae, z)
    assert expected.std() > 0.05
    got = on_threads(num_ranks, lambda axis: decode_on(vae, z, axis, slab_frames))
    assert distance(got, expected) < EXACT[torch.float64]


@pytest.mark.parametrize("name", ["plain", "unfolded", "windowed"])
@pytest.mark.parametrize(
    ("num_ranks", "width", "num_frames", "slab_frames"), [(2, 5, 9, None), (4, 7, 5, 1), (4, 4, 1, None)]
)
def test_encode_equals_one_rank(
    name: str, num_ranks: int, width: int, num_frames: int, slab_frames: int | None
) -> None:
    vae, x = vae_of(name), pixels(num_frames, width)
    expected = encoded_alone(vae, x)
    assert expected.std() > 0.05
    got = on_threads(num_ranks, lambda axis: encode_on(vae, x, axis, slab_frames))
    assert distance(got, expected) < EXACT[torch.float64]


@pytest.mark.parametrize("name", EACH)
def test_several_clips(name: str) -> None:
    vae, z = vae_of(name), latents(2, 4, num_clips=3)
    assert distance(on_threads(4, lambda axis: decode_on(vae, z, axis)), alone(vae, z)) < EXACT[torch.float64]


def _each(ranks: RankGroup, end: Connection) -> None:
    axis = build_mesh(ranks, Degrees(ulysses=ranks.size)).tokens
    for dtype in EXACT:
        for name in ("plain", "windowed"):
            vae = vae_of(name, dtype)
            decoded = decode_on(vae, latents(3, 7, dtype), axis)
            encoded = encode_on(vae, pixels(5, 7, dtype), axis)
            end.send((name, dtype, decoded.numpy(), encoded.numpy()))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_equal_one(size: int, tmp_path: Path) -> None:
    """In float64 and float32, where the plain encoder sums in the reference's order."""
    for answer in run_ranks(size, tmp_path, _each):
        assert len(answer) == 4
        for sent in answer:
            assert isinstance(sent, tuple)
            name, dtype, decoded, encoded = sent
            vae = vae_of(name, dtype)
            assert distance(torch.from_numpy(decoded), alone(vae, latents(3, 7, dtype))) < EXACT[dtype]
            assert distance(torch.from_numpy(encoded), encoded_alone(vae, pixels(5, 7, dtype))) < EXACT[dtype]


# Wrong ways


@dataclass(frozen=True, slots=True, kw_only=True)
class WithoutHalo(WidthShard):
    """Every shard is a picture of its own."""

    def _exchange(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(last), torch.zeros_like(first)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongSide(WidthShard):
    """What the right neighbour sent stands on the left."""

    def _exchange(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return WidthShard._exchange(self, first, last)[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnColumnBack(WidthShard):
    """A neighbour's far column instead of its near one."""

    def _exchange(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return WidthShard._exchange(self, last, first)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendsToItself(WidthShard):
    """Attention within the columns of a rank."""

    def by_frame(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        own = self.own(x)
        return self.surround(function(own.contiguous(memory_format=torch.channels_last_3d)))


@dataclass(frozen=True, slots=True, kw_only=True)
class AroundThePicture(WidthShard):
    """At a side of the picture stands the other side."""

    def _exchange(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        ends = self.axis.all_gather(torch.stack((first, last)))
        ends = ends.unflatten(0, (self.axis.size, 2))
        return ends[self.axis.rank - 1, 1], ends[(self.axis.rank + 1) % self.axis.size, 0]


MUTANTS = (WithoutHalo, WrongSide, OwnColumnBack, AttendsToItself, AroundThePicture)


def as_kind(kind: type[WidthShard]) -> Remake:
    return lambda columns: kind(axis=columns.axis, bounds=columns.bounds)


@pytest.mark.parametrize("kind", MUTANTS)
@pytest.mark.parametrize("name", ["plain", "folded", "windowed"])
def test_wrong_ways_are_seen(name: str, kind: type[WidthShard]) -> None:
    vae, z, x = vae_of(name), latents(3, 5), pixels(5, 5)
    decoded = on_threads(2, lambda axis: decode_on(vae, z, axis, remake=as_kind(kind)))
    assert distance(decoded, alone(vae, z)) > CLEARLY_WRONG
    encoded = on_threads(2, lambda axis: encode_on(vae, x, axis, remake=as_kind(kind)))
    assert distance(encoded, encoded_alone(vae, x)) > CLEARLY_WRONG


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisoned(WidthShard):
    """Ghosts are NaN wherever they may hold anything."""

    def surround(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (1, 1), value=torch.nan)

    def by_frame(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        out = WidthShard.by_frame(self, function, x)
        out[..., 0] = out[..., -1] = torch.nan
        return out


@pytest.mark.parametrize("name", EACH)
def test_nothing_is_computed_from_ghosts_that_are_not_filled(name: str) -> None:
    vae, z, x = vae_of(name), latents(5, 5), pixels(5, 5)
    decoded = on_threads(2, lambda axis: decode_on(vae, z, axis, 2, as_kind(Poisoned)))
    assert distance(decoded, alone(vae, z)) < EXACT[torch.float64]
    encoded = on_threads(2, lambda axis: encode_on(vae, x, axis, 1, as_kind(Poisoned)))
    assert distance(encoded, encoded_alone(vae, x)) < EXACT[torch.float64]


# What travels


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedAxis(Axis):
    """Sends nothing, and notes the bytes that would have left this rank in each call."""

    rotated: list[int] = field(default_factory=list, compare=False)
    exchanged: list[int] = field(default_factory=list, compare=False)

    def all_to_all(self, blocks: Tensor) -> Tensor:
        self.exchanged.append(blocks.nbytes // self.size * (self.size - 1))
        return torch.empty_like(blocks)

    def rotate(self, sent: Tensor, received: Tensor) -> Transfer:
        assert sent.shape == received.shape
        assert sent.is_contiguous()
        assert received.is_contiguous()
        self.rotated.append(sent.nbytes)
        return Transfer()


@pytest.mark.parametrize("name", EACH)
def test_a_decode_is_33_exchanges_and_an_encode_25(name: str) -> None:
    """One for each convolution that sees neighbouring columns, and two for the attention of the middle."""
    for run, given, expected in ((decode_whole, latents(3, 6), 33), (encode_whole, pixels(5, 6), 25)):
        axis = CountedAxis(ranks=(0, 1), rank=1)
        with torch.inference_mode():
            run(vae_of(name), given, shard_width(6, axis))
        assert len(axis.rotated) == 2 * expected  # to the left and to the right
        assert len(axis.exchanged) == 2


def decode_whole(vae: WanVAE, z: Tensor, columns: WidthShard) -> Tensor:
    return vae.decode(z, columns=columns)


def encode_whole(vae: WanVAE, x: Tensor, columns: WidthShard) -> Tensor:
    return torch.cat(vae.encode(x, columns=columns))


def test_bytes_of_the_served_decoder() -> None:
    """Each exchange sends the two outer columns of a convolution's input, in bf16; the sum is counted by hand."""
    options = VaeOptions(precision="bf16", layout="channels_last", is_upsample_folded=True, windowed_channels=(96, 384))
    with torch.device("meta"):
        vae = WanVAE(VaeConfig(), options)
        vae.prepare()
        z = torch.empty(1, 16, 9, 48, 80)
    axis = CountedAxis(ranks=tuple(range(8)), rank=3)
    with torch.inference_mode():
        vae.decode(z, columns=shard_width(80, axis))
    lines, frames = (48, 96, 192, 384), (9, 17, 33, 33)
    channels = (
        (0, (16, *[384] * 10)),  # conv_in, middle, first level
        (1, (192, *[384] * 5)),
        (2, (192,) * 6),
        (3, (96,) * 7),  # with conv_out
    )
    columns = sum(2 * frames[level] * lines[level] * sum(widths) for level, widths in channels)
    # an upsampling sees the small grid, and the doubled frames
    enlarged = 2 * (17 * 48 * 384 + 33 * 96 * 384 + 33 * 192 * 192)
    assert sum(axis.rotated) == 2 * (columns + enlarged)
    assert axis.exchanged == [2 * 7 * 2 * 48 * 10 * 384] * 2  # blocks of two frames and ten columns


# Shards


@pytest.mark.parametrize(("width", "num_ranks"), [(80, 8), (7, 4), (5, 5), (9, 2)])
@pytest.mark.parametrize("cell", [1, 8])
def test_gather_puts_together_what_take_took_apart(width: int, num_ranks: int, cell: int) -> None:
    whole = torch.arange(2 * 3 * width * cell).view(2, 3, width * cell)

    def there_and_back(axis: Axis) -> Tensor:
        columns = shard_width(width, axis)
        taken = columns.take(whole, cell)
        assert not taken[..., 0].any()
        assert not taken[..., -1].any()
        return columns.gather(columns.own(taken), cell)

    assert torch.equal(on_threads(num_ranks, there_and_back), whole)


def test_one_rank_returns_what_it_is_given() -> None:
    x = torch.randn(1, 2, 3, 4, 5)
    before = x.clone()
    assert shard_width(5, ALONE) is WHOLE
    assert WHOLE.ghosts == 0
    for same_again in (WHOLE.take(x), WHOLE.own(x), WHOLE.surround(x), WHOLE.gather(x), WHOLE.by_frame(_itself, x)):
        assert same_again is x
    WHOLE.fill(x)
    WHOLE.fill_windows(x)
    assert torch.equal(x, before)


def _itself(x: Tensor) -> Tensor:
    return x


def test_a_rank_needs_a_column() -> None:
    with pytest.raises(ValueError, match=r"4 ranks for 3 latent columns: must be at most one for each"):
        shard_width(3, Axis(ranks=(0, 1, 2, 3)))


def test_frames_of_another_width_are_refused() -> None:
    columns = shard_width(6, Axis(ranks=(0, 1)))
    with pytest.raises(AssertionError, match="7 columns: must be 6"):
        columns.take(torch.zeros(1, 7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_kernels_of_a_gpu_equal_one_rank(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The served options: bf16 decodes differ by what bf16 is from float64, encodes by what sums in float32 are."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda")
    options = replace(VaeOptions.on(device), windowed_channels=(8, 32), windowed_encoder_channels=(8, 16))
    vae = WanVAE(CONFIG, options).requires_grad_(False)
    vae.load_state_dict(vae_of("plain", torch.float64).state_dict())
    vae.to(device).prepare()
    z = latents(9, 7, torch.float32).to(device)
    whole = alone(vae, z)
    error = _mean_distance(whole, alone(vae_of("plain", torch.float64), latents(9, 7)).to(device))
    got = on_threads(num_ranks, lambda axis: decode_on(vae, z, axis, 4))
    assert _mean_distance(got, whole) < 2 * error
    x = pixels(9, 7, torch.float32).to(device)
    encoded = on_threads(num_ranks, lambda axis: encode_on(vae, x, axis))
    assert distance(encoded, encoded_alone(vae, x)) < 1e-4


def _mean_distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().mean())
