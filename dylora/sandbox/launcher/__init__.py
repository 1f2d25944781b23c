"""The processes that run untrusted programs: jobs on stdin, results on stdout, one frame each.

The folder is started by its path and uses the standard library alone; sandbox/host.py starts it.

    host ─── jobs ────►  launcher ──fork──► runner ──fork──► program   serves calls
         ─── tests ──────────────────────────┴─────fork──► test runner ◄─ values ─┘  verdict
         ◄── result ─────────────────────────┘

The launcher imports what programs use, and never reads a job. For each it forks a runner, which
reads the job, forks two children, watches their time, output and files, writes the result and ends.
So no memory that a later program inherits holds a job, its output or its verdict.

Tests run in a process of their own and reach the program through calls alone, so the program cannot
read, replace or fake them: it gets arguments and returns values, those of built-in types by copy,
others as handles that equal nothing. The program is forked before any memory that it inherits holds
the tests; the test runner reads them from stdin.

Both children give up root, capabilities, files, system calls and resources before they run
untrusted code, and cannot start a process.

    __main__.py   imports the rest, then calls main of jobs.py
    jobs.py       launcher and runner: fork the processes of a job, enforce its limits
    guard.py      what a child gives up: Landlock, seccomp, the user, resources
    syscalls.py   the tables of system calls and the seccomp filter made of them
    program.py    the program's process
    testing.py    the test runner's process
    wire.py       frames and values between processes
"""
