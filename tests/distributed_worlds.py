"""What the processes of a group do, and what each of them sees: evidence for ``test_distributed``."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import ckptsurg

RANKS = 2
STEPS = 20


class Net(nn.Module):
    """Dimensions that two processes share unevenly, and a layer with fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.body = nn.Sequential(
            nn.Linear(5, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Linear(7, 5, bias=False), nn.LayerNorm(5)
        )
        self.one = nn.Linear(5, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.body(self.embed(tokens).mean(1))
        return self.head(torch.cat((hidden, self.one(hidden)), 1))


TRAINED = {"body.3.weight", "head.weight", "head.bias"}
FREEZES = {
    "base": ["**", *(f"!{name}" for name in sorted(TRAINED))],
    "rows": ["**", "!head", {"match": "embed.weight", "rows": "[2:8]"}],
}


def publish(folder: Path) -> None:
    """The checkpoint that every process loads, and its manifests."""
    torch.manual_seed(0)
    save_file(Net().state_dict(), folder / "base.safetensors")
    for name, patterns in FREEZES.items():
        manifest = ckptsurg.make_manifest(patterns, folder / "base.safetensors")
        ckptsurg.write_manifest(manifest, folder / f"{name}.freeze.json")


# --- Processes --------------------------------------------------------------------------------------


def run(ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in so many processes. An exception in one ends all, and is raised here."""
    torch.multiprocessing.spawn(_run_rank, (function, arguments), nprocs=ranks)


def _run_rank(rank: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    function(rank, *arguments)
    # Interpreters that tear themselves down abort now and then ("terminate called without an active exception"):
    # a mesh or a sharded model may hold gloo's group, with a thread that nobody joins, longer than the registry does.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


Scene = Callable[[int, Path], dict[str, Any]]
SCENES: dict[str, Scene] = {}


def scene(function: Scene) -> Scene:
    SCENES[function.__name__] = function
    return function


def play(rank: int, folder: Path) -> None:
    """Play all scenes. A scene that fails leaves its traceback, so that the others are seen."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=30),
    )
    seen: dict[str, dict[str, Any] | str] = {}
    for name, function in SCENES.items():
        torch.manual_seed(rank)
        try:
            seen[name] = function(rank, folder)
        except Exception:
            seen[name] = traceback.format_exc(limit=-6)
        (folder / f"seen.{rank}").write_bytes(pickle.dumps(seen))
        dist.barrier()
    dist.destroy_process_group()


def loaded(folder: Path) -> Net:
    net = Net()
    net.load_state_dict(load_file(folder / "base.safetensors"))
    return net


def adamw(frozen: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(frozen.trainable_parameters(), lr=0.05, weight_decay=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, number: int, deed: Any = None) -> None:
    """A step as a trainer takes it, on data of this process's own; ``deed`` is done between backward and step."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    tokens = torch.randint(11, (6, 4), generator=generator)
    labels = torch.randint(3, (6,), generator=generator)
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens), labels).backward()
    if deed is not None:
        with torch.no_grad():
            deed()
    optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int = STEPS) -> None:
    for number in range(1, steps + 1):
        step(model, optimizer, rank, number)


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in state.items()}


def caught(
    frozen: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    deed: Any,
    *,
    at: int = 3,
    steps: int = 3,
) -> dict[str, Any]:
    """What the guard says of a deed at one of the steps: at which step, in what words, with which causes."""
    guard = frozen.guard(optimizer)
    number = 0
    try:
        for number in range(1, steps + 1):
            step(model, optimizer, rank, number, deed if number == at else None)
    except ckptsurg.FrozenWeightsChanged as error:
        return {"step": number, "message": str(error), "causes": error.causes, "ranks": error.ranks}
    finally:
        guard.remove()
    return {"step": None, "message": "", "causes": {}, "ranks": {}}


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in {"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def error_of(kind: type[Exception], into: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        into["message"] = str(error)


# --- DistributedDataParallel ------------------------------------------------------------------------


@scene
def ddp(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = DistributedDataParallel(net)
    optimizer = adamw(frozen)
    with frozen.guard(optimizer, every=1, expect_trained=True) as guard:
        train(model, optimizer, rank)
    by_wrapped_names = ckptsurg.verify(folder / "base.freeze.json", model)
    return {
        "bits": bits(net.state_dict()),
        "steps": guard.steps,
        "ok": frozen.verify().ok and by_wrapped_names.ok,
        "saved": frozen.verify_saved(model.state_dict()).ok,
        "verified": by_wrapped_names.verified,
        "kept": frozen.kept_in_evaluation,
    }


@scene
def sync_batch_norm(rank: int, folder: Path) -> dict[str, Any]:
    """DistributedDataParallel takes SyncBatchNorm on a GPU alone; in training mode the layer itself refuses others."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(loaded(folder))
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    optimizer = adamw(frozen)
    with frozen.guard(optimizer, every=1):
        train(net, optimizer, rank, 3)
    return {"bits": bits(net.state_dict()), "kind": type(net.body[1]).__name__, "kept": frozen.kept_in_evaluation}


@scene
def ddp_saboteur(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = DistributedDataParallel(net)

    def deed() -> None:
        if rank == 1:
            net.body[0].weight.data[6, 4] += 2.0**-20

    return caught(frozen, model, adamw(frozen), rank, deed)


@scene
def ddp_saboteur_at_the_end(rank: int, folder: Path) -> dict[str, Any]:
    """Nobody reads frozen tensors before the end."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = DistributedDataParallel(net)
    optimizer = adamw(frozen)
    seen: dict[str, Any] = {}
    with error_of(ckptsurg.FrozenWeightsChanged, seen), frozen.guard(optimizer, every=None):
        train(model, optimizer, rank, 3)
        net.body[1].running_mean[3] += rank
    return seen | {"report": frozen.verify().model_dump(mode="json")}


@scene
def ddp_thawed(rank: int, folder: Path) -> dict[str, Any]:
    """On one rank alone."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = DistributedDataParallel(net)
    return caught(frozen, model, adamw(frozen), rank, lambda: net.body[0].weight.requires_grad_(rank == 1))


@scene
def ddp_refused(rank: int, folder: Path) -> dict[str, Any]:
    """One rank has not loaded a tensor, or has moved it while it was watched."""
    seen: dict[str, Any] = {"freeze": {}, "watch": {}, "watched": {}}
    net = loaded(folder)
    with error_of(ckptsurg.FrozenWeightsChanged, seen["watched"]):
        with ckptsurg.watch(net, manifest=folder / "base.freeze.json") as watching, torch.no_grad():
            net.one.weight[0, 2] += rank
        seen["watched"]["ok"] = watching.report.ok
    with error_of(ckptsurg.FreezeError, seen["freeze"]):
        ckptsurg.freeze(net, folder / "base.freeze.json")
    with error_of(ckptsurg.FreezeError, seen["watch"]):
        ckptsurg.watch(net, manifest=folder / "base.freeze.json").__enter__()
    return seen


@scene
def ddp_rows(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "rows.freeze.json")
    model = DistributedDataParallel(net)
    optimizer = adamw(frozen)
    gradients = []
    with frozen.guard(optimizer, every=1, expect_trained=True):
        for number in range(1, 6):
            step(model, optimizer, rank, number)
            gradients.append(net.embed.weight.grad[2:8].abs().max().item())
    return {"bits": bits(net.state_dict()), "gradients": gradients}


# --- fully_shard ------------------------------------------------------------------------------------


def sharded(net: Net) -> Net:
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (net.embed, net.body[0], net.body[3], net.one):
        fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """On rank 0 the whole state dict, as it is saved; elsewhere nothing."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@scene
def fsdp2(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = sharded(net)
    moved_by_sharding = frozen.moved()
    optimizer = adamw(frozen)
    with frozen.guard(optimizer, every=1, expect_trained=True) as guard:
        train(model, optimizer, rank)
    report = frozen.verify()
    state = whole_state(model)
    if rank == 0:
        save_file(state, folder / "fsdp2.safetensors")
    return {
        "moved_by_sharding": moved_by_sharding,
        "steps": guard.steps,
        "ok": report.ok and ckptsurg.verify(folder / "base.freeze.json", model).ok,
        "verified": report.verified,
        "names": [name for name, _ in frozen.frozen_tensors()],
        "local": {name: list(one.to_local().shape) for name, one in model.named_parameters()},
        "bits": bits(state),
        "saved": frozen.verify_saved(model.state_dict()).ok,
        "statistics": bits(dict(net.named_buffers())),
        "kept": frozen.kept_in_evaluation,
    }


@scene
def fsdp2_saboteur(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = sharded(net)

    def deed() -> None:
        if rank == 1:
            net.body[0].weight.to_local()[-1, -1] += 2.0**-20

    return caught(frozen, model, adamw(frozen), rank, deed)


@scene
def fsdp2_saboteurs(rank: int, folder: Path) -> dict[str, Any]:
    """Each rank moves its part of one tensor, and besides a tensor of which one has all."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = sharded(net)

    def deed() -> None:
        net.embed.weight.to_local()[0, 0] += 2.0**-20
        net.one.weight.to_local()[:, 0] += 2.0**-20

    seen = caught(frozen, model, adamw(frozen), rank, deed)
    report = frozen.verify(folder / "base.safetensors")
    state = whole_state(model)
    return seen | {
        "report": report.model_dump_json(),
        "sharded": frozen.verify_saved(model.state_dict()).summary(),
        "gathered": frozen.verify_saved(state).summary() if rank == 0 else "",
    }


@scene
def fsdp2_saboteur_while_nobody_watches(rank: int, folder: Path) -> dict[str, Any]:
    """What was frozen as a whole was sharded, and moved before anybody looked at the parts."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    sharded(net)
    with torch.no_grad():
        if rank == 1:
            net.body[0].weight.to_local()[-1, -1] += 2.0**-20
    before = frozen.verify().summary()
    frozen.guard(adamw(frozen)).remove()
    return {"before": before, "after": frozen.verify().summary()}


@scene
def fsdp2_frozen_after_sharding_and_moved(rank: int, folder: Path) -> dict[str, Any]:
    """The parts are known since the freeze; a manifest that they do not fit is refused."""
    net = sharded(loaded(folder))
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    with torch.no_grad():
        if rank == 1:
            net.body[0].weight.to_local()[-1, -1] += 2.0**-20
    seen = {"moved": frozen.moved(), "summary": frozen.verify().summary()}
    frozen.release()
    with error_of(ckptsurg.FreezeError, seen):
        ckptsurg.freeze(net, folder / "base.freeze.json")
    return seen


@scene
def fsdp2_replicas(rank: int, folder: Path) -> dict[str, Any]:
    """Two replicas of one shard each: one of them moves, and proves it alone."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(net, mesh=mesh)

    def deed() -> None:
        if rank == 1:
            net.body[0].weight.to_local()[-1, -1] += 2.0**-20

    return caught(frozen, model, adamw(frozen), rank, deed) | {"verified": str(frozen.verify())}


@scene
def fsdp2_cost(rank: int, folder: Path) -> dict[str, Any]:
    """What looking at frozen tensors after a step asks of the other processes, and of the host."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    sharded(net)
    with CommDebugMode() as alone, Reads() as once:
        frozen.guard(adamw(frozen)).remove()
        frozen.guard(adamw(frozen)).remove()
    with CommDebugMode() as together, Reads() as every:
        moved = frozen.moved()
    return {
        "moved": moved,
        "at_the_beginning": (alone.get_total_counts(), once.names.count("tolist")),
        "after_a_step": (together.get_total_counts(), every.names.count("tolist")),
    }


@scene
def fsdp2_saboteur_of_the_row_that_one_process_has(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = sharded(net)

    def deed() -> None:
        if net.one.weight.to_local().numel():
            net.one.weight.to_local()[0, 0] += 2.0**-20

    return caught(frozen, model, adamw(frozen), rank, deed)


@scene
def fsdp2_saboteur_of_a_buffer(rank: int, folder: Path) -> dict[str, Any]:
    """Buffers are not sharded: each process has its own, and no other one knows of it."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = sharded(net)

    def deed() -> None:
        if rank == 1:
            net.body[1].running_mean[3] += 2.0**-20

    return caught(frozen, model, adamw(frozen), rank, deed)


@scene
def fsdp2_reenabled(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = sharded(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    return caught(frozen, model, optimizer, rank, lambda: net.body[0].weight.requires_grad_(True))


@scene
def fsdp2_stale_optimizer(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    optimizer = adamw(frozen)
    model = sharded(net)
    return caught(frozen, model, optimizer, rank, None)


@scene
def fsdp2_rows(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "rows.freeze.json")
    model = sharded(net)
    moved_by_sharding = frozen.moved()
    gradients = []
    optimizers = [
        adamw(frozen),
        torch.optim.SGD(frozen.trainable_parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
    ]
    for optimizer in optimizers:
        with frozen.guard(optimizer, every=1, expect_trained=True):
            for number in range(1, 6):
                step(model, optimizer, rank, number)
                gradients.append(net.embed.weight.grad.full_tensor()[2:8].abs().max().item())
    return {
        "moved_by_sharding": moved_by_sharding,
        "local": list(net.embed.weight.to_local().shape),
        "bits": bits(whole_state(model)),
        "gradients": gradients,
        "ok": frozen.verify().ok,
    }


@scene
def fsdp2_rows_saboteur(rank: int, folder: Path) -> dict[str, Any]:
    """A frozen row is written between steps, where nothing puts it back."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "rows.freeze.json")
    model = sharded(net)

    def deed() -> None:
        if rank == 1:
            net.embed.weight.to_local()[1, 0] += 2.0**-20  # row 7 of the whole

    return caught(frozen, model, adamw(frozen), rank, deed)


@scene
def fsdp2_frozen_after_sharding(rank: int, folder: Path) -> dict[str, Any]:
    """The other order: the manifest is compared with shards, and holds for them."""
    model = sharded(loaded(folder))
    frozen = ckptsurg.freeze(model, folder / "base.freeze.json")
    optimizer = adamw(frozen)
    with frozen.guard(optimizer, every=1):
        train(model, optimizer, rank, 5)
    return {"bits": bits(whole_state(model))}


# --- FullyShardedDataParallel -----------------------------------------------------------------------


def flattened(net: Net) -> FullyShardedDataParallel:
    """Two units, the body and all around it, in each of which some parameters train."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "body has both parameters with requires_grad=True and False"
        )  # it costs memory
        return FullyShardedDataParallel(
            net,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
        )


@scene
def fsdp1(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = flattened(net)
    frozen.attach(model)
    moved_by_sharding = frozen.moved()
    optimizer = adamw(frozen)
    with frozen.guard(optimizer, every=1, expect_trained=True) as guard:
        train(model, optimizer, rank)
    report = frozen.verify()
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        state = {name.replace("_fsdp_wrapped_module.", ""): one.clone() for name, one in model.state_dict().items()}
    return {
        "moved_by_sharding": moved_by_sharding,
        "steps": guard.steps,
        "ok": report.ok,
        "verified": report.verified,
        "bits": bits(state),
        "kept": frozen.kept_in_evaluation,
    }


@scene
def fsdp1_without_attach(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    flattened(net)
    seen: dict[str, Any] = {"verify": {}, "moved": {}}
    with error_of(ckptsurg.FreezeError, seen["verify"]):
        frozen.verify()
    with error_of(ckptsurg.FreezeError, seen["moved"]):
        frozen.moved()
    return seen


@scene
def fsdp1_attached_to_another(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    seen: dict[str, Any] = {}
    with error_of(ckptsurg.UsageError, seen):
        frozen.attach(flattened(loaded(folder)))
    return seen


@scene
def fsdp1_rows(rank: int, folder: Path) -> dict[str, Any]:
    """A process has a piece of a flat parameter, which knows no rows."""
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "rows.freeze.json")
    model = flattened(net)
    seen: dict[str, Any] = {"message": ""}
    with error_of(ckptsurg.FreezeError, seen):
        frozen.attach(model)
        train(model, adamw(frozen), rank, 1)
    return seen


@scene
def fsdp1_saboteur(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = flattened(net)
    frozen.attach(model)

    def deed() -> None:
        """What a name of the model has now is this process's piece of a flat parameter."""
        piece = next(
            one for name, one in model.named_parameters() if name.endswith("body._fsdp_wrapped_module.0.weight")
        )
        if rank == 0:
            piece.view(-1)[0] += 2.0**-20

    return caught(frozen, model, adamw(frozen), rank, deed)


@scene
def fsdp1_saboteur_of_a_buffer(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = flattened(net)
    frozen.attach(model)

    def deed() -> None:
        if rank == 1:
            dict(model.named_buffers())["_fsdp_wrapped_module.body._fsdp_wrapped_module.1.running_mean"][3] += 2.0**-20

    return caught(frozen, model, adamw(frozen), rank, deed)


@scene
def fsdp1_reenabled(rank: int, folder: Path) -> dict[str, Any]:
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = flattened(net)
    frozen.attach(model)

    def deed() -> None:
        for name, one in model.named_parameters():
            if name.endswith("0.weight"):
                one.requires_grad_(True)

    return caught(frozen, model, adamw(frozen), rank, deed)


# --- Jobs of a launcher -----------------------------------------------------------------------------


def job(wrapped: str, folder: Path) -> None:
    """Train under a guard, as a script that torchrun starts; one rank moves what it alone has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    net = loaded(folder)
    frozen = ckptsurg.freeze(net, folder / "base.freeze.json")
    model = DistributedDataParallel(net) if wrapped == "ddp" else sharded(net)
    optimizer = adamw(frozen)

    def deed() -> None:
        if rank == 1:
            net.body[1].running_mean[3] += 2.0**-20

    with frozen.guard(optimizer):
        for number in range(1, STEPS + 1):
            step(model, optimizer, rank, number, deed if number == 3 else None)
    (folder / f"finished.{wrapped}.{rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    job(sys.argv[1], Path(sys.argv[2]))
