"""Ulysses through the memory of other ranks: to the bit what an all-to-all gives, in real processes whose memory is a
shared file; what goes wrong without its slots; and, with two GPUs, PyTorch's own."""

from __future__ import annotations

import logging
import multiprocessing
import time
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helios_serve.kernels import Segments
from helios_serve.parallel import peer_memory
from helios_serve.parallel.collectives import Axis, RankGroup, connect, make_axis
from helios_serve.parallel.context_parallel import attend_sharded, spread_segments
from helios_serve.parallel.mesh import Degrees, build_mesh
from helios_serve.parallel.peer_memory import PeerAxis, PeerBlocks, SharedMemory, with_peer_memory
from helios_serve.parallel.shards import Lengths, shard, take
from helios_serve.parallel.ulysses import exchange_of, heads_to_tokens, tokens_to_heads
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 8, 16
PACKS: tuple[Lengths, ...] = (((13, 5),), ((61, 18), (7, 3), (1, 2)), ((61, 18), (240, 67)), ((13, 5),))
"""Uneven over two and four ranks; blocks grow, and shrink again."""


@dataclass(frozen=True)
class FileMemory:
    """A shared file for each rank, and gloo's barrier."""

    folder: Path
    axis: Axis
    num_bytes: int

    def get_buffer(
        self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int | None = 0
    ) -> Tensor:
        whole = torch.from_file(str(self._file(rank)), shared=True, size=self.num_bytes, dtype=torch.uint8)
        count, start = torch.Size(sizes).numel(), storage_offset or 0
        return whole.view(dtype)[start : start + count].view(*sizes)

    def barrier(self, channel: int = 0) -> None:
        dist.barrier(self.axis.group)

    def _file(self, rank: int) -> Path:
        return self.folder / f"{self.num_bytes}-{rank}"

    def meet(self) -> None:
        self._file(self.axis.rank).write_bytes(bytes(self.num_bytes))
        self.barrier()


@dataclass
class Files:
    """Makes them, and counts."""

    folder: Path
    axis: Axis
    sizes: list[int] = field(default_factory=list)

    def __call__(self, num_bytes: int) -> SharedMemory:
        self.sizes.append(num_bytes)
        memory = FileMemory(self.folder, self.axis, num_bytes)
        memory.meet()
        return memory


def through(axis: Axis, files: Files) -> PeerAxis:
    return PeerAxis(rank=axis.rank, ranks=axis.ranks, group=axis.group, blocks=PeerBlocks(axis.rank, axis.size, files))


def draw(lengths: Lengths, dtype: torch.dtype) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [[torch.randn(n, 3, HEADS, HEAD_DIM, generator=generator).to(dtype) for n in each] for each in lengths]


def there_and_back(axis: Axis, lengths: Lengths, heads: slice, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v of these heads of a pack, on all tokens; and q back on this rank's."""
    shards = shard(lengths, axis.size)
    q, k, v = take(draw(lengths, dtype), shards, axis.rank).unbind(1)
    exchange = exchange_of(shards, shards, 0, axis.size, CPU)
    wide = tokens_to_heads(q, k, v, exchange, axis, heads).wait()
    back = q.new_zeros(q.shape).unflatten(1, (axis.size, -1))
    heads_to_tokens(wide[0], exchange, axis).wait_into(back[:, :, heads])
    assert torch.equal(back[:, :, heads].flatten(1), q.unflatten(1, (axis.size, -1))[:, :, heads].flatten(1))
    return *wide, back


def _exchange(ranks: RankGroup, end: Connection, *, folder: Path) -> None:
    axis = make_axis([range(ranks.size)], ranks.rank, "gloo")
    files = Files(folder, axis)
    peers = through(axis, files)
    for lengths in PACKS:
        for dtype in (torch.bfloat16, torch.float32):
            for heads in (slice(0, 1), slice(1, HEADS // ranks.size)):
                sent = there_and_back(axis, lengths, heads, dtype)
                written = there_and_back(peers, lengths, heads, dtype)
                end.send(all(torch.equal(a, b) for a, b in zip(written, sent, strict=True)))
    end.send((files.sizes == sorted(set(files.sizes)), len(files.sizes)))


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_written_is_what_would_be_sent(size: int, tmp_path: Path) -> None:
    """And memory is shared anew for larger blocks alone."""
    for *equal, (grows, times) in run_ranks(size, tmp_path, partial(_exchange, folder=tmp_path)):  # type: ignore[misc]
        assert equal == [True] * (len(PACKS) * 4)
        assert grows
        assert 1 < times < len(equal)


def _attend(ranks: RankGroup, end: Connection, *, folder: Path) -> None:
    """Attention with its exchanges in one and in two parts, several of them under way at a time."""
    mesh = build_mesh(ranks, Degrees(ulysses=ranks.size))
    lengths = PACKS[2]
    shards = shard(lengths, ranks.size)
    q, k, v = take(draw(lengths, torch.float32), shards, ranks.rank).unbind(1)
    cu = shards.cu_rows(0, ranks.size)
    segments = Segments(cu_q=cu, cu_k=cu, scale=HEAD_DIM**-0.5)
    peers = replace(mesh, ulysses=through(mesh.ulysses, Files(folder, mesh.ulysses)))
    for num_head_groups in (1, 2):
        results = []
        for each in (mesh, peers):
            grouped = replace(each, num_head_groups=num_head_groups)
            results.append(attend_sharded(q, k, v, spread_segments(segments, shards, shards, grouped, CPU)))
        end.send(torch.equal(*results))


@pytest.mark.parametrize("size", [2, 4])
def test_attention_is_the_same_to_the_bit(size: int, tmp_path: Path) -> None:
    assert run_ranks(size, tmp_path, partial(_attend, folder=tmp_path)) == [[True, True]] * size


def _hurry(ranks: RankGroup, end: Connection, *, folder: Path, num_slots: int) -> None:
    """Rank 0 is a step ahead: it writes its next block while rank 1 still wants to read the one before."""
    axis = make_axis([range(ranks.size)], ranks.rank, "gloo")
    peer_memory._NUM_SLOTS = num_slots
    blocks = PeerBlocks(axis.rank, axis.size, partial(_Slow, folder, axis))
    found = []
    for step in range(4):
        sent = torch.full((axis.size, 3), 10.0 * step + axis.rank)
        received = torch.empty_like(sent)
        blocks.exchange(sent, received)
        found.append(received[:, 0].tolist() == [10.0 * step, 10.0 * step + 1])
    end.send(all(found))


class _Slow(FileMemory):
    """Rank 1 reads late."""

    def __init__(self, folder: Path, axis: Axis, num_bytes: int) -> None:
        super().__init__(folder, axis, num_bytes)
        self.meet()

    def barrier(self, channel: int = 0) -> None:
        super().barrier(channel)
        if self.axis.rank == 1:
            time.sleep(0.2)


@pytest.mark.parametrize(("num_slots", "is_right"), [(2, True), (1, False)])
def test_a_block_is_not_overwritten_before_it_is_read(num_slots: int, is_right: bool, tmp_path: Path) -> None:
    """One slot would not do: rank 1, which reads late, would find the next block."""
    _, late = run_ranks(2, tmp_path, partial(_hurry, folder=tmp_path, num_slots=num_slots))
    assert late == [is_right]


def _fall_back(ranks: RankGroup, end: Connection) -> None:
    axis = make_axis([range(ranks.size)], ranks.rank, "gloo")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(peer_memory.__name__).addHandler(handler)
    end.send((with_peer_memory(axis, CPU) is axis, said))


def test_a_cpu_falls_back_with_one_line(tmp_path: Path) -> None:
    line = "no symmetric memory, Ulysses sends instead: a CPU has none"
    assert run_ranks(2, tmp_path, _fall_back) == [[(True, [line])], [(True, [])]]


def _on_gpu(rank: int, address: str, end: Connection) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    ranks = connect(rank, 2, address)
    axis = make_axis([range(2)], rank, "nccl")
    peers = with_peer_memory(axis, device)
    same = []
    for rows in (3, 1000, 7):
        sent = torch.randn(2, rows, HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
        same.append(torch.equal(peers.all_to_all(sent), axis.all_to_all(sent)))
    end.send((isinstance(peers, PeerAxis), same))
    end.close()
    ranks.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs with peer access")
def test_the_memory_of_pytorch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for rank in range(2):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_on_gpu, args=(rank, f"file://{tmp_path}/meeting", there))
        process.start()
        ends.append(here)
        processes.append(process)
    try:
        assert [end.recv() for end in ends] == [(True, [True] * 3)] * 2
    finally:
        for process in processes:
            process.join(60)
            process.kill()
