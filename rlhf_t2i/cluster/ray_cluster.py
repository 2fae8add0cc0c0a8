"""``placement: ray``: groups of actors on one placement group, connected to each other."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_t2i.cluster import node_check
from rlhf_t2i.cluster.actor import CONCURRENCY, WeightStore, WorkerActor
from rlhf_t2i.cluster.base import Cluster, Weights
from rlhf_t2i.cluster.clients import First, Limit, NoAnswer, RemoteClient, get, partners, translate_ray_errors
from rlhf_t2i.cluster.connect import join, keep_messages, same_node, start_local_ray, stop
from rlhf_t2i.cluster.control import RAY_DIED, RayMonitor
from rlhf_t2i.errors import ProcessLost, RunError, Stopped, UsageError
from rlhf_t2i.plugins import consent, traits
from rlhf_t2i.recipe import placement as geometry
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles import dispatch
from rlhf_t2i.roles.dispatch import Future, Method, P, T
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.worker import Reading, WorkerSpec, hosted_rewards

_START_LIMIT = Limit(600.0, "the limit for starting")
_PLACE_TIMEOUT_S = 120.0  # for devices that are free already
_STATUS_TIMEOUT_S = 10.0
_DEAD = "dead"
_RELEASE_TIMEOUT_S = 15.0
_CALL_RETRIES = 3  # of a call whose process died; the call itself may be the cause
_WEIGHT_STORE = "rlhf_t2i weight_store {}"  # of a placement group


class RayCluster(Cluster):
    """The roles of a run as Ray actors.

    Args:
        recipe: The recipe.
        failures: Where failing samples are saved.
        address: An existing cluster to join; None starts one on this machine, on loopback.
    """

    def __init__(self, recipe: Recipe, failures: Path | None = None, address: str | None = None) -> None:
        self._recipe = recipe
        self._roles = geometry.check_placement(recipe)
        self._specs = _specs(recipe, self._roles, failures)
        self._gpus = torch.cuda.is_available() if address is None else None
        self._started_ray = False
        self._monitor = RayMonitor()
        self._share = 1.0  # of a device, for each process
        self._group: PlacementGroup | None = None
        self._weight_store: ActorHandle | None = None
        self._actors: dict[str, list[ActorHandle]] = {}
        try:
            out = None if failures is None else failures.parent
            self._connect_ray(address, out)
            self._reserve()
            if address is not None:
                shared = [] if out is None else [str(out)]  # checkpoints are written there
                node_check.check(self._nodes.values(), [*node_check.files_of(recipe), *shared])
            self._create()
            self._build()
            self._introduce()
        except BaseException as error:
            dead = self._monitor.dead()
            self.close()
            meant = isinstance(error, Stopped | UsageError | ProcessLost)
            if dead and isinstance(error, Exception) and not meant:  # whatever Ray said of it
                raise ProcessLost(f"{RAY_DIED} {dead[0]} died while the roles started") from error
            raise

    def _connect_ray(self, address: str | None, out: Path | None) -> None:
        if address is not None or not ray.is_initialized():
            self._started_ray = True  # also if a signal comes while it starts
            if out is not None:
                keep_messages(out / "ray.log")
            if address is None:
                start_local_ray(len(self._all_specs))
                self._monitor = RayMonitor.of_own_ray()
            else:
                self._monitor.head = join(address)
        self._gpus = ray.cluster_resources().get("GPU", 0) > 0

    @property
    def _all_specs(self) -> list[WorkerSpec]:
        return [spec for specs in self._specs.values() for spec in specs]

    def _reserve(self) -> None:
        """Reserve all devices at once, or raise an error that says what is missing; never wait for devices."""
        kind = "GPU" if self._gpus else "CPU"
        needed = len(self._all_specs)
        available = _available(kind, needed)
        if self._gpus and self._recipe.placement.share_devices and available >= 1:
            self._share = 1.0 / math.ceil(needed / available)
            _check_sharing(self._specs, self._share)
        if available < needed * self._share:
            raise UsageError(
                f"placement needs {needed} {kind}s ({', '.join(f'{g}: {len(s)}' for g, s in self._specs.items())}) "
                f"but the cluster has {available:g} free: use fewer devices or let roles share a group"
            )
        self._group = placement_group([{kind: self._share} for _ in self._all_specs], strategy="PACK")
        if not self._group.wait(_PLACE_TIMEOUT_S):
            raise RunError(
                f"Ray could not place {needed} processes of {self._share:g} {kind} in {_PLACE_TIMEOUT_S:g} s, though "
                f"{available:g} {kind}s are free: parts of them on several machines, or another job took them meanwhile"
            )

    @property
    def _nodes(self) -> dict[int, str]:
        """The node of each process, by the number of its bundle."""
        found: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return found

    def _create(self) -> None:
        assert self._group is not None
        store_name = _WEIGHT_STORE.format(self._group.id.hex())
        if self._roles["generator"][0] != self._roles["learner"][0]:
            self._weight_store = start_weight_store(store_name)
        nodes = self._nodes
        neighbors = Counter(nodes.values())
        for bundle, spec in enumerate(self._all_specs):
            spec = replace(spec, neighbors=neighbors[nodes[bundle]])
            # By name: Ray warns of restarts whose arguments hold references.
            weight_store = store_name if self._weight_store and "generator" in spec.roles else None
            actor = ray.remote(concurrency_groups=CONCURRENCY)(WorkerActor).options(
                num_cpus=0 if self._gpus else 1,
                num_gpus=self._share if self._gpus else 0,
                max_restarts=0 if spec.stateful else -1,
                max_task_retries=0 if spec.stateful else _CALL_RETRIES,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
                runtime_env={"env_vars": _actor_environment(spec)},
            )
            self._actors.setdefault(spec.group, []).append(actor.remote(spec, weight_store))

    def _build(self) -> None:
        masters = {
            group: self._actors[group][0].rendezvous.remote() for group, specs in self._specs.items() if specs[0].trains
        }
        opened = self._wait(list(masters.values()), "first process of a group", _START_LIMIT)
        addresses = dict(zip(masters, opened, strict=True))
        building = {
            group: [actor.build.remote(addresses.get(group)) for actor in actors]
            for group, actors in self._actors.items()
        }
        for group, references in building.items():
            self._wait(references, f"group {group!r}", _START_LIMIT)

    def _introduce(self) -> None:
        """Give every trained role its clients."""
        waiting = []
        for group, specs in self._specs.items():
            if not specs[0].trains:
                continue
            for spec, actor in zip(specs, self._actors[group], strict=True):
                waiting.append(actor.connect.remote(self._clients_of(group, spec.rank, spec.world)))
        self._wait(waiting, "trained roles", _START_LIMIT)

    def _clients_of(self, group: str, rank: int, world: int) -> dict[str, list[RemoteClient]]:
        """The remote clients of one process: every role that does not live in its own group."""

        def client(role: str, other: str, reward_limit: Limit | None = None) -> RemoteClient:
            servers = self._actors[other]
            mine = [servers[i] for i in partners(rank, world, len(servers))]
            return RemoteClient(role, mine, reward_limit=reward_limit or Limit())

        clients = {
            role: [client(role, self._roles[role][0])]
            for role in ("generator", "assistant", "reference")
            if self._roles[role][0] != group
        }
        rewards = [(g, limit) for g, limit in self._reward_groups(trained=True).items() if g != group]
        return clients | {"reward": [client("reward", other, limit) for other, limit in rewards]}

    def _reward_groups(self, trained: bool = False) -> dict[str, Limit]:
        """Groups with rewards (``trained``: with rewards that train), the longest of their timeouts, and its key.

        The role ``reward`` without any reward still decodes.
        """
        keys = {r.key for r in self._recipe.algorithm.rewards}
        groups: dict[str, Limit] = {}
        for group, specs in self._specs.items():
            hosted = hosted_rewards(self._recipe, specs[0].roles)
            wanted = [r for r in hosted if r.key in keys or not trained]
            if wanted or (not trained and "reward" in specs[0].roles):
                limits = [Limit(r.timeout_s, f"timeout_s of {r.key}") for r in wanted]
                groups[group] = max(limits, key=lambda limit: limit.seconds or 0, default=self._limit)
        return groups

    def clients(self, role: str) -> list[RemoteClient]:
        """One for all processes of a role; for ``reward`` one per group of rewards."""
        groups = self._reward_groups() if role == "reward" else {self._roles[role][0]: self._limit}
        return [
            RemoteClient(
                role,
                self._actors[group],
                self._limit,
                reward_limit,
                guard=self._classify_errors,
                check=self._monitor.check,
            )
            for group, reward_limit in groups.items()
        ]

    def submit_all(self, role: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[list[T]]:
        """See :meth:`Cluster.submit_all`."""
        return self.clients(role)[0].submit_all(method, list(dispatch.bind(method, *args, **kwargs).values()))

    def submit_to_reward(self, label: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See :meth:`Cluster.submit_to_reward`."""
        choice = next(r for r in self._recipe.algorithm.rewards if r.key == label)
        (actor,) = self._actors[self._roles[f"reward:{label}"][0]]
        limit = Limit(choice.timeout_s, f"timeout_s of {label}")
        client = RemoteClient("reward", [actor], limit, guard=self._classify_errors)
        return First(client.submit_all(method, list(dispatch.bind(method, *args, **kwargs).values())))

    def _wait(self, references: Sequence[ObjectRef], role: str, limit: Limit | None = None) -> list[object]:
        """The answers, with the errors of :meth:`_classify_errors`; ``limit`` defaults to ``step_timeout_s``."""
        with self._classify_errors(role):
            return get(references, limit or self._limit, role, self._monitor.check)

    @contextmanager
    def _classify_errors(self, role: str) -> Iterator[None]:
        """Distinguish lost and stuck processes from a call that failed.

        Raises:
            ProcessLost: A process that holds training state died.
            RunError: A role failed, or no answer came in time; then with what every process was doing.
        """
        try:
            yield
        except NoAnswer as error:
            raise RunError(f"{error}; {self._describe_processes()}") from None
        except ProcessLost as lost:
            raise self._monitor.explain(lost) from lost.__cause__
        except RunError as error:
            # The peers of a dead rank fail too, in their collectives, and their errors may arrive first.
            process = None if self._monitor.dead() else self._lost()
            if process is None and not self._monitor.dead():
                raise
            died = ProcessLost(f"process {process} died while the {role} worked")
            raise self._monitor.explain(died) from error

    def _lost(self) -> str | None:
        """The name of a process with training state that is dead, if any."""
        states = self._states([spec for spec in self._all_specs if spec.stateful])
        return next((name for name, state in states.items() if state == _DEAD), None)

    def _describe_processes(self) -> str:
        """What every process was doing, to find out which one hangs."""
        return "; ".join(f"{name}: {state}" for name, state in self._states(self._all_specs).items())

    def _states(self, specs: list[WorkerSpec]) -> dict[str, str]:
        """By process (``group/rank``): what it was doing, "does not answer" or "dead"."""
        status = {f"{s.group}/{s.rank}": self._actors[s.group][s.rank].status.remote() for s in specs}
        ray.wait(list(status.values()), num_returns=len(status), timeout=_STATUS_TIMEOUT_S)
        states = {}
        for name, reference in status.items():
            try:
                states[name] = str(ray.get(reference, timeout=0))
            except ray.exceptions.GetTimeoutError:
                states[name] = "does not answer"
            except ray.exceptions.RayActorError:
                states[name] = _DEAD
        return states

    @property
    def _limit(self) -> Limit:
        return Limit(self._recipe.placement.step_timeout_s)

    def sync_generator(self, weights: Weights = "raw") -> int:
        """See :meth:`Cluster.sync_generator`.

        The learner's answers go to the generator's processes without passing this one; the store names them first, so
        that a process that is lost in between gets all of the new weights and not a mixture.
        """
        learner, generator = (self._actors[self._roles[role][0]] for role in ("learner", "generator"))
        if weights == "raw" and learner == generator:
            return 0
        parts = 1 if weights == "ema" else self._parts
        sizes, stored = [], []
        with translate_ray_errors("learner"):
            for part in range(parts):
                calls = [a.call.options(num_returns=2).remote("learner", "pack", weights, part, parts) for a in learner]
                sizes += [size for size, _ in calls]
                stored.append(calls[0][1])
        if self._weight_store is not None:
            self._wait([self._weight_store.keep.remote(weights, stored)], "generator")
        with translate_ray_errors("generator"):
            loading = [a.call.remote("generator", "load", weights, packed) for packed in stored for a in generator]
        sent = sum(cast(list[int], self._wait(sizes, "learner")))
        self._wait(loading, "generator")
        return sent

    @cached_property
    def _parts(self) -> int:
        return self.call_all("learner", LearnerRole.weight_parts)[0]

    def finish_saving(self, role: str) -> None:
        """See :meth:`Cluster.finish_saving`."""
        self._wait([actor.finish_saving.remote(role) for actor in self._actors[self._roles[role][0]]], role)

    def readings(self) -> dict[str, Reading]:
        """See :meth:`Cluster.readings`."""
        named = {f"{g}/{i}": a.reading.remote() for g, actors in self._actors.items() for i, a in enumerate(actors)}
        return dict(zip(named, cast(list[Reading], self._wait(list(named.values()), "run")), strict=True))

    def close(self) -> None:
        """End the actors, free their devices, and stop Ray if this run started it."""
        if not self._monitor.alive():  # stopping it is all that is left to do
            self._actors, self._weight_store, self._group = {}, None, None
        for actor in [a for actors in self._actors.values() for a in actors] + [self._weight_store]:
            if actor is not None:
                ray.kill(actor)
        self._actors, self._weight_store = {}, None
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._started_ray:
            stop()
            self._started_ray = False


def _check_sharing(specs: dict[str, list[WorkerSpec]], share: float) -> None:
    """Refuse ranks that train together on one GPU: NCCL would, minutes later and without naming the group.

    Raises:
        UsageError: There are fewer GPUs than processes, and a group that trains has several.
    """
    for group, ranks in specs.items():
        if share < 1 and ranks[0].trains and len(ranks) > 1:
            raise UsageError(
                f"placement.share_devices: the {len(ranks)} ranks of group {group!r} train together and cannot share "
                "a GPU, and there are fewer GPUs than processes: give the group 1 device, or use more GPUs"
            )


def start_weight_store(name: str) -> ActorHandle:
    """Start a :class:`WeightStore` on the driver's node; a run does not survive the loss of that node in any case.

    Ray could place it on a generator's node: lost together, the generator could not be restarted.
    """
    return ray.remote(WeightStore).options(num_cpus=0, name=name, scheduling_strategy=same_node()).remote()


def _available(kind: str, needed: int) -> float:
    """Free devices. Ray returns those of dead processes late: too few are checked again for some seconds."""
    wanted = min(needed, ray.cluster_resources().get(kind, 0))
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while (free := float(ray.available_resources().get(kind, 0))) < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return free


def _specs(recipe: Recipe, roles: dict[str, tuple[str, int]], failures: Path | None) -> dict[str, list[WorkerSpec]]:
    """One spec per process, by group."""
    groups, online = recipe.placement.groups, traits.resolve(recipe).online
    specs: dict[str, list[WorkerSpec]] = {}
    for name, group in groups.items():
        held = list(group.roles)
        if roles["generator"][0] == name and "generator" not in held:
            held.append("generator")
        specs[name] = [
            WorkerSpec(
                recipe, name, tuple(held), rank, group.devices, group.threads, distributed=True, failures=failures,
                learns=any(choice.key in online for choice in hosted_rewards(recipe, held)),
            )
            for rank in range(group.devices)
        ]  # fmt: skip
    return specs


def _actor_environment(spec: WorkerSpec) -> dict[str, str]:
    """Environment of an actor's process, set before it imports torch."""
    names = ("HF_HUB_OFFLINE", "HF_HOME", "DS_ACCELERATOR", *consent.VARIABLES.values())
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment["RLHF_T2I_PROCESS"] = f"{spec.group}/{spec.rank}"  # `ps e` shows it
    if spec.threads is not None:
        environment["OMP_NUM_THREADS"] = str(spec.threads)
    if spec.neighbors > 1:  # threads that spin while they wait take the cores of the other processes
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return environment
