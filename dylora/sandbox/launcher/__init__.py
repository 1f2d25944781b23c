"""The processes that run untrusted programs: jobs on stdin, results on stdout, one frame each.

The folder is started by its path and uses the standard library alone; sandbox/host.py starts it.

    host ─── jobs ────►  launcher ──fork──► runner ──fork──► program   serves calls
         ─── tests ──────────────────────────┴─────fork──► test runner ◄─ values ─┘  verdict
         ◄── result ─────────────────────────┘

The launcher never reads a job. For each it forks a runner, which reads the job, forks two children,
watches their time, output and files, writes the result and ends, so no memory that a later program
inherits holds a job, its output or its verdict.

Tests reach the program through calls alone, so the program cannot read, replace or fake them: it
gets arguments and returns values, those of built-in types by copy, others as handles that equal
nothing. It may call functions that it got as arguments. The test runner alone reads the tests, from
stdin.

Both children give up root, capabilities, files, system calls and resources before they run
untrusted code, and cannot start a process.
"""
