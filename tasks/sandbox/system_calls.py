"""A seccomp filter: what a program may not ask of the Linux kernel."""

import ctypes
import platform
import struct
from functools import cache
from typing import Any

PR_SET_SECCOMP = 22

# What the program may not ask of the kernel: name -> (number on x86_64, number on aarch64; -1: not there).
SYSCALLS = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # processes
    "fork": (57, -1), "vfork": (58, -1), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154), "prctl": (157, 167),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "prlimit64": (302, 261), "setrlimit": (160, 164),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    # memory that outlives the process or escapes its limit
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "msgctl": (71, 187), "mq_unlink": (241, 181),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # what Landlock leaves open on files
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "lchown": (94, -1), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, -1),
    "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "inotify_init": (253, -1), "inotify_init1": (294, 26), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "acct": (163, 89),
    # the machine
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "swapon": (167, 224), "swapoff": (168, 225), "personality": (135, 92), "syslog": (103, 116),
    "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1), "vhangup": (153, 58), "kcmp": (312, 272),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
# Calls that are newer than these lists (the same numbers on every machine) are refused too.
FIRST_UNKNOWN = 462
# Most of fcntl is harmless; F_SETOWN, F_SETSIG and F_SETOWN_EX have the kernel send any signal to any process.
FCNTL, FCNTL_REFUSED = (72, 25), (8, 10, 15)
AUDIT_ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def can_filter() -> bool:
    return platform.machine() in AUDIT_ARCHES


@cache
def _filter_program() -> bytes:
    """Instructions that answer each of ``SYSCALLS`` with EPERM and end a process of another ABI."""
    column, arch = AUDIT_ARCHES[platform.machine()]
    numbers = sorted({numbers[column] for numbers in SYSCALLS.values()} - {-1})
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    deny, allow, end = 0x00050000 | 1, 0x7FFF0000, 0x80000000
    # Fields: code, instructions to skip if true and if false, operand. x32 numbers (bit 30) reach the same calls, and
    # are above FIRST_UNKNOWN.
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, end), (load, 0, 0, 0)]
    command = [(load, 0, 0, 24)]  # the second argument
    command += [(equal, len(FCNTL_REFUSED) - i, 0, number) for i, number in enumerate(FCNTL_REFUSED)]
    command += [(give, 0, 0, allow), (give, 0, 0, deny)]
    program += [(at_least, len(command) + len(numbers) + 2, 0, FIRST_UNKNOWN)]
    program += [(equal, 0, len(command), FCNTL[column]), *command]
    program += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(give, 0, 0, allow), (give, 0, 0, deny)]
    return b"".join(struct.pack("=HBBI", *line) for line in program)


def filter_system_calls(libc: Any) -> bool:
    """Puts the filter in force for this process, for good. False where it cannot."""
    if not can_filter():
        return False
    code = _filter_program()
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0)
