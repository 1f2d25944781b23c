"""The processes that hostile programs run in: jobs on stdin, results on stdout, a frame each.

A folder that stands alone: started by its path, with the standard library and nothing else, it
does not know the rest of dylora. sandbox.py is the host that starts it.

    host ─── jobs ────►  launcher ──fork──► runner ──fork──► program   serves calls
         ─── tests ──────────────────────────┴─────fork──► test runner ◄─ values ─┘  verdict
         ◄── result ─────────────────────────┘

The launcher imports what programs use, and never reads a job. For each it forks a runner, which
reads the job, forks two children, watches their time, output and files, writes the result and ends.
So nothing of a job, its output or its verdict is in any memory that a later program inherits.

Tests run in a process of their own and reach the program by calls alone, so there is nothing
beside them that the program could read, replace or fake: it gets arguments and returns values,
plain ones by copy, others as handles that equal nothing. The program is forked before the tests
have been in any memory that it inherits; the test runner reads them itself.

Both children give up root, capabilities, files, system calls and resources before they run a line
that is not ours, and can start no process.

    __main__.py   the start: imports the rest, then main of jobs.py
    jobs.py       launcher and runner: what is forked when, what is watched
    guard.py      what a child gives up: Landlock, seccomp, the user, resources
    syscalls.py   the tables of system calls and the filter made of them
    program.py    the program's side
    test_runner.py  the tests' side
    wire.py       frames and values between them
"""
