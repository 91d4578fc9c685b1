"""The server on Ray Serve: `serve run earnest.serve.ray_app:build model=./model replicas=2`.

Two kinds of processes. Each replica of `Model` has an engine and the whole server of
`earnest.serve.app`; a `Door` takes requests from Ray's proxy, looks at how their prompts begin,
and passes them on to the replica that knows the beginning (`earnest.serve.ray_router`). There is a
door because Ray's proxy routes before it has read a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from earnest import env
from earnest.engine import load
from earnest.runners.choice import RunnerChoice, RunnerName
from earnest.runners.native.runner import KvType
from earnest.serve import journal
from earnest.serve.app import create_app
from earnest.serve.http import ApiError, error_response, key_of
from earnest.serve.journal import LogFormat
from earnest.serve.ray_router import beginnings
from earnest.serve.state import Limits, Served, keys_in
from earnest.serve.traces import Traces

# How often a request is given to another replica when the one that had it dies before its answer
# has begun.
_ATTEMPTS = 3
_ROUTER = "earnest.serve.ray_router.PrefixRouter"
# The header that tells which replica answered.
REPLICA_HEADER = "x-earnest-replica"


def _whole(value: object) -> object:
    """`serve run` gives every argument as text, which is none of the numbers that are allowed."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class Options(BaseModel):
    """How a model is deployed.

    Attributes:
        model: as `earnest serve` takes it; a path must exist on every node that has replicas.
        name: what clients call it; by default the name of its file.
        replicas: engines, each in a process of its own.
        autoscaling: in place of `replicas`: Ray's `AutoscalingConfig`.
        cpus: of each replica, as Ray counts them.
        runner: "native": compiled kernels; "reference": numpy, exact and slow; "auto": whichever
            there is.
        threads: of each replica; by default as many as it has CPUs.
        lock: pin the weights in RAM.
        kv: how keys and values are kept: "int16" by default, "f16", "bf16", "f32", "int8".
        activation_bits: how finely activations are rounded: 15 by default; 8 is faster and less
            exact.
        context: tokens that a conversation may have.
        doors: processes that take requests and pass them on.
        api_key_file: a file with a key on each line, read where this is built.
        cors: origins of web pages that browsers may call the server from.
        timeout: seconds for an answer.
        drain: seconds for answers under way when a replica is told to end.
        max_running: requests that a replica works on at a time; more wait at the door.
        max_waiting: requests that wait at a door before more are refused (429).
        health_period: seconds between Ray's questions whether a replica is well.
        slack: how much busier, in requests, a replica may be than the idlest and still get the
            prompts whose beginnings it knows.
        speculation: "prompt" guesses ahead from the text itself, "off" does not.
        log_level: "info": a line for each request in the replica's log.
        log_format: "text" or "json".
        otlp_traces_endpoint: where OpenTelemetry traces are sent; by default nowhere.
        allow_missing_correction_bias: open a mixture of experts without its correction bias.
        actor: more of Ray's `ray_actor_options` for the replicas.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = None
    replicas: int = Field(1, ge=1)
    autoscaling: dict[str, Any] | None = None
    cpus: float = Field(1, gt=0)
    runner: RunnerName = "auto"
    threads: int | None = Field(None, ge=1)
    lock: bool = False
    kv: KvType | None = None
    activation_bits: Annotated[Literal[8, 15] | None, BeforeValidator(_whole)] = None
    context: int | None = Field(None, ge=1)
    doors: int = Field(1, ge=1)
    api_key_file: Path | None = None
    cors: list[str] = Field(default_factory=list)
    timeout: float | None = Field(None, gt=0)
    drain: float = Field(30.0, ge=0)
    max_running: int = Field(64, ge=1)
    max_waiting: int = Field(1024, ge=1)
    health_period: float = Field(10.0, gt=0)
    slack: int = Field(8, ge=0)
    speculation: Literal["prompt", "off"] = "prompt"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = "text"
    otlp_traces_endpoint: str | None = None
    allow_missing_correction_bias: bool = False
    actor: dict[str, Any] = Field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        """What a request may ask for."""
        return Limits(request_seconds=self.timeout)

    @property
    def how(self) -> dict[str, Any]:
        """What `earnest.load` is told of the runner."""
        threads = self.threads
        if threads is None and self.runner != "reference":  # numpy has no such option
            threads = max(1, int(self.cpus))
        return {
            "runner": self.runner,
            "threads": threads,
            "lock": self.lock,
            "kv": self.kv,
            "activation_bits": self.activation_bits,
        }


@dataclass(frozen=True)
class Call:
    """A request on its way from a door to a replica.

    Attributes:
        scope: of ASGI, as far as it can travel.
        body: all of it.
        beginnings: of its prompt, for the router.
    """

    scope: dict[str, Any]
    body: bytes
    beginnings: tuple[bytes, ...]


def build(arguments: dict[str, Any]) -> Application:
    """The application, for `serve run`, a configuration file or `serve.run`.

    Args:
        arguments: see `Options`.

    Raises:
        pydantic.ValidationError: an argument is not known, or of the wrong kind.
        UserError: the file of keys holds none, or the runner has no such option.
    """
    options = Options.model_validate(arguments)
    if options.runner != "auto":  # which depends on what replicas find where they are
        RunnerChoice(**options.how)
    keys = (*env.api_keys(), *keys_in(options.api_key_file))
    number = {"num_replicas": options.replicas}
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": options.drain,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": options.health_period,
    }
    replicas = serve.deployment(
        Model,
        name="Model",
        max_ongoing_requests=options.max_running,
        max_queued_requests=options.max_waiting,
        ray_actor_options={**options.actor, "num_cpus": options.cpus},
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"slack": options.slack}
        ),
        **(number if options.autoscaling is None else {"autoscaling_config": options.autoscaling}),
        **common,
    )
    doors = serve.deployment(
        Door,
        name="Door",
        num_replicas=options.doors,
        max_ongoing_requests=2**20,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    return doors.bind(options, replicas.bind(options, keys), bool(keys))


class Model:
    """A replica: an engine and the whole server, but for the socket."""

    def __init__(self, options: Options, keys: tuple[str, ...]) -> None:
        journal.configure(options.log_level, options.log_format)
        endpoint = options.otlp_traces_endpoint
        opened = load(
            options.model,
            max_context=options.context,
            **options.how,
            speculation=None if options.speculation == "off" else options.speculation,
            allow_missing_correction_bias=options.allow_missing_correction_bias,
        )
        self._served = Served(
            opened,
            options.name or Path(options.model).resolve().name.removesuffix(".gguf"),
            api_keys=keys,
            limits=options.limits,
            origins=tuple(options.cors),
            traces=None if endpoint is None else Traces(endpoint),
        )
        self._service = self._served.service
        self._app = create_app(self._served)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """What the server says to a request: messages of ASGI, as many at a time as there are."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        ended = asyncio.Event()
        asked = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if asked:
                return asked.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = (REPLICA_HEADER.encode(), self._name)
                message = {**message, "headers": [*message.get("headers", []), named]}
            sent.put_nowait(message)

        task = asyncio.ensure_future(self._app({**call.scope}, receive, send))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            complete = False
            while not complete:
                messages = [await sent.get()]
                while not sent.empty():
                    messages.append(sent.get_nowait())
                complete = None in messages
                yield [message for message in messages if message is not None]
            task.result()
        finally:
            ended.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if not self._service.alive:
            raise RuntimeError("the engine's thread has ended")

    def __del__(self) -> None:
        """Called by Ray once the answers under way have ended, or have had their time."""
        if hasattr(self, "_service"):
            self._service.close(timeout=0)


class Door:
    """Takes requests from Ray's proxy and passes them on."""

    def __init__(self, options: Options, replicas: DeploymentHandle, keyed: bool) -> None:
        self._limits, self._keyed = options.limits, keyed
        self._replicas = replicas.options(method_name="answer", stream=True)

    async def __call__(self, request: Request) -> Response:
        """Called by Ray."""
        try:
            body = await self._body(request)
            scope = travelling(request.scope)
            tenant = key_of(dict(scope["headers"])) if self._keyed else ""
            call = Call(scope, body, beginnings(body, tenant))
            return await self._passed_on(call)
        except ApiError as error:
            return error_response(request, error)

    async def _body(self, request: Request) -> bytes:
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for piece in request.stream():
                    pieces.append(piece)
                    size += len(piece)
                    if size > self._limits.body_bytes:
                        most = f"at most {self._limits.body_bytes:,} bytes are taken"
                        raise ApiError(413, f"the request is too large: {most}")
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time") from None
        except ClientDisconnect:
            raise ApiError(499, "the client went away") from None
        return b"".join(pieces)

    async def _passed_on(self, call: Call) -> Response:
        for attempt in range(_ATTEMPTS):
            stream = self._replicas.remote(call)
            try:
                messages = await anext(stream)
            except RayActorError:
                if attempt + 1 < _ATTEMPTS:
                    continue  # nothing was said yet, so another replica can say it
                raise ApiError(503, "the replicas that had this request died") from None
            except BackPressureError:
                raise ApiError(429, "too many requests are waiting") from None
            except DeploymentUnavailableError:
                raise ApiError(503, "no replica can be started; see Ray's log") from None
            except BaseException:
                stream.cancel()
                raise
            break
        head = messages[0]
        response = StreamingResponse(_bodies(messages[1:], stream), head["status"])
        # Ray's proxy adds the request's id by itself; it is the same.
        response.raw_headers = [pair for pair in head["headers"] if pair[0] != b"x-request-id"]
        return response


async def _bodies(messages: list[Message], stream: Any) -> AsyncGenerator[bytes, None]:
    complete = False
    try:
        for message in messages:
            yield message.get("body", b"")
        async for more in stream:
            for message in more:
                yield message.get("body", b"")
        complete = True
    finally:
        if not complete:
            stream.cancel()


def travelling(scope: Any) -> dict[str, Any]:
    """The part of an ASGI scope that another process can use; its path is below the route prefix of
    the application, so that one cluster may have several models, each with a prefix of its own."""
    kept = (
        "type",
        "method",
        "scheme",
        "query_string",
        "headers",
        "http_version",
        "client",
        "server",
    )
    path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
    return {name: scope[name] for name in kept if name in scope} | {
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
