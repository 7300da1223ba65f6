"""``python -m pretended SCRIPT|-m MODULE|-c CODE ARGUMENTS...``: runs it on a machine with a simulated GPU."""

from __future__ import annotations

import os
import runpy
import sys

from pretended.session import start

first, *rest = sys.argv[1:]
start()
# What is imported by now, pytest cannot rewrite.
os.environ.setdefault("PYTEST_ADDOPTS", "-W ignore::pytest.PytestAssertRewriteWarning")
if first == "-c":
    code, *sys.argv[1:] = rest
    sys.argv[0] = "-c"
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
elif first == "-m":
    sys.argv = rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = [first, *rest]
    runpy.run_path(first, run_name="__main__")
