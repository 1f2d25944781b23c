"""The program's process: runs the program and answers calls to its functions."""

import json
import sys
import types
from typing import Any

from .wire import Closed, decode, describe_exception, encode, read_frame, write_frame


def serve_program(source: str, channel: int) -> None:
    """Runs the program, reports that it ran, then answers calls until the channel is closed.

    A request is {"do", "of", "args"}: call, get an attribute, set one; `of` is a name that the
    program defines or the number of a handle. A reply is {"value"} or {"error": [type, message]}.
    """
    module = types.ModuleType("program")
    sys.modules["program"] = module
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(request: dict[str, Any] | None) -> Any:
        if request is None:
            exec(compile(source, "program", "exec"), module.__dict__)
            return None
        of, do = request["of"], request["do"]
        args = [decode(item, objects.__getitem__) for item in request["args"]]
        named = {name: decode(item, objects.__getitem__) for name, item in request["named"].items()}
        if of not in module.__dict__ and not isinstance(of, int):
            raise NameError(f"the program defines no {of}")
        target = objects[of] if isinstance(of, int) else module.__dict__[of]
        if do == "get":
            return getattr(target, *args)
        if do == "set":
            return setattr(target, *args)
        return target(*args, **named)

    request = None
    while True:
        try:
            reply = {"value": encode(answer(request), keep)}
            content = json.dumps(reply).encode()
        except BaseException as error:  # SystemExit too: leaving early must not pass
            content = json.dumps({"error": describe_exception(error)}).encode()
        write_frame(channel, content)
        try:
            request = json.loads(read_frame(channel))
        except Closed:
            return
