"""The kernel's fences that need no privileges, with or without namespaces: Landlock for files, seccomp for the rest.

`close_files` lets a process open nothing but what it is told of. `filter_calls` lets it make only the system calls of
computing with files and threads: every other one, also those that later kernels will have, is refused. So there are no
sockets, processes, signals to others, keys, shared memory or namespaces, for native code as little as for Python.

Both hold for good and for all children. No library: Python's ctypes calls the C library. Standard library only.
Sources: man pages landlock(7), seccomp(2), keyctl(2); numbers: asm/unistd_64.h and asm-generic/unistd.h of Linux.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterable

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
JOIN_SESSION_KEYRING = 1
KEYCTL = {"x86_64": 250}  # 219 elsewhere

# --- Landlock --------------------------------------------------------------------------------------------------------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # on every machine
WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM, REFER = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12, 1 << 13
FILE_RIGHTS = [13, 14, 15, 15, 16]  # by version: so many rights over files are known
TCP_RIGHTS, SCOPES = 0b11, 0b11  # no TCP port (version 4); no abstract sockets and signals beyond the fence (6)


def close_files(readable: Iterable[str]) -> bool:
    """Leave only what lies in `readable`, to read, and the current folder; returns false where there is no Landlock."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = (1 << FILE_RIGHTS[min(version, len(FILE_RIGHTS)) - 1]) - 1
    # A kernel takes a longer record than it knows if the rest is zero.
    attributes = struct.pack("=QQQ", handled, TCP_RIGHTS if version >= 4 else 0, SCOPES if version >= 6 else 0)
    rules = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return False
    own = READ_FILE | WRITE_FILE | READ_DIR | TRUNCATE
    own |= REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER  # not: devices, sockets, named pipes
    rights = dict.fromkeys(readable, READ_FILE | READ_DIR) | {"/dev/null": READ_FILE | WRITE_FILE | TRUNCATE, ".": own}
    try:
        for path, right in rights.items():
            if os.path.exists(path):
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                if not os.path.isdir(path):
                    right &= READ_FILE | WRITE_FILE | TRUNCATE
                libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", right & handled, fd), 0)
                os.close(fd)
        return bool(libc.syscall(RESTRICT_SELF, rules, 0) == 0)
    finally:
        os.close(rules)


# --- the system call filter ------------------------------------------------------------------------------------------

# By machine: the kernel's name of its call convention, and which of the two numbers below counts.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "riscv64": (0xC00000F3, 1)}
# name, number on x86_64, number elsewhere; "-" where a newer call took its place before the machine came.
CALLS = """
read 0 63 write 1 64 readv 19 65 writev 20 66 pread64 17 67 pwrite64 18 68 preadv 295 69 pwritev 296 70 lseek 8 62
open 2 - openat 257 56 creat 85 - close 3 57 close_range 436 436 stat 4 - fstat 5 80 lstat 6 - newfstatat 262 79
statx 332 291 access 21 - faccessat 269 48 faccessat2 439 439 readlink 89 - readlinkat 267 78 getdents 78 -
getdents64 217 61 getcwd 79 17 chdir 80 49 fchdir 81 50 mkdir 83 - mkdirat 258 34 rmdir 84 - unlink 87 -
unlinkat 263 35 rename 82 - renameat 264 38 renameat2 316 276 link 86 - linkat 265 37 symlink 88 - symlinkat 266 36
umask 95 166 ftruncate 77 46 fsync 74 82 fdatasync 75 83 flock 73 32 statfs 137 43 fstatfs 138 44 fadvise64 221 223
dup 32 23 dup2 33 - dup3 292 24 pipe 22 - pipe2 293 59 eventfd2 290 19 poll 7 - ppoll 271 73 select 23 -
pselect6 270 72 epoll_create 213 - epoll_create1 291 20 epoll_ctl 233 21 epoll_wait 232 - epoll_pwait 281 22
epoll_pwait2 441 441 recvfrom 45 207 shutdown 48 210 mmap 9 222 munmap 11 215 mprotect 10 226 mremap 25 216 brk 12 214
madvise 28 233 msync 26 227 membarrier 324 283 futex 202 98 set_robust_list 273 99 get_robust_list 274 100 rseq 334 293
sched_yield 24 124 sched_getaffinity 204 123 getcpu 309 168 exit 60 93 exit_group 231 94 wait4 61 260 waitid 247 95
rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 rt_sigpending 127 136 rt_sigtimedwait 128 137
rt_sigsuspend 130 133 sigaltstack 131 132 restart_syscall 219 128 pause 34 - nanosleep 35 101 clock_nanosleep 230 115
clock_gettime 228 113 clock_getres 229 114 gettimeofday 96 169 time 201 - times 100 153 alarm 37 - getitimer 36 102
setitimer 38 103 getrandom 318 278 getrusage 98 165 getrlimit 97 163 sysinfo 99 179 uname 63 160 getpid 39 172
gettid 186 178 getppid 110 173 getuid 102 174 geteuid 107 175 getgid 104 176 getegid 108 177 getgroups 115 158
getresuid 118 148 getresgid 120 150 getpgrp 111 - getpgid 121 155 getsid 124 156 getpriority 140 141
"""
# Landlock does not cover these: without a root folder of its own, a process could change a stranger's file by them.
CHANGE_FILES = """
truncate 76 45 chmod 90 - fchmod 91 52 fchmodat 268 53 fchmodat2 452 452 utime 132 - utimes 235 - futimesat 261 -
utimensat 280 88
"""
LAST_CALL = 452  # what came later is answered like a call that an old kernel lacks, so that libraries do without it
CLONE_THREAD, NEW_NAMESPACES, AF_UNIX = 0x00010000, 0x7E020000, 1
HARMLESS_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # duplicate, flags, locks; not: whom to send signals, sizes of pipes
HARMLESS_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, how much is there, blocking


def filter_calls(threads: bool, change_files: bool) -> bool:
    """Refuse all system calls but those of computing; returns false where there is no filter for this machine.

    Args:
        threads: allow new threads (never processes).
        change_files: allow to change modes, times and sizes by a file's name.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in MACHINES or struct.calcsize("P") != 8:
        return False
    convention, column = MACHINES[machine]
    allowed = (CALLS + (CHANGE_FILES if change_files else "")).split()
    plain = [int(number) for number in allowed[1 + column :: 3] if number != "-"]
    own_pid = (0, 0xFFFFFFFF, (os.getpid(),))
    # A number, and what has to hold of its arguments, 64-bit numbers by halves: (which half, mask, values).
    checked: list[tuple[int, list[tuple[int, int, tuple[int, ...]]]]] = [
        ((72, 25)[column], [(2, 0xFFFFFFFF, HARMLESS_FCNTL)]),
        ((16, 29)[column], [(2, 0xFFFFFFFF, HARMLESS_IOCTL)]),
        # prlimit64: read one's own limits
        ((62, 129)[column], [own_pid]),  # kill
        ((234, 131)[column], [own_pid]),  # tgkill
        ((53, 199)[column], [(0, 0xFFFFFFFF, (AF_UNIX,))]),  # socketpair, which asyncio wakes itself with
        ((44, 206)[column], [(8, 0xFFFFFFFF, (0,)), (9, 0xFFFFFFFF, (0,))]),  # sendto without an address: such a pair
        ((302, 261)[column], [(0, 0xFFFFFFFF, (0, os.getpid())), (4, 0xFFFFFFFF, (0,)), (5, 0xFFFFFFFF, (0,))]),
    ]
    if threads:
        checked.append(((56, 220)[column], [(0, CLONE_THREAD | NEW_NAMESPACES, (CLONE_THREAD,))]))
    refuse, unknown, allow, kill = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x7FFF0000, 0x80000000
    load, equal, greater, mask, answer = 0x20, 0x15, 0x25, 0x54, 0x06
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, convention),  # another convention has other numbers
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        (greater, 0, 1, LAST_CALL),
        (answer, 0, 0, unknown),
        (equal, 0, 1, 435),  # clone3, whose flags a filter can't see: libraries fall back on clone
        (answer, 0, 0, unknown),
    ]
    for number in plain:
        program += [(equal, 0, 1, number), (answer, 0, 0, allow)]
    for number, conditions in checked:
        block = []
        for half, bits, values in conditions:
            block += [(load, 0, 0, 16 + 4 * half), (mask, 0, 0, bits)]
            block += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
            block.append((answer, 0, 0, refuse))
        block.append((answer, 0, 0, allow))
        program += [(equal, 0, len(block), number), *block]
    program.append((answer, 0, 0, refuse))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    pointed = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    zero = ctypes.c_ulong(0)
    return bool(ctypes.CDLL(None).prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), pointed, zero, zero) == 0)


def leave_keyring() -> None:
    """Change to an empty session keyring; the caller's may hold its keys and tickets."""
    if sys.platform == "linux":
        ctypes.CDLL(None).syscall(KEYCTL.get(os.uname().machine, 219), JOIN_SESSION_KEYRING, None)
