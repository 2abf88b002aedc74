"""What each tier of the sandbox does about each attack. Pure data.

`test_attacks` holds every cell against what really happens, those of attacks that are not stopped,
too. Titles and reasons are what `docs/security.md` shows (`write_table.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

TIERS = ("namespaces", "process", "bwrap")


@dataclass(frozen=True)
class End:
    """How an attack ends."""

    stopped: bool
    says: str
    """Stopped: the way. Not stopped: why not, as a sentence."""
    reasons: frozenset[str] = frozenset()
    """The error codes, signals and endings that count as stopped; any other one would mean that
    the attack failed for a reason of its own."""


@dataclass(frozen=True)
class Attack:
    number: str
    title: str
    ends: Mapping[str, End]
    """Tier → its end."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Of the children, where they differ from the stage's."""
    wall_s: float | None = None
    grouped: Mapping[str, End] = field(default_factory=dict)
    """Tier → its end where this machine gives cgroups, for those where that is another one."""

    def end(self, tier: str, *, cgroups: bool) -> End:
        return self.grouped.get(tier, self.ends[tier]) if cgroups else self.ends[tier]

    @property
    def function(self) -> str:
        return f"a{int(self.number[:2]):02}{self.number[2:]}"

    @property
    def line(self) -> int:
        """The number without its letter: rows that share one belong together."""
        return int(self.number[:2])


def stopped(says: str, reasons: str = "") -> End:
    return End(True, says, frozenset(reasons.split()))


def open_(says: str) -> End:
    return End(False, says)


def row(number: str, title: str, namespaces: End, process: End | None = None) -> Attack:
    """The same end in all tiers, unless there are two. In `bwrap` the tier `namespaces` runs."""
    ends = {"namespaces": namespaces, "process": process or namespaces, "bwrap": namespaces}
    return Attack(number, title, ends)


def limited(attack: Attack, wall_s: float | None = None, **limits: int) -> Attack:
    return dataclasses.replace(attack, limits=limits, wall_s=wall_s)


def grouped(attack: Attack, namespaces: End | None, process: End | None = None) -> Attack:
    """The ends where there are cgroups; None: the same as without."""
    ends = {"namespaces": namespaces, "process": process, "bwrap": namespaces}
    return dataclasses.replace(
        attack, grouped={tier: end for tier, end in ends.items() if end is not None}
    )


def _seccomp(reasons: str = "EPERM ENOSYS") -> End:
    return stopped("refused by seccomp", reasons)


MIB = 2**20
_ABSENT = "absent from the child's view"
_NO_EGRESS = stopped("an allowlist is refused in this tier")
_REFUSED = "never followed nor opened: refused by name"
_NO_TOTALS = "Limits are per process here, and processes are not limited in number"

FILES = (
    row(
        "01",
        "read the superuser's home, /etc/passwd, others' homes, a hidden folder",
        stopped(_ABSENT, "ENOENT"),
        stopped("refused by Landlock", "EACCES"),
    ),
    row(
        "01b",
        "read a hidden file, and what lies in a folder that is hidden by a link to it",
        stopped("covered", "EACCES ENOENT"),
        stopped("refused by Landlock", "EACCES"),
    ),
    row(
        "02",
        "write to /, /usr, the interpreter, the project",
        stopped("mounted read-only", "EROFS EACCES"),
        stopped("refused by Landlock", "EACCES ETXTBSY"),
    ),
    row(
        "03",
        "`../`, /proc/self/root, links that lead outside",
        stopped("the child's own view", "ENOENT"),
        stopped("refused by Landlock", "EACCES"),
    ),
    row(
        "04",
        "/proc/1/root; environment, memory, files of other processes",
        stopped(_ABSENT, "ENOENT"),
        stopped("refused by Landlock", "EACCES"),
    ),
    row(
        "04b",
        "memory, environment and files of every process in sight",
        stopped("nobody is in sight"),
        stopped("refused by Landlock", "EACCES EPERM ENOENT ESRCH"),
    ),
    row("05", "mount, umount, fsopen, open_tree, listmount, chroot", _seccomp("EPERM")),
    row("06", "make a device", stopped("no capability", "EPERM")),
    row(
        "06b",
        "open /dev/fuse, kvm, net/tun, vsock, a terminal, ...",
        stopped(_ABSENT, "ENOENT"),
        stopped("refused by Landlock", "EACCES ENOENT"),
    ),
    row(
        "07",
        "hard link, or move, a file from outside into the work directory",
        stopped("other mounts", "ENOENT EXDEV"),
        stopped("refused by Landlock", "EXDEV EACCES EPERM"),
    ),
    row("08", "setuid programs; setresuid", stopped("no_new_privs: no gain", "EPERM")),
    row("09", "a setuid program of one's own", stopped("no gain"), _seccomp("EPERM")),
    row("10", "open_by_handle_at", _seccomp("EPERM")),
    row("11a", "fill the disk with one file", stopped("limit per file", "EFBIG")),
    row(
        "11b",
        "fill the disk with many files",
        stopped("a small file system of its own", "ENOSPC"),
        open_("Only the size of each file is limited."),
    ),
    row(
        "12",
        "use up the inodes",
        stopped("a small file system of its own", "ENOSPC"),
        open_("The number of files is not limited."),
    ),
    row("13a", "outputs that are links to files and folders outside", stopped(_REFUSED)),
    row("13b", "a link outside in place of the working directory", stopped(_REFUSED)),
    row("13c", "outputs that are hard links", stopped(_REFUSED)),
    row("14", "an output that becomes a link and back", stopped("collected after the kill")),
    row("15a", "outputs that are pipes, sockets, devices, sealed folders", stopped(_REFUSED)),
    row("15b", "outputs that are holes, of a terabyte, many", stopped("refused over the limit")),
    row("15c", "a tree of outputs of up to 10,000 levels", stopped("refused below 64 levels")),
    row("15d", "names of outputs with newlines, escapes, no UTF-8", stopped(_REFUSED)),
    row("15e", "more outputs than anybody looks at", stopped("refused over the limit")),
    row(
        "16a",
        "stat, chmod, utime, setxattr outside",
        stopped(_ABSENT, "ENOENT"),
        open_("Landlock does not cover metadata: this user's own files can be changed in it."),
    ),
    row(
        "16b",
        "lock a readable file of the host",
        open_("Who may read a file may lock it (flock): others who lock it have to wait."),
    ),
    row(
        "16c",
        "change the flags of a readable file, set its setuid bit",
        stopped("refused by seccomp; mounted read-only", "EPERM EROFS ENOTTY"),
        _seccomp("EPERM ENOTTY"),
    ),
    row("16d", "lease a readable file, so that its writers have to wait", _seccomp("EPERM")),
    row("16e", "throw a readable file out of memory", _seccomp("EPERM")),
    row("16g", "ask which pages of a readable file others have read", _seccomp("ENOSYS ENOTSUP")),
    row(
        "16f",
        "change mode and times of /dev/null",
        stopped("mounted read-only", "EROFS"),
        open_("As 16a."),
    ),
)

PROCESSES = (
    row(
        "17",
        "signal the parent, pid 1, anybody",
        stopped("there is nobody", "ESRCH EPERM"),
        stopped("refused by Landlock", "EPERM"),
    ),
    row(
        "18",
        "ptrace, process_vm_readv, pidfd_getfd",
        stopped("refused by seccomp", "EPERM ESRCH ENOENT"),
        stopped("refused by seccomp and Landlock", "EPERM EACCES"),
    ),
    row(
        "19",
        "list other processes",
        stopped(_ABSENT),
        open_("/proc is the host's: names, command lines and numbers of open files can be seen."),
    ),
    row("20", "a daemon that ignores every signal", stopped("killed when the run ends")),
    row("20b", "processes that fork faster than signals come", stopped("killed when the run ends")),
    grouped(
        row(
            "21",
            "a fork bomb",
            stopped("limit of processes, or of memory", "EAGAIN MEMORY_LIMIT"),
            open_("Processes are not limited in number; all are killed when the run ends."),
        ),
        namespaces=None,
        process=stopped("limit of processes", "EAGAIN"),
    ),
    row("22", "a user namespace by unshare, clone, clone3", _seccomp()),
    row(
        "23",
        "setns into others' namespaces",
        stopped("absent, and refused by seccomp", "ENOENT EPERM ESRCH"),
        stopped("refused by Landlock and seccomp", "EACCES EPERM"),
    ),
    row("24a", "the x32 entry point", stopped("killed by seccomp", "SIGNALED SIGSYS")),
    row("24b", "the i386 entry point", stopped("killed by seccomp", "SIGNALED SIGSYS SIGSEGV")),
    row(
        "25",
        "real-time scheduling, negative nice, affinity, a core of one's own",
        _seccomp("EPERM EACCES"),
    ),
    row(
        "26a",
        "raise one's own limits, lower oom_score_adj",
        stopped("no right", "EPERM EROFS EACCES"),
    ),
    row(
        "26b",
        "lower limits and priority of a process outside",
        stopped(_ABSENT, "ESRCH EPERM"),
        _seccomp("EPERM"),
    ),
    row("27", "inherited descriptors", stopped("/dev/null and three pipes are all there is")),
    row("28", "keys of the trainer in the environment", stopped("a clean start")),
    row("29", "keys of others in one's own memory", stopped("none there")),
    row(
        "30",
        "host paths in mountinfo",
        open_("It names the device, and where on it the readable folders lie."),
        open_("The mounts are the host's."),
    ),
    row(
        "31",
        "/proc/keys, kallsyms, kmsg, core_pattern, /sys",
        stopped(_ABSENT, "ENOENT"),
        open_("/proc is the host's; /sys and /dev are refused by Landlock."),
    ),
    row("31b", "have pages made one with others' of the same content", _seccomp("EPERM")),
    row("32a", "random numbers of siblings", stopped("reseeded in each child")),
    row(
        "32b",
        "hash seed and addresses of siblings",
        open_("Children are forks of one zygote: both are its own, drawn once per zygote."),
    ),
)

KERNEL = (
    row("33", "io_uring", _seccomp("EPERM")),
    row("33b", "system calls newer than Linux 6.17", _seccomp("ENOSYS")),
    row("33c", "the old AIO: more events than the machine has left", _seccomp("ENOSYS")),
    row("34", "bpf, perf_event_open, filters for sockets", _seccomp("EPERM")),
    row("35", "userfaultfd", _seccomp("EPERM ENOENT EACCES")),
    row("36", "keyctl, add_key, request_key", _seccomp("EPERM")),
    row("37", "kexec, modules, reboot, swap", _seccomp("EPERM")),
    row("38", "personality, modify_ldt, iopl", _seccomp("EPERM")),
    row("38b", "ask security modules, and set their attributes", _seccomp("EPERM")),
    row("39", "set the clock", _seccomp("EPERM")),
    row("39b", "have the machine write out what it holds back", _seccomp("EPERM ENOTTY")),
    row("40", "TIOCSTI, TIOCLINUX", _seccomp("EPERM ENOENT EACCES")),
    row("41", "System V and POSIX queues and shared memory", _seccomp("EPERM")),
    row("41b", "those that others have, by their numbers", _seccomp("EPERM")),
    row("42", "fanotify, inotify flood", _seccomp("EPERM ENOSYS")),
    row("43", "a core dump, by the kernel or by the host's program", stopped("no limit but 1")),
)

NETWORK = (
    row(
        "44a",
        "ports of the host's loopback",
        stopped("a network of its own", "ECONNREFUSED"),
        stopped("refused by Landlock; UDP by seccomp", "EACCES EPERM"),
    ),
    row(
        "44b",
        "the proxy's port, at another address",
        stopped("a network of its own", "ECONNREFUSED"),
        open_("Landlock's rules name ports, not addresses."),
    ),
    row(
        "45",
        "metadata address, LAN, DNS, UDP, ICMP",
        stopped("there is no route", "ENETUNREACH EPERM"),
        stopped("refused by Landlock and seccomp", "EACCES EPERM"),
    ),
    row(
        "46a",
        "the host's abstract Unix sockets",
        stopped("a network of its own", "ECONNREFUSED"),
        stopped("refused by Landlock", "EPERM"),
    ),
    row(
        "46b",
        "the host's Unix sockets in the file system",
        stopped(_ABSENT, "ENOENT"),
        _seccomp("EPERM"),
    ),
    row(
        "46c",
        "Unix sockets in a readable folder",
        open_("A read-only mount does not stop it: show no folder that has sockets in it."),
        _seccomp("EPERM"),
    ),
    row(
        "46d",
        "the host's Unix sockets, from a pair of one's own: streams, packets, datagrams, raw",
        stopped(_ABSENT, "ENOENT ECONNREFUSED"),
        stopped("refused by seccomp; a pair stays one", "EPERM EISCONN"),
    ),
    row("47a", "netlink, packet, vsock, AF_ALG, XDP, SMC and other families", _seccomp("EPERM")),
    row("47b", "raw sockets, SCTP, DCCP, protocols of another type", _seccomp("EPERM")),
    row("47c", "settings of network devices", _seccomp("EPERM ENOTTY")),
    row(
        "47d",
        "through the egress proxy: what is not listed, or leads inside",
        stopped("refused by name, then by address"),
        _NO_EGRESS,
    ),
    row(
        "47e",
        "through the egress proxy: another Host, a second request, two lengths",
        stopped("one request, of one reading"),
        _NO_EGRESS,
    ),
    row(
        "47f",
        "against the egress proxy: 1,000 connections, slow and endless heads",
        stopped("bounded for each child; siblings get through"),
        _NO_EGRESS,
    ),
    row("47g", "urgent data on Unix sockets", _seccomp("EPERM")),
    row("47h", "have the kernel load modules for bridges and VLANs", _seccomp("ENOTTY")),
    row("48a", "Multipath TCP, TCP fast open", _seccomp("EPERM")),
    row(
        "48b",
        "a TCP socket turned into SMC, TLS, ESP; one that signs",
        _seccomp("EPERM"),
    ),
    row("48d", "a UDP socket turned into ESP, L2TP", _seccomp("EPERM ENOPROTOOPT")),
    row(
        "48e",
        "have the kernel rewrite its own code, for which it stops each processor",
        _seccomp("EPERM ENOPROTOOPT ENOTTY"),
    ),
    row(
        "48c",
        "listen at a port that nobody picked, for those outside",
        stopped("a network of its own"),
        _seccomp("EPERM"),
    ),
    row(
        "49",
        "pass a descriptor to a sibling",
        stopped("nothing is shared", "ECONNREFUSED ENOENT"),
        _seccomp("EPERM"),
    ),
)

_TOTAL = 150 * MIB
_MEMORY = stopped("limit of their sum", "MEMORY_LIMIT")
_CPU = stopped("limit of their sum, looked at twice a second", "CPU_LIMIT")
RESOURCES = (
    row("50", "one allocation of 5 GB", stopped("limit of the address space", "ENOMEM")),
    *(
        limited(grouped(attack, _MEMORY, _MEMORY), total_memory_bytes=_TOTAL)
        for attack in (
            row(
                "51a",
                "processes that are each below the limit: private memory",
                stopped("limit of their sum, polled twice a second", "MEMORY_LIMIT"),
                open_(f"{_NO_TOTALS}."),
            ),
            row(
                "51b",
                "the same in shared memory that is not mapped at the moment",
                open_("It counts for no process; bounded by address space times processes."),
                open_(f"{_NO_TOTALS}."),
            ),
            row(
                "51c",
                "the same in the buffers of sockets",
                open_("They count for no process; bounded by open files times processes."),
                open_(f"{_NO_TOTALS}."),
            ),
        )
    ),
    limited(
        grouped(
            row(
                "51d",
                "the same in the buffers of TCP connections",
                open_("They count for no process; bounded by open files times processes."),
                stopped("there is no listener to connect to"),
            ),
            _MEMORY,
        ),
        total_memory_bytes=_TOTAL,
    ),
    row("51e", "memory of the kernel's: a table of futexes", _seccomp("EPERM")),
    row(
        "51f",
        "the kernel's memory: access lists of files, names of mappings; the machine's huge pages",
        _seccomp("ENOSPC ENOSYS EINVAL ENOMEM"),
    ),
    row(
        "51g",
        "the kernel's memory: datagrams never sent, headers, groups, errors, copies of sockets",
        _seccomp("EPERM ENOPROTOOPT"),
    ),
    limited(
        row(
            "51h",
            "the kernel's memory: connections that nobody accepts, without a descriptor",
            stopped("counted twice a second", "MEMORY_LIMIT"),
            stopped("refused by Landlock and seccomp", "EACCES EPERM"),
        ),
        total_memory_bytes=128 * MIB,
    ),
    row(
        "51j",
        "the machine's room for TCP sockets whose processes have closed them",
        stopped("counted twice a second", "MEMORY_LIMIT"),
        stopped("refused by Landlock and seccomp", "EACCES EPERM"),
    ),
    row(
        "51i",
        "the kernel's memory: locks of bytes of files",
        open_("Nobody counts them; bounded by what time there is to make them."),
    ),
    row(
        "52",
        "memfd, /dev/shm",
        stopped("refused by seccomp; part of the small file system", "EPERM EFBIG ENOSPC"),
        stopped("refused by seccomp and Landlock", "EPERM EACCES"),
    ),
    *(
        limited(attack, cpu_s=1, total_cpu_s=1)
        for attack in (
            grouped(
                row(
                    "53a",
                    "serial forks, each below the CPU limit",
                    stopped("limit of their sum, polled twice a second", "CPU_LIMIT"),
                    open_(f"{_NO_TOTALS}; the wall clock ends it."),
                ),
                _CPU,
                _CPU,
            ),
            grouped(
                row(
                    "53b",
                    "the same, with SIGCHLD ignored",
                    open_(
                        "Time of children that nobody waits for is lost; the wall clock ends it."
                    ),
                    open_(f"{_NO_TOTALS}; the wall clock ends it."),
                ),
                _CPU,
                _CPU,
            ),
            row(
                "53c",
                "the same, as children of the parent",
                _seccomp("EPERM"),
            ),
        )
    ),
    limited(
        row("54a", "ignore every signal and stay", stopped("killed at its deadline", "TIMEOUT")),
        wall_s=1.0,
    ),
    limited(
        row(
            "54b",
            "ignore every signal, SIGXCPU too, and burn",
            stopped("killed at the limit", "SIGNALED SIGKILL CPU_LIMIT"),
            stopped("killed at the limit", "SIGNALED SIGKILL"),
        ),
        cpu_s=1,
    ),
    row("55a", "a flood of one endless line", stopped("ended by name", "OUTPUT_LIMIT")),
    row("55b", "escapes for the terminal", stopped("shown as text")),
    row("55c", "packets of a byte, each to be read by itself", _seccomp("EINVAL EACCES")),
    row(
        "56",
        "a huge, deep, duplicate-keyed, NaN-laden, pickled result",
        stopped("ended by name", "RESULT_LIMIT BAD_RESULT"),
    ),
    row("57", "a grandchild keeps the pipes open", stopped("killed, not waited for")),
    row(
        "58",
        "use up descriptors, also in flight",
        stopped("limits of the child", "EMFILE ETOOMANYREFS"),
    ),
    limited(
        row(
            "58b",
            "descriptors in flight, until the user may have no more",
            stopped("those who hand out descriptors may have more", "ETOOMANYREFS"),
        ),
        open_files=1024,
    ),
    row(
        "58c",
        "timers, until the user may have no more",
        stopped("limits of the child", "EAGAIN"),
        open_("Counted per user: who runs out of them is told so."),
    ),
    row(
        "58d",
        "pages in pipes, until the user may have no more",
        open_("Counted per user: its new pipes have two pages, and work."),
    ),
)

PROXY = (
    row(
        "59a",
        "another rollout's key, known by magic: in headers, path, query, body",
        stopped("the connection says whose it is"),
        open_("The key alone says who calls; that none can be found is 29's."),
    ),
    row(
        "59b",
        "another's id, address, answers, with one's own key",
        stopped("it counts as one's own, or is refused"),
    ),
    row(
        "60",
        "other paths and verbs, absolute form, CONNECT, the control plane, the journal",
        stopped("refused; its sockets and files are absent", "ENOENT"),
        stopped("refused; its sockets by seccomp, its files by Landlock", "EPERM EACCES"),
    ),
    row(
        "61a",
        "two lengths, bare line feeds, chunks: a request hidden in another",
        stopped("refused, and the connection closed"),
    ),
    row("61b", "lines and escapes for logs and records", stopped("escaped, or left out")),
    row("61c", "200 requests in one piece", stopped("answered one after the other")),
    row("61d", "trailers without end, after a body", stopped("not kept, and bounded as heads are")),
    row(
        "61e",
        "4,000 requests at once on each of 60 connections, behind one that takes a while",
        stopped("no more is read; too many are refused"),
    ),
    row("61f", "what is no HTTP, for a line of the log each", stopped("answered, not told")),
    limited(
        row(
            "61g",
            "bodies in chunks of a byte, on 100 connections, on end",
            stopped("refused: too many in what is read at a time"),
        ),
        cpu_s=60,
        total_cpu_s=60,
    ),
    row(
        "61h", "calls without content, for a traceback of the log each", stopped("refused by name")
    ),
    *(
        limited(attack, total_memory_bytes=2**31)
        for attack in (
            row("62a", "heads and bodies that never end", stopped("cut for others' connections")),
            row(
                "62b",
                "4,000 connections to a proxy with 1,024 descriptors: idle",
                stopped("bounded for each rollout; idle ones make room"),
            ),
            row("62c", "the same, each with a call under way", stopped("bounded for each rollout")),
            row(
                "63a",
                "bodies of 1 GB: announced, chunked, gzipped; 40 of 15 MiB at once",
                stopped("bounded, one by one and together"),
            ),
            row("63b", "heads of 10 MB", stopped("refused")),
            row(
                "63c",
                "n = 10^6, a million messages, JSON that is deep, wide, or no JSON; "
                "tools longer than any context",
                stopped("refused by name"),
            ),
        )
    ),
    row(
        "63e",
        "schemas and patterns that never end, or have no bottom, before a real engine",
        stopped("refused by name, by a process of their own with limits"),
    ),
    row("63d", "calls that are refused when much was made of them", stopped("nothing stays")),
    row(
        "63f",
        "64 calls at once, again and again, each of which takes a while to read",
        stopped("one at a time, others' in between"),
    ),
    limited(
        row(
            "63g",
            "thoughts of 12 MiB that no template shows, kept for a grader",
            stopped("bounded with what else is said in the rollout"),
        ),
        total_memory_bytes=2**31,
    ),
    limited(
        row(
            "63h",
            "the same, and metadata of 12 MiB, in streams that are never read",
            stopped("bounded together until the last of an answer is read"),
        ),
        total_memory_bytes=2**31,
    ),
    limited(
        row(
            "63i",
            "calls that count tokens, on 100 connections, on end",
            stopped("one at a time, others' in between"),
        ),
        cpu_s=60,
        total_cpu_s=60,
    ),
    row("64", "a storm of retries", stopped("the rollout's limit of turns")),
    row(
        "65", "special tokens, calls and Jinja in messages, names, tools", stopped("they stay text")
    ),
    row("66", "calls after the end", stopped("refused")),
    row("67", "30 streams that are never read", stopped("they delay nobody")),
    limited(
        row(
            "68",
            "calls for ever, also of what counts as no turn",
            stopped("limit of turns, then the deadline", "TIMEOUT"),
        ),
        wall_s=4.0,
    ),
)

_OF_GRADERS = "EACCES EPERM ENOENT EROFS ESRCH ECONNREFUSED ENETUNREACH"
HOUSE = (
    row(
        "69a",
        "an import that reads, connects, signals",
        stopped("enclosed before it"),
    ),
    row(
        "69b",
        "an import that tears out the limits of its children",
        open_(
            "A child's last steps are code in the zygote: its agent can undo its own limits per "
            "process, but nothing of what encloses the zygote."
        ),
    ),
    row(
        "69c",
        "an import that takes more memory than a child may",
        stopped("the zygote has the limit of one process", "ENOMEM"),
    ),
    row(
        "69d",
        "the imports of 69b and 71b, with start=exec",
        stopped("each child has an interpreter and an import of its own", "EMFILE ENOMEM"),
    ),
    row(
        "69e",
        "an import that leaves its children all rights in their namespaces: tables of netfilter's",
        _seccomp("EPERM"),
    ),
    row(
        "69g",
        "the same import: routes, aliases and settings of network devices",
        _seccomp("ENOTTY ENOTSUP"),
    ),
    row(
        "69f",
        "an import that says in its zygote's name that it is ready, and what is no message",
        stopped("what is no list of notes is none"),
    ),
    row("70a", "LD_*, PYTHON* variables in a spec", stopped("refused, named")),
    row("70b", "sitecustomize, NODE_OPTIONS, .pth, .bashrc for the next child", stopped(_ABSENT)),
    row(
        "71a",
        "write to the interpreter's files or the zygote's memory",
        stopped("mounted read-only, absent", "EROFS EACCES ENOENT"),
        stopped("refused by Landlock", "EACCES ETXTBSY"),
    ),
    row(
        "71b",
        "shared memory made by the import, from one child to the next",
        open_("Mappings that are shared stay so in every child of the zygote: of one agent only."),
    ),
    row(
        "71c",
        "read and write the files of siblings and of the zygote",
        stopped(_ABSENT, "ENOENT EROFS"),
        stopped("refused by Landlock", "EACCES ENOENT"),
    ),
    row(
        "71d",
        "files of a child that has ended, through a door that the import keeps open",
        stopped("taken out of memory at its end", "EPERM ENOENT"),
        stopped("there are no such doors", "EPERM"),
    ),
    row(
        "71e",
        "the same, through a descriptor that it left with the import's processes",
        open_("A file that one of the zygote's processes has open stays, as long as it does."),
    ),
    row(
        "71f",
        "links to others' folders among what a child left, put there while that is removed",
        stopped("it is removed with the child's memory"),
        stopped("removed beside descriptors, through no link"),
    ),
    row(
        "71g",
        "a socket of one's own in place of a child's listener, for the proxy to serve",
        stopped("the init of its cell hands it over", "RETURNED"),
        stopped("a child has as many as the plan says: none", "LOST"),
    ),
    row("72a", "data that is huge, with NULs, not JSON", stopped("a named error, or it runs")),
    row(
        "72b",
        "data nested without end",
        stopped("a named error"),
    ),
    row(
        "73a",
        "a grader that evals what the model said and unpickles what the agent left",
        stopped("the grader has a sandbox of its own, without network or key", _OF_GRADERS),
    ),
    row(
        "73b",
        "a text that the grader never ends with",
        stopped("killed at its deadline", "TIMEOUT"),
    ),
    row(
        "73c",
        "a huge, deep, unprintable transcript; a thousand branches; a large output",
        stopped("bounded texts and bytes, shared by the branches"),
    ),
    row("74", "an agent's name that is a path", stopped("a named error")),
    row(
        "74b",
        "names of runs and agents, and fields of tasks in a workspace's path, that are paths",
        stopped("a named error"),
    ),
)

ATTACKS = (*FILES, *PROCESSES, *KERNEL, *NETWORK, *RESOURCES, *PROXY, *HOUSE)
