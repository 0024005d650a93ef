"""The program of the process in which untrusted media are decoded: limits itself, then decodes one file.

Run by path by `media_sandbox`, with one argument, the JSON of a task; loads the decoders after it has bounded its own
memory and time. What it shuts off for itself, in this order:

- The kernel kills it when the thread that started it ends, and no program it could run gets more rights than it has.
- Memory, CPU time, size of a file, open files, processes and core dumps are limited.
- Once the decoders are loaded, a seccomp filter leaves the system calls of reading, writing, memory and time. From then
  on no socket, file, process or thread can be opened or started, not by root either. The filter needs no rights and
  knows x86_64 and aarch64; on another machine, or where the kernel has no filters, the other limits remain. A network
  namespace would do less, and most containers allow none.

The result goes to standard output as JSON: `num_frames`, `size`, `look`, or the `error` of a file that cannot be
decoded.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import resource
import signal
import struct
import sys
import warnings
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from helios_serve.types import ImageFit


class Task(TypedDict):
    """What to decode: `kind` is image, video, size (of an image) or look (of a video); `input` and `output` are open
    files, by number.

    search_path: where modules are found. param: the field, for messages.
    """

    kind: str
    search_path: list[str]
    input: int
    output: int
    output_bytes: int
    width: int
    height: int
    fit: ImageFit
    param: str
    memory_bytes: int
    cpu_s: int


class Report(TypedDict, total=False):
    """How it went; exactly one key."""

    num_frames: int
    size: tuple[int, int]
    look: tuple[int, int, float]
    error: str


_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2

_MAX_OPEN_FILES = 32

_LOADED_WHEN_NEEDED = (
    *("PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin"),
    *("av.subtitles.codeccontext", "av.subtitles.stream", "av.sidedata.encparams", "av.sidedata.motionvectors"),
)
"""Modules that the decoders load on first use, when it is too late."""

_BPF_LOAD_WORD, _BPF_JUMP_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06
_OFFSET_NUMBER, _OFFSET_MACHINE = 0, 4
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refused calls fail with EPERM

_AUDIT_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# read write close fstat newfstatat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn pread64
# pwrite64 readv writev sched_yield mremap madvise nanosleep getpid exit uname gettimeofday getrusage sysinfo
# sigaltstack gettid futex sched_getaffinity clock_gettime clock_nanosleep exit_group tgkill getrandom
_ALLOWED_CALLS = {
    "x86_64": (
        *(0, 1, 3, 5, 262, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 24, 25, 28, 35, 39, 60, 63, 96, 98, 99, 131),
        *(186, 202, 204, 228, 230, 231, 234, 318),
    ),
    "aarch64": (
        *(63, 64, 57, 80, 79, 62, 222, 226, 215, 214, 134, 135, 139, 67, 68, 65, 66, 124, 216, 233, 101, 172, 93, 160),
        *(169, 165, 179, 132, 178, 98, 123, 113, 115, 94, 131, 278),
    ),
}


def main() -> None:
    """Does the task of the first argument and ends the process with status 0, whatever the file was like."""
    task: Task = json.loads(sys.argv[1])
    _bound(task)
    sys.path[:] = task["search_path"]
    report = _run(task)
    os.write(1, json.dumps(report).encode())
    os._exit(0)


def _bound(task: Task) -> None:
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's library would start threads when it is loaded
    for kind, soft, hard in (
        (resource.RLIMIT_AS, task["memory_bytes"], task["memory_bytes"]),
        (resource.RLIMIT_CPU, task["cpu_s"], task["cpu_s"] + 1),  # SIGXCPU, then SIGKILL
        (resource.RLIMIT_FSIZE, task["output_bytes"], task["output_bytes"]),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES, _MAX_OPEN_FILES),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, allowed = resource.getrlimit(kind)
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(kind, (soft, hard))
    warnings.simplefilter("ignore")


def _run(task: Task) -> Report:
    for name in _LOADED_WHEN_NEEDED:
        importlib.import_module(name)
    from PIL import Image  # here, for the search path is known only now

    from helios_serve.errors import InvalidRequestError
    from helios_serve.workers import media

    Image.preinit()
    with open(task["input"], "rb", buffering=0) as file:
        data = file.read()
    try:
        with open(task["output"], "wb") as output:
            _shut_off()
            if task["kind"] == "size":
                return Report(size=media.image_size(data, param=task["param"]))
            if task["kind"] == "look":
                return Report(look=media.video_look(data, param=task["param"]))
            target = media.Target(width=task["width"], height=task["height"], fit=task["fit"])
            write = media.write_image if task["kind"] == "image" else media.write_video
            return Report(num_frames=write(data, target, output, param=task["param"]))
    except InvalidRequestError as error:
        return Report(error=error.message)


def _shut_off() -> None:
    """Leaves the allowed system calls, from now on; does nothing on a machine whose calls are not known here."""
    machine = platform.machine()
    if machine not in _ALLOWED_CALLS:
        return
    program = ctypes.create_string_buffer(_filter(machine))
    header = struct.pack("HxxxxxxP", (len(program) - 1) // 8, ctypes.addressof(program))
    ctypes.CDLL(None).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0)


def _filter(machine: str) -> bytes:
    """A BPF program: another machine's calls kill, the allowed ones pass, all others are refused."""
    calls = _ALLOWED_CALLS[machine]
    steps = [
        (_BPF_LOAD_WORD, 0, 0, _OFFSET_MACHINE),
        (_BPF_JUMP_EQUAL, 1, 0, _AUDIT_MACHINES[machine]),
        (_BPF_RETURN, 0, 0, _KILL),
        (_BPF_LOAD_WORD, 0, 0, _OFFSET_NUMBER),
        *((_BPF_JUMP_EQUAL, len(calls) - index, 0, call) for index, call in enumerate(calls)),
        (_BPF_RETURN, 0, 0, _REFUSE),
        (_BPF_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


if __name__ == "__main__":
    main()
