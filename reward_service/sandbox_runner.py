"""Runs code of a completion against tests, in a process that nothing of ours runs in. Nothing is imported but the standard
library: it is started by its path, `python -I sandbox_runner.py`, with a job on standard input (reward_service/sandbox.py).

    this process ── namespaces ──> first process in them: limits, the tests ──> a copy for each test: runs it, and ends

Of a program, the output for each input is told on standard output and compared outside. Of tests in Python, those that pass
are, each with a word that the job has brought. What a copy prints or returns as its status counts for nothing.
"""

import atexit
import ctypes
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import types

NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mounts, IPC, users, processes, network
NOBODY = 65534
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, SYS_MOUNT_SETATTR = -100, 0x8000, 1, 442
MS_NOSUID_NODEV, MS_NOEXEC, MS_PRIVATE_ALL = 2 | 4, 8, (1 << 18) | 16384
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
LEAST_PIDS = 400  # of a namespace of processes; the kernel takes no less than 301
OUTPUT_BYTES = 1 << 20
FAULT = 5  # status: the tests could not be run
BEGUN = b"begun\n"  # the first line of a report: what is missing behind it is the code's


def libc():
    return ctypes.CDLL(None, use_errno=True)


def isolate():
    """Namespaces of its own for what is started from here. Raises OSError where the kernel has none for us."""
    uid, gid = os.geteuid(), os.getegid()
    if libc().unshare(NAMESPACES):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, value in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(value)


def enclose(job):
    """Within the namespaces: every file can only be read, but for a small folder in memory. Raises OSError."""
    call, folder = libc(), os.getcwd().encode()

    class MountAttributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]

    read_only = MountAttributes(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = f"size={job['folder_mib']}m,mode=700".encode()
    failed = (
        call.mount(None, b"/", None, MS_PRIVATE_ALL, None)
        or call.syscall(
            SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), ctypes.sizeof(read_only)
        )
        or call.mount(b"tmpfs", folder, b"tmpfs", MS_NOSUID_NODEV, size)
    )
    if failed:
        raise OSError(ctypes.get_errno(), "mount")
    os.chdir(folder)
    # Where a container forbids it, the processes outside stay visible, but out of reach.
    call.mount(b"proc", b"/proc", b"proc", MS_NOSUID_NODEV | MS_NOEXEC, None)
    try:
        with open("/proc/sys/kernel/pid_max", "w") as file:
            file.write(str(LEAST_PIDS))  # root is not bound by RLIMIT_NPROC
    except OSError:
        pass  # a kernel before 6.14
    _drop_capabilities(call)


def _drop_capabilities(call):
    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    if call.capset(ctypes.byref(Header(0x20080522, 0)), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
    call.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(job):
    mib = 1 << 20
    limits = [
        (resource.RLIMIT_AS, int(job["memory_mib"] * mib)),
        (resource.RLIMIT_CPU, int(job["seconds"]) + 1),
        (resource.RLIMIT_FSIZE, job["folder_mib"] * mib),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ]
    if job["enclose"]:  # else it would count all processes of the user
        limits.append((resource.RLIMIT_NPROC, job["processes"]))
    for kind, value in limits:
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def run(job, report):
    """Each test in a copy of this process. `report` is a file descriptor."""
    end = time.monotonic() + job["seconds"]
    module = types.ModuleType("__main__" if job["inputs"] else "solution")
    vars(module)["__builtins__"] = __builtins__
    sys.modules[module.__name__] = module  # tests import from it, and dataclasses look there
    scope = vars(module)
    for number, given in enumerate(job["inputs"]):
        is_last = number == len(job["inputs"]) - 1
        output = attempt(lambda given=given, is_last=is_last: output_of(job["code"], scope, given, end, is_last), job)
        os.write(report, json.dumps([number, output]).encode() + b"\n")
    if job["inputs"]:
        return
    word, tests, context = job["word"], job["tests"], job["context"]
    prepared = attempt(lambda: passes(lambda: prepare(job["code"], context, scope), end, False), job)
    if not prepared:
        return
    for number, test in enumerate(tests):

        def told(test=test, number=number):
            prepare(job["code"], context, scope)
            exec(compile(test, "tests", "exec"), scope)
            os.write(report, f"{word} {number}\n".encode())

        is_last = number == len(tests) - 1
        attempt(lambda told=told, is_last=is_last: passes(told, end, is_last), job)


def attempt(test, job):
    """What a test says, or None where the code has left no room for it; then everything that it has started is ended."""
    try:
        return test()
    except OSError:  # no process, no file more
        return None
    finally:
        if job["enclose"] and os.getpid() == 1:  # else it would be every process of the user
            end_others()


def end_others():
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def prepare(code, context, scope):
    exec(compile(code, "completion", "exec"), scope)
    exec(compile(context, "tests", "exec"), scope)


def share(end, is_last):
    """Seconds for the next test: half of what is left, as one that hangs is to leave others some; the last has all."""
    return max(0.0, (end - time.monotonic()) / (1 if is_last else 2))


def passes(work, end, is_last):
    """Whether `work` comes to its end in a copy of this process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            silence()
            work()
            status = 0
        finally:
            os._exit(status)
    return wait(child, share(end, is_last)) == 0


def silence():
    """Nothing to read, and nowhere to print to."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(os.devnull, "w"), open(os.devnull, "w")  # noqa: SIM115


def wait(child, seconds):
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1
        time.sleep(0.001)


def output_of(code, scope, given, end, is_last):
    """What a program prints for an input, or None where it fails, takes too long or prints too much."""
    reading, writing = os.pipe()
    with open("input", "w", encoding="utf-8") as file:
        file.write(given)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            source, nothing = os.open("input", os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
            for ours, standard in ((source, 0), (writing, 1), (nothing, 2)):
                os.dup2(ours, standard)
            os.closerange(3, 64)
            sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
            sys.argv = ["program"]
            try:
                exec(compile(code, "completion", "exec"), scope)
                status = 0
            except SystemExit as ended:
                status = 0 if ended.code in (None, 0) else 1
            threading._shutdown()  # type: ignore[attr-defined]  # as Python ends: when all threads have
            atexit._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(status)
    os.close(writing)
    until, pieces = time.monotonic() + share(end, is_last), []
    while select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
        piece = os.read(reading, 1 << 16)
        pieces.append(piece)
        if not piece or sum(map(len, pieces)) > OUTPUT_BYTES:
            break
    os.close(reading)
    is_whole = bool(pieces) and not pieces[-1]
    status = wait(child, max(0.1, until - time.monotonic()) if is_whole else 0.0)
    return b"".join(pieces).decode(errors="replace") if is_whole and status == 0 else None


def main():
    job = json.load(sys.stdin)
    libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    report = os.dup(1)
    if job["enclose"]:
        isolate()
    first = os.fork()
    if first == 0:
        status = FAULT
        try:
            libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if job["enclose"]:
                enclose(job)
            limit(job)
            libc().prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the copies cannot look into this process
            silence()
            os.write(report, BEGUN)
            run(job, report)
            status = 0
        finally:
            os._exit(status)
    os.close(report)
    _, status = os.waitpid(first, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
