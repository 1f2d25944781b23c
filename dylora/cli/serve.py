"""`dylora serve`: an OpenAI-compatible server for one checkpoint."""

import ipaddress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dylora.cli.options import SpeakerOptions
from dylora.fields import option


@dataclass(frozen=True, kw_only=True)
class ServeOptions(SpeakerOptions):
    """Answer over HTTP as OpenAI's API does, for programs of this machine."""

    host: str = "127.0.0.1"
    """Address to listen on; by default this machine alone can reach it."""
    port: int = option(8000, least=0, most=65535)
    """Port; 0: a free one, which is printed."""
    allow_others: bool = False
    """Needed for a --host that other machines reach: there are no passwords here."""
    name: str | None = None
    """What the model is called; none: the name of its folder."""
    batch_size: int = option(8, least=1)
    """Answers that are computed together, of those that wait."""
    max_new_tokens: int = option(1024, least=1)
    """Most tokens that a request may ask for, and what one gets that asks for no number."""
    max_seconds: float = option(120.0, above=0)
    """An answer that takes longer ends where it is."""
    max_waiting: int = option(256, least=1)
    """Answers that may wait; beyond that a request is refused with 429."""


def run(options: ServeOptions, overrides: list[str]) -> None:
    """Serve until SIGINT or SIGTERM, which lets what was begun end."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"serve needs {package}: pip install 'dylora[serve]'")
    if not (options.allow_others or _is_this_machine(options.host)):
        raise ValueError(
            f"--host {options.host} is reached by other machines, and whoever reaches it can ask: "
            "give --allow_others if that is meant"
        )
    import asyncio  # takes a tenth of the time of --help
    import socket

    import uvicorn

    from dylora.serving.engine import Engine
    from dylora.serving.protocol import Limits
    from dylora.serving.server import build_app

    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, options.port), family=family) as listening:
        speaker = options.speaker()
        engine = Engine(speaker, batch_size=options.batch_size, waiting=options.max_waiting)
        name = options.name or Path(options.checkpoint).resolve().name
        app = build_app(engine, name, Limits(options.max_new_tokens, options.max_seconds))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        host = f"[{options.host}]" if ":" in options.host else options.host
        port = listening.getsockname()[1]
        print(f"serving {name} at http://{host}:{port}/v1", flush=True)
        asyncio.run(server.serve(sockets=[listening]))


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
