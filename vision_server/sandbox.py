"""What a process gives up before it reads a stranger's bytes. Linux; needs no privileges.

Memory, files and core dumps are limited, privileges cannot be gained, and system calls are reduced to those that
decoding takes: none that opens, connects, starts or signals anything. A call that is not allowed fails with EPERM.
Everything a process will import must be imported before.
"""

import ctypes
import os
import platform
import resource
from pathlib import Path
from typing import Final

# prctl(2), seccomp(2), linux/filter.h, linux/audit.h
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW, _RET_EPERM = 0x7FFF0000, 0x00050000 | 1
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _THIRD_ARGUMENT_AT = 0, 4, 32
_PROT_EXEC = 4
_OPEN_FILES = 16

_ARCHITECTURES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column in the table below, and the kernel's name of it."""

_ALLOWED: Final = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "lseek": (8, 62),
    "close": (3, 57), "dup2": (33, 24), "fstat": (5, 80), "fstatat": (262, 79), "fcntl": (72, 25),
    "recvfrom": (45, 207), "recvmsg": (47, 212), "sendto": (44, 206), "sendmsg": (46, 211),
    "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "futex": (202, 98), "sched_yield": (24, 124), "rseq": (334, 293), "membarrier": (324, 283),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "setitimer": (38, 103), "getpid": (39, 172), "gettid": (186, 178),
    "clock_gettime": (228, 113), "gettimeofday": (96, 169), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "getrusage": (98, 165), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_ALLOWED_WITHOUT_EXECUTION: Final = {"mmap": (9, 222), "mprotect": (10, 226)}


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("if_true", ctypes.c_ubyte), ("if_false", ctypes.c_ubyte),
                ("value", ctypes.c_uint)]  # fmt: skip


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


def enter(memory_bytes: int) -> bool:
    """Give up what decoding does not need; there is no way back.

    Args:
        memory_bytes: address space that may still be taken, beyond what is in use.

    Returns:
        Whether system calls are filtered, too: not on other processors, nor where the kernel or a container forbids it.
    """
    limits = {
        resource.RLIMIT_AS: _address_space() + memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
    }
    for what, most in limits.items():
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    _prctl(_PR_SET_DUMPABLE, 0)  # nor may others of our user look into this process
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return _filter_system_calls()


def _filter_system_calls() -> bool:
    known = _ARCHITECTURES.get(platform.machine())
    if known is None:
        return False
    column, architecture = known
    instructions = _filter(
        architecture,
        [numbers[column] for numbers in _ALLOWED.values()],
        [numbers[column] for numbers in _ALLOWED_WITHOUT_EXECUTION.values()],
    )
    program = _Program(len(instructions), (_Instruction * len(instructions))(*instructions))
    return _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _filter(architecture: int, allowed: list[int], without_execution: list[int]) -> list[_Instruction]:
    """A classic BPF program over ``struct seccomp_data``. Jumps count the instructions they skip."""
    allow, refuse = _Instruction(_RETURN, 0, 0, _RET_ALLOW), _Instruction(_RETURN, 0, 0, _RET_EPERM)

    def if_equal(value: int, then: list[_Instruction]) -> list[_Instruction]:
        return [_Instruction(_JUMP_IF_EQUAL, 0, len(then), value), *then]

    code = [_Instruction(_LOAD, 0, 0, _ARCHITECTURE_AT), _Instruction(_JUMP_IF_EQUAL, 1, 0, architecture), refuse]
    code.append(_Instruction(_LOAD, 0, 0, _NUMBER_AT))
    for number in allowed:
        code += if_equal(number, [allow])
    protection = [
        _Instruction(_LOAD, 0, 0, _THIRD_ARGUMENT_AT),
        _Instruction(_JUMP_IF_ANY, 0, 1, _PROT_EXEC),
        refuse,
        allow,
    ]
    for number in without_execution:
        code += if_equal(number, protection)
    return [*code, refuse]


def _prctl(option: int, *arguments: int) -> bool:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return bool(ctypes.CDLL(None).prctl(option, *padded) == 0)


def _address_space() -> int:
    """Bytes of it in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")
