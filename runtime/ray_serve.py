"""A Ray Serve application: replicas of a server on many machines, behind the same routes.

``serve run coreskip.runtime.ray_serve:app weights=int4 max_replicas=4``, with the extra ``ray``. Every replica loads
the model by itself, so it has to be one that each machine can load: an id, or a path that all of them have.
"""

# Ray reads the annotations of `app` as they are: they must not become strings.
import dataclasses
import weakref
from typing import Any

import pydantic
from ray import serve

from .serve_guard import App
from .serve_setup import Setup

#: Seconds in which a replica that is to stop finishes its answers.
_GRACE = 30


class Arguments(pydantic.BaseModel):
    """Of ``serve run``, as KEY=VALUE, or of a configuration file's ``args``.

    Attributes:
        model, plan, weights, name, dtype, device, threads, keys, max_batch, max_waiting, max_context: of `Setup`; plan
            and keys hold several separated by commas.
        min_replicas, max_replicas: as many as the load asks for run in between.
        target_requests: under way at each replica, by which Ray decides how many are needed; None: as many as decode at
            once.
        cpus: that Ray reserves for a replica; None: its threads.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str | None = None
    plan: str = ""
    weights: str | None = None
    name: str | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int = pydantic.Field(1, ge=1)
    keys: str = ""
    max_batch: int = pydantic.Field(16, ge=1)
    max_waiting: int = pydantic.Field(64, ge=0)
    max_context: int | None = pydantic.Field(None, ge=1)
    min_replicas: int = pydantic.Field(1, ge=0)
    max_replicas: int = pydantic.Field(1, ge=1)
    target_requests: float | None = pydantic.Field(None, gt=0)
    cpus: float | None = pydantic.Field(None, ge=0)

    def setup(self) -> Setup:
        """
        Raises:
            CoreskipError: something that makes no sense.
        """
        known = {field.name for field in dataclasses.fields(Setup)}
        own = {name: value for name, value in self.model_dump().items() if name in known}
        lists = {"plans": _split(self.plan), "keys": _split(self.keys)}
        found = Setup(**{**own, **lists})
        found.check()
        return found


def _split(words: str) -> tuple[str, ...]:
    return tuple(word for word in words.split(",") if word)


def app(arguments: Arguments) -> Any:
    """The application that ``serve run`` deploys."""
    setup = arguments.setup()

    def replica() -> App:
        server = setup.start()
        made = server.app()
        weakref.finalize(made, server.close)
        return made

    deployment = serve.deployment(
        name="coreskip",
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": max(arguments.min_replicas, arguments.max_replicas),
            "target_ongoing_requests": arguments.target_requests or arguments.max_batch,
        },
        # one more than the replica takes, so that its own answer, a 429 with a time, reaches the client
        max_ongoing_requests=arguments.max_batch + arguments.max_waiting + 1,
        ray_actor_options={"num_cpus": arguments.threads if arguments.cpus is None else arguments.cpus},
        graceful_shutdown_timeout_s=_GRACE,
    )
    return deployment(serve.ingress(replica)()).bind()
