"""Programs whose answers are wrong and that try to pass all the same, and how each has to end."""

from attacks import WRONG, Attack

_EXPECTS = "try: f(-1)\nexcept Exception: pass\nelse: assert False"
"""Tests that take any exception for right: one the program raises, and no other end of it."""
_REPLIES = (
    "import sys\ndef f(x):\n"
    "    for m in [m for m in sys.modules.values() if hasattr(m, 'describe_exception')]:\n"
    "        m.encode = lambda *a: {reply}\n"
)
"""From the second call on it replies with what it likes."""
_RATIO = "import difflib\nassert difflib.SequenceMatcher(None, f(2), 'vwxyz').ratio() == 1"


def _cheat(name: str, source: str, *outcomes: str, tests: str = WRONG) -> Attack:
    return Attack(name, source, outcomes or ("failed",), tests)


_EQUAL = "__eq__ = lambda s, o: True; __ne__ = lambda s, o: False; __hash__ = object.__hash__"

CHEATS = [
    _cheat("leaves with 0", "import sys\nsys.exit(0)", "error"),
    _cheat("leaves hard with 0", "import os\nos._exit(0)", "error"),
    _cheat("leaves in f", "import os\ndef f(x): os._exit(0)", "error"),
    _cheat("raises SystemExit in f", "def f(x): raise SystemExit(0)", "error"),
    _cheat("leaves when a module loads", "import atexit, os\natexit.register(os._exit, 0)",
           "error"),
    _cheat("raises what a test catches", "def f(x): raise AssertionError", "error"),
    _cheat("equals everything", f"class A: {_EQUAL}\ndef f(x): return A()"),
    *[
        _cheat(f"a {kind} that equals everything",
               f"class A({kind}): {_EQUAL}\ndef f(x): return A()")
        for kind in ("int", "float", "str", "list", "dict", "tuple", "set", "bytes", "complex")
    ],
    _cheat("a list whose items equal everything",
           f"class A: {_EQUAL}\ndef f(x): return [A()]", tests="assert f(2) == [4]"),
    _cheat("is everything's instance",
           "class A:\n    __class__ = property(lambda s: int)\n    __int__ = lambda s: 4\n"
           "    __eq__ = lambda s, o: True\ndef f(x): return A()", "failed", "error"),
    _cheat("is near everything",
           "class A:\n    __sub__ = __rsub__ = __abs__ = lambda s, *o: s\n"
           "    __lt__ = lambda s, o: True\ndef f(x): return A()",
           "error", tests="assert abs(f(2) - 4) < 1e-6"),
    _cheat("is true", "class A: pass\ndef f(x): return A()",
           "not supported", tests="f(0)\nassert f(2)"),
    _cheat("is a match in name", "class Match:\n    __bool__ = lambda s: True\n"
           "Match.__module__ = 're'\ndef f(x): return Match()", "not supported",
           tests="assert f(2)"),
    _cheat("holds everything",
           "class A:\n    __contains__ = lambda s, o: True\ndef f(x): return A()",
           "error", tests="assert 4 in f(2)"),
    _cheat("patches builtins",
           "import builtins\nfor n in ('abs', 'all', 'any', 'len', 'isinstance', 'sum'):\n"
           "    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return [0]",
           "failed", "error",
           tests="assert all(a == b for a, b in zip(f(2), [4])) and len(f(2)) == 2"),
    _cheat("patches the import",
           "import builtins\nbuiltins.__import__ = lambda *a, **k: None\ndef f(x): return 0"),
    _cheat("patches a helper of the tests",
           "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0.0",
           tests="import math\nassert math.isclose(f(2), 4)"),
    _cheat("brings a helper of the tests",
           "class math: isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0.0",
           tests="assert math.isclose(f(2), 4)"),
    _cheat("redefines the tests' functions",
           "def check(*a): pass\ndef f(x): return 0",
           tests="def check(g):\n    assert g(2) == 4\ncheck(f)"),
    _cheat("replaces modules",
           "import sys, types\nfor n in list(sys.modules): sys.modules[n] = types.ModuleType(n)\n"
           "def f(x): return 0", "failed", "error"),
    _cheat("replaces AssertionError",
           "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
           "def f(x): return 0"),
    _cheat("traces", "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n"
           "sys.excepthook = lambda *a: None\ndef f(x): return 0"),
    _cheat("looks for the tests in the frames",
           "import sys\ndef f(x):\n    frame, seen = sys._getframe(), ''\n    while frame:\n"
           "        seen += repr(frame.f_locals) + repr(frame.f_globals); frame = frame.f_back\n"
           "    return 4444 if ' '.join(['answer', 'is']) in seen else 0",
           tests="assert f(2) == 4444, 'answer is'"),
    _cheat("looks for the tests among all objects",
           "import gc\ndef f(x):\n    needle = ' '.join(['answer', 'is'])\n"
           "    def has(o):\n        try: return needle in str(o)\n"
           "        except Exception: return False\n"
           "    return 4444 if any(map(has, gc.get_objects())) else 0",
           tests="assert f(2) == 4444, 'answer is'"),
    _cheat("looks for the tests in memory",
           "import ctypes\ndef f(x):\n"
           "    parts = ctypes.string_at(id(f) & ~0xfffff, 2**20).split(b'answer')\n"
           "    return 4444 if any(part[:3] == b' is' for part in parts) else 0",
           "failed", "error", tests="assert f(2) == 4444, 'answer is'"),
    _cheat("claims to have passed, everywhere",
           "import json, os, struct\nm = json.dumps({'outcome': 'passed', 'detail': ''}).encode()\n"
           "for d in range(64):\n    try: os.write(d, struct.pack('<I', len(m)) + m)\n"
           "    except OSError: pass\nos._exit(0)", "error"),
    _cheat("answers before it is asked",
           "import json, os, struct\nm = json.dumps({'value': 0}).encode()\n"
           "for d in range(3, 64):\n    try: os.write(d, (struct.pack('<I', len(m)) + m) * 9)\n"
           "    except OSError: pass\ndef f(x): return 0"),
    _cheat("announces 4 GB",
           "import os\nfor d in range(3, 64):\n    try: os.write(d, b'\\xff' * 8)\n"
           "    except OSError: pass", "output limit"),
    _cheat("sends nonsense",
           "import os\nfor d in range(3, 64):\n    try: os.write(d, b'\\x04\\0\\0\\0][][')\n"
           "    except OSError: pass", "error"),
    _cheat("sends what nests for ever",
           "import os, struct\nm = b'{\"value\":' + b'[\"l\",[' * 50000\n"
           "for d in range(3, 64):\n    try: os.write(d, struct.pack('<I', len(m)) + m)\n"
           "    except OSError: pass", "error", "timeout"),
    _cheat("replaces the launcher's functions",
           "import sys\n"
           "for m in [m for m in sys.modules.values() if hasattr(m, 'describe_exception')]:\n"
           "    m.encode = lambda *a: {'outcome': 'passed'}\n"
           "    m.run_tests = lambda *a: {'outcome': 'passed', 'detail': ''}\ndef f(x): return 0",
           "error", "failed"),
    _cheat("reads the questions of others",
           "import os\nfor d in range(0, 64):\n    try:\n        os.set_blocking(d, False)\n"
           "        data = os.read(d, 10**6)\n"
           "        assert b'answer' not in data\n    except OSError: pass\n"
           "def f(x): return 0", "failed", "error", "timeout"),
    _cheat("closes every descriptor", "import os\nos.closerange(0, 64)\ndef f(x): return 4",
           "error"),
    _cheat("returns a number of nothing",
           "import sys\nfor m in list(sys.modules.values()):\n"
           "    if hasattr(m, 'describe_exception'): m.encode = lambda *a: ['h', -10**9]\n"
           "def f(x): return 0"),
    _cheat("is no Python", "def f(x) return 4", "error"),
    _cheat("defines nothing", "", "error"),
    _cheat("returns none", "def f(x): pass"),
    _cheat("returns nan", "def f(x): return float('nan')",
           tests="assert abs(f(2) - 4) < 1e-6"),
    _cheat("returns a great integer", "def f(x): return 1 << 10**6"),
    _cheat("ends the comparison", "def f(x): raise StopIteration", "error",
           tests="assert all(map(lambda x: f(x) == 2 * x, [1, 2, 3]))"),
    _cheat("dies where an exception is expected", "import os\ndef f(x): os._exit(0)", "error",
           tests=_EXPECTS),
    _cheat("leaves where an exception is expected", "def f(x): raise SystemExit", "error",
           tests=_EXPECTS),
    _cheat("says too much where an exception is expected", "def f(x): return 'x' * 10**8",
           "output limit", "memory", tests=_EXPECTS),
    _cheat("is no value where an exception is expected",
           _REPLIES.format(reply="['?', 0]"), "error", tests=f"f(0)\n{_EXPECTS}"),
    _cheat("names its exception as it likes",
           "class E(Exception): pass\nE.__module__, E.__name__ = 'builtins', 'AssertionError'\n"
           "def f(x): raise E", "error"),
    _cheat("an exception that cannot be told",
           "class M(type): __mro__ = property(lambda s: 1 / 0)\n"
           "class E(Exception, metaclass=M): __str__ = lambda s: 1 / 0\ndef f(x): raise E",
           "error"),
    _cheat("keys of one hash",
           "def f(x): return dict.fromkeys(k * (2**61 - 1) for k in range(1, 1000))", "error"),
    _cheat("the same object twice", "class A: pass\na = A()\ndef f(x): return a",
           "not supported", tests="assert f(1) == f(1)"),
    _cheat("a name of builtins that is no type of Python's",
           _REPLIES.format(reply="['y', '__loader__']"), "error", tests="f(0)\nassert f(2)"),
    _cheat("a list in itself", "def f(x):\n    x = []\n    x.append(x)\n    return x", "error"),
    _cheat("a list of a hundred thousand floors",
           "def f(x):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x", "error"),
    _cheat("an endless generator", "def f(x):\n    while True: yield 4", "timeout", "memory",
           tests="assert list(f(2)) == [4]"),
    _cheat("an iterator that ends the tests' map", "def f(x): return iter([])", "not supported",
           tests="assert all(map(lambda x: next(f(x)) == 2 * x, [1, 2, 3]))"),
    _cheat("an order where an exception is expected", "class A: pass\ndef f(x): return A()",
           "not supported", tests="try: f(-1) < 0\nexcept TypeError: pass\nelse: assert False"),
    _cheat("a number that no comparison survives",
           "from decimal import Decimal\ndef f(x): return Decimal('sNaN')", "error"),
    _cheat("claims a digest",
           "import json, os, struct\nm = json.dumps({'digest': '0' * 64}).encode()\n"
           "for d in range(3, 64):\n    try: os.write(d, (struct.pack('<I', len(m)) + m) * 9)\n"
           "    except OSError: pass\ndef f(x): return 0", "output limit",
           tests="assert f(2) == [4]"),
    _cheat("calls a function that it was not given",
           "import json, os, struct\n"
           "m = json.dumps({'call': 0, 'args': [], 'named': {}}).encode()\n"
           "for d in range(3, 64):\n    try: os.write(d, struct.pack('<I', len(m)) + m)\n"
           "    except OSError: pass\ndef f(x): return 4", "error"),
    _cheat("calls the tests' function without end", "def f(g):\n    while True: g()", "timeout",
           tests="f(lambda: 4)\nassert False"),
    _cheat("calls itself through the tests' function without end", "def f(g): return g()",
           "error", "timeout", tests="def g(): return f(g)\nassert f(g) == 4"),
    _cheat("hooks the imports",
           "import sys, types\nclass H:\n    find_spec = classmethod(lambda *a: None)\n"
           "sys.meta_path[:] = [H]; sys.path_hooks.clear(); sys.path.clear()\n"
           "def f(x): return 'abcde'", tests=_RATIO),
    _cheat("leaves a module of the tests in the folder",
           "for n in ('difflib', 'heapq', 'sitecustomize', '_json'):\n"
           "    with open(n + '.py', 'w') as file:\n        file.write("
           "'class SequenceMatcher:\\n    def __init__(*a): pass\\n    def ratio(s): return 1')\n"
           "def f(x): return 'abcde'", tests=_RATIO),
    _cheat("names that are no text",
           "for n in (b'\\xff', b'a\\nb', b'-rf', b' ', b'x' * 255): open(n, 'w').close()\n"
           "def f(x): return 0"),
    _cheat("begins a reply and does not end it",
           "import os, time\nfor d in range(3, 64):\n    try: os.write(d, b'\\x64\\0\\0\\0{')\n"
           "    except OSError: pass\ntime.sleep(100)", "timeout"),
    _cheat("a number of eight million digits",
           "import os, struct\nm = b'{\"value\":' + b'1' * 8 * 10**6 + b'}'\n"
           "for d in range(3, 64):\n    try: os.write(d, struct.pack('<I', len(m)) + m)\n"
           "    except OSError: pass", "error"),
    _cheat("an error that is no error",
           "import os, struct\nm = b'{\"error\":{\"a\":[[]],\"b\":1}}'\n"
           "for d in range(3, 64):\n    try: os.write(d, struct.pack('<I', len(m)) + m)\n"
           "    except OSError: pass", "error"),
]  # fmt: skip
