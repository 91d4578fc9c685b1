"""Prefix-aware routing for Ray Serve: who has computed the beginning of a prompt computes the rest.

Ray's own router of that kind (`ray.serve.llm.request_router.PrefixCacheAffinityRouter`) cannot be
imported without vLLM or SGLang, and asks a central actor about every request. This one remembers,
in the process that routes, which beginnings it has sent where: hashes of the first 256, 512, ...
characters. It is wrong when a replica has forgotten, which costs one prefill and nothing else.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

Replica = TypeVar("Replica")

# Characters of a beginning, and of each step by which it may be longer.
_STEP = 256
_MOST_STEPS = 256
# What a prompt is made of, in the order in which templates write it, whatever the interface.
_PARTS = ("cache_salt", "tools", "system", "instructions", "messages", "prompt", "input")


def beginnings(body: bytes, tenant: str = "") -> tuple[bytes, ...]:
    """Hashes of longer and longer beginnings of what a request asks to go on from.

    Args:
        body: of a request to any of the interfaces; what is no JSON object has no beginnings.
        tenant: whose it is; nobody's beginnings are those of another.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(asked, dict):
        return ()
    parts = [asked.get(name) for name in _PARTS]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    state, found = blake2b(tenant.encode(), digest_size=8), []
    for end in range(_STEP, min(len(text), _STEP * _MOST_STEPS) + 1, _STEP):
        state.update(text[end - _STEP : end])
        found.append(state.digest())
    return tuple(found)


class Memory:
    """Which beginnings a replica was sent; forgets those that were not asked for the longest.

    Args:
        most: hashes to remember.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def learn(self, found: Sequence[bytes]) -> None:
        """They were sent to it."""
        for one in reversed(found):  # the shortest, which most requests share, are kept the longest
            self._known[one] = None
            self._known.move_to_end(one)
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def shared(self, found: Sequence[bytes]) -> int:
        """How many of them it knows, from the first on."""
        for count, one in enumerate(found):
            if one not in self._known:
                return count
        return len(found)


def ranked(
    shared: Mapping[Replica, int],
    load: Mapping[Replica, int],
    stable: Mapping[Replica, bytes],
    slack: int,
) -> list[Replica]:
    """Replicas, best first: of those that are not busier than the idlest by more than `slack`, the
    one that knows most of the beginning; then the idlest. Of equals, the lower in `stable`."""
    least = min(load.values())

    def order(replica: Replica) -> tuple[int, int, int, bytes]:
        busy = load[replica] - least > slack
        known = 0 if busy else shared[replica]
        return (int(busy), -known, load[replica], stable[replica])

    return sorted(shared, key=order)


class PrefixRouter(RequestRouter):  # type: ignore[misc] # Ray's classes are not typed
    """A request router for `RequestRouterConfig`; its arguments are those of `initialize_state`.

    Requests carry their beginnings as `beginnings` of the first argument. How busy a replica is,
    this router knows from its own count and from Ray's.
    """

    def initialize_state(self, *, slack: int = 8, memory: int = 16_384) -> None:
        """Called by Ray.

        Args:
            slack: how much busier, in requests, a replica may be than the idlest and still get what
                it knows.
            memory: beginnings to remember for each replica, one for each 256 characters.
        """
        self._slack, self._memory = slack, memory
        self._memories: dict[ReplicaID, Memory] = {}
        self._running: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Called by Ray: one replica a rank, best first."""
        if not candidate_replicas:
            return []
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # when all of them are full
        found = _beginnings_of(pending_request)
        key = found[0] if found else pending_request.metadata.internal_request_id.encode()
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        order = ranked(
            {one: self._memory_of(one).shared(found) for one in replicas},
            {one: self._load(one) for one in replicas},
            {one: blake2b(one.unique_id.encode(), key=key[:64]).digest() for one in replicas},
            self._slack,
        )
        return [[replicas[one]] for one in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called by Ray."""
        self._memory_of(replica_id).learn(_beginnings_of(pending_request))
        self._running[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray."""
        self._running[replica_id] = max(0, self._running[replica_id] - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray."""
        super().update_replicas(replicas)
        present = {replica.replica_id for replica in replicas}
        for gone in [one for one in self._memories if one not in present]:
            del self._memories[gone]
            self._running.pop(gone, None)

    def _memory_of(self, replica_id: ReplicaID) -> Memory:
        return self._memories.setdefault(replica_id, Memory(self._memory))

    def _load(self, replica_id: ReplicaID) -> int:
        counted = self.replica_queue_len_cache.get(replica_id)
        return max(self._running[replica_id], counted or 0)


def _beginnings_of(request: PendingRequest) -> tuple[bytes, ...]:
    found: tuple[bytes, ...] = getattr(request.args[0], "beginnings", ()) if request.args else ()
    return found
