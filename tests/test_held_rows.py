"""Rows that are frozen stand still in training, bit by bit, while the rest of their tensor trains."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptsurg

STEPS = 20


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


# --- Training ---------------------------------------------------------------------------------------

WORDS, HELD, WIDTH = 12, 8, 4
ROWS = {"match": "{embed,head}.weight", "rows": f"[:{HELD}]"}


class Language(nn.Module):
    """Words in, words out; the head may be the embedding."""

    def __init__(self, *, tied: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, sparse=sparse)
        self.head = nn.Linear(WIDTH, WORDS)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(words))


def _language(**options: bool) -> Language:
    torch.manual_seed(0)
    return Language(**options)


def _loss(model: nn.Module, seed: int) -> torch.Tensor:
    """Every word stands in every batch."""
    words = torch.arange(WORDS)
    return nn.functional.cross_entropy(model(words), words.roll(seed % WORDS))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    model.train()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(model, seed)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def _held(model: nn.Module, names: tuple[str, ...] = ("embed", "head")) -> dict[str, bytes]:
    return {name: _bytes(getattr(model, name).weight[:HELD]) for name in names}


def _unmoved(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Free rows, row by row, that have the bits that they had."""
    return [
        f"{name}[{row}]"
        for name in ("embed.weight", "head.weight")
        for row in range(HELD, WORDS)
        if _bytes(model.state_dict()[name][row]) == _bytes(before[name][row])
    ]


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, **SGD, foreach=False),
    "SGD-nesterov-foreach": lambda p: torch.optim.SGD(p, **SGD, nesterov=True, foreach=True),
    "SGD-fused": lambda p: torch.optim.SGD(p, **SGD, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, foreach=False),
    "Adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True, foreach=True),
    "Adam-fused": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=False),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1, centered=True),
    "RMSprop-foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, foreach=False),
    "Adagrad-foreach": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, foreach=True),
    "Adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "LBFGS-wolfe": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize(
    ("tied", "guarded"), [(False, False), (False, True), (True, True)], ids=["unguarded", "guarded", "guarded-tied"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_stand_still_under_every_optimizer(name, tied, guarded):
    model = _language(tied=tied)
    manifest = ckptsurg.make_manifest([ROWS], model)
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, manifest)
    optimizer = OPTIMIZERS[name](frozen.trainable_parameters())
    watching = frozen.guard(optimizer, every=1, expect_trained=True) if guarded else None
    del frozen  # what it holds does not hang on it
    gc.collect()
    for step in range(STEPS):
        _step(model, optimizer, step)
        assert _held(model) == held, f"after step {step + 1}"
    assert _unmoved(model, before) == []
    if watching is not None:
        watching.remove()
    assert ckptsurg.verify(manifest, model, expect_trained=True).ok


# torch asks for a decision on the checks of its own sparse tensors.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SparseAdam(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
    ids=["SparseAdam", "Adagrad", "SGD"],
)
def test_rows_stand_still_under_sparse_gradients(make):
    model = _language(sparse=True)
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    sparse, dense = make([model.embed.weight]), torch.optim.AdamW(model.head.parameters(), lr=0.1)
    with frozen.guard(sparse), frozen.guard(dense):
        for step in range(STEPS):
            sparse.zero_grad()
            _step(model, dense, step)
            assert model.embed.weight.grad.layout is torch.sparse_coo
            sparse.step()
            assert _held(model) == held, f"after step {step + 1}"
    assert _unmoved(model, before) == []


def test_the_guard_of_freeze_is_not_needed():
    model = _language()
    held = _held(model)
    ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    gc.collect()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(STEPS):
        _step(model, optimizer, step)
        assert _held(model) == held


def test_momentum_from_before_the_freeze_moves_no_row():
    model = _language()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for step in range(3):
        _step(model, optimizer, step)
    held = _held(model)
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer.step()  # with gradients that were there before
    assert _held(model) == held
    with frozen.guard(optimizer):
        for step in range(5):
            _step(model, optimizer, step)
            assert _held(model) == held


def test_rows_of_a_wider_model_stand_still():
    model = _language().bfloat16()
    manifest = ckptsurg.make_manifest([ROWS], model)
    model.float()
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, manifest, allow_widened=True)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    with frozen.guard(optimizer):
        for step in range(3):
            _step(model, optimizer, step)
    assert _held(model) == held and _unmoved(model, before) == []
    assert {one.verdict for one in frozen.verify().drifted} == {"dtype_only"}


def test_rows_in_the_middle_of_a_bias_and_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(24, 2))
    before = copy.deepcopy(model.state_dict())
    ckptsurg.freeze(model, ckptsurg.make_manifest([{"match": "0", "rows": "[2:4]"}], model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 1, 4, 4)).pow(2).sum().backward()
        optimizer.step()
    for name in ("0.weight", "0.bias"):
        same = [_bytes(model.state_dict()[name][row]) == _bytes(before[name][row]) for row in range(6)]
        assert same == [False, False, True, True, False, False], name


def test_the_two_names_of_a_tied_tensor():
    """The checkpoint may hold both, with rows for both, or for one while the other trains; never all of one."""
    part = {"match": "embed.weight", "rows": f"[:{HELD}]"}
    for items in ([part], [{**part, "match": "head.weight"}], [part, {"match": "head.weight", "rows": "[:4]"}]):
        model = _language(tied=True)
        held = _held(model)
        ckptsurg.freeze(model, ckptsurg.make_manifest(items, model))
        _step(model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
        assert _held(model) == held
    model = _language(tied=True)
    with pytest.raises(ckptsurg.FreezeError, match=r'"head\.weight" is frozen and shares its storage'):
        ckptsurg.freeze(model, ckptsurg.make_manifest(["head.weight", part], model))


def _mask(model: Language) -> None:
    """What many scripts do: the gradient of frozen rows is zero."""
    keep = torch.ones(WORDS, 1)
    keep[:HELD] = 0
    for weight in (model.embed.weight, model.head.weight):
        weight.register_hook(lambda gradient: gradient * keep)


def test_a_mask_on_the_gradient_is_not_enough():
    model = _language()
    _mask(model)
    held = _held(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, ckptsurg.watch(model, [ROWS]) as watch:
        for step in range(3):
            _step(model, optimizer, step)
    assert _held(model) != held
    assert caught.value.causes == {"embed.weight": "weight_decay", "head.weight": "weight_decay"}
    for difference in watch.report.drifted:
        assert difference.detail.elements_changed == HELD * WIDTH and difference.detail.first_index == (0, 0)
    assert "weight_decay" in str(caught.value)


def test_a_mask_on_the_gradient_does_not_stop_momentum():
    model = _language()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _step(model, optimizer)
    _mask(model)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, ckptsurg.watch(model, [ROWS]):
        _step(model, optimizer)
    assert caught.value.causes == {"embed.weight": "zero_grad_not_none", "head.weight": "zero_grad_not_none"}


def test_rows_that_nobody_freezes_are_never_frozen():
    model = _language()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ckptsurg.FrozenWeightsChanged) as caught, ckptsurg.watch(model, [ROWS]):
        _step(model, optimizer)
    assert caught.value.causes == {"embed.weight": "never_frozen", "head.weight": "never_frozen"}


def test_a_mask_without_decay_and_momentum_is_honest():
    model = _language()
    _mask(model)
    before = copy.deepcopy(model.state_dict())
    with ckptsurg.watch(model, [ROWS], expect_trained=True) as watch:
        _step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert watch.report.ok and _unmoved(model, before) == []


def test_frozen_rows_have_no_part_in_clipping():
    frozen, twin = _language(), _language()
    ckptsurg.freeze(frozen, ckptsurg.make_manifest([ROWS], frozen))
    for model in (frozen, twin):
        for seed in range(2):  # accumulated
            _loss(model, seed).backward()
    for weight in (twin.embed.weight, twin.head.weight):
        assert weight.grad[:HELD].count_nonzero() > 0
        weight.grad[:HELD] = 0
    norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.01) for model in (frozen, twin)]
    assert _bytes(norms[0]) == _bytes(norms[1]) and norms[0] > 0.01
    for one, other in zip(frozen.parameters(), twin.parameters(), strict=True):
        assert _bytes(one.grad) == _bytes(other.grad)


def test_free_rows_train_as_if_nothing_were_frozen():
    """Adam steps every element by itself: the free rows get the very bits that they get without a freeze."""
    torch.manual_seed(0)
    frozen, free = nn.Embedding(6, 3), nn.Embedding(6, 3)
    free.load_state_dict(frozen.state_dict())
    ckptsurg.freeze(frozen, ckptsurg.make_manifest([{"match": "weight", "rows": "[:4]"}], frozen))
    for model in (frozen, free):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.arange(6)).pow(2).sum().backward()
            optimizer.step()
    assert _bytes(frozen.weight[4:]) == _bytes(free.weight[4:])
    assert _bytes(frozen.weight[:4]) != _bytes(free.weight[:4])


def test_release_lets_rows_train_again():
    model = _language()
    held, keys = _held(model), list(model.state_dict())
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _step(model, optimizer)
    assert _held(model) == held and list(model.state_dict()) == keys
    frozen.release()
    frozen.release()  # a second time does nothing
    _step(model, optimizer)
    assert all(now != held[name] for name, now in _held(model).items())
    assert model.embed.weight.grad[:HELD].count_nonzero() == HELD * WIDTH


def test_two_freezes_of_one_model_hold_both_parts():
    model = _language()
    first = ckptsurg.freeze(model, ckptsurg.make_manifest([{"match": "embed.weight", "rows": "[:4]"}], model))
    second = ckptsurg.freeze(model, ckptsurg.make_manifest([{"match": "embed.weight", "rows": "[2:6]"}], model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def moved() -> list[int]:
        before = model.embed.weight.detach().clone()
        _step(model, optimizer)
        return [row for row in range(WORDS) if _bytes(before[row]) != _bytes(model.embed.weight[row])]

    assert moved() == [*range(6, WORDS)]
    first.release()
    assert moved() == [0, 1, *range(6, WORDS)]
    second.release()
    assert moved() == [*range(WORDS)]


@pytest.mark.parametrize("together", [True, False], ids=["one optimizer", "two optimizers"])
def test_two_models(together):
    one, other = _language(), _language()
    freezes = [
        ckptsurg.freeze(one, ckptsurg.make_manifest([{"match": "embed.weight", "rows": "[:4]"}], one)),
        ckptsurg.freeze(other, ckptsurg.make_manifest([{"match": "embed.weight", "rows": "[4:]"}], other)),
    ]
    parameters = [list(one.parameters()), list(other.parameters())]
    groups = [[*parameters[0], *parameters[1]]] if together else parameters
    optimizers = [torch.optim.AdamW(group, lr=0.1, weight_decay=0.1) for group in groups]

    def moved() -> list[list[int]]:
        before = [model.embed.weight.detach().clone() for model in (one, other)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        (_loss(one, 1) + _loss(other, 1)).backward()
        for optimizer in optimizers:
            optimizer.step()
        pairs = zip(before, (one, other), strict=True)
        return [[r for r in range(WORDS) if _bytes(b[r]) != _bytes(m.embed.weight[r])] for b, m in pairs]

    assert moved() == [[*range(4, WORDS)], [*range(4)]]
    freezes[0].release()
    assert moved() == [[*range(WORDS)], [*range(4)]]


def test_a_model_that_is_gone_leaves_nothing_behind():
    from torch.optim import optimizer as internals

    def live_and_die() -> list[weakref.ref]:
        model = _language()
        frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
        optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
        with frozen.guard(optimizer):
            _step(model, optimizer)
        return [weakref.ref(one) for one in (model, frozen, optimizer, model.embed.weight)]

    live_and_die()
    hooks = [len(internals._global_optimizer_pre_hooks), len(internals._global_optimizer_post_hooks)]
    references = live_and_die() + live_and_die()
    gc.collect()
    assert [reference() for reference in references] == [None] * 8
    assert [len(internals._global_optimizer_pre_hooks), len(internals._global_optimizer_post_hooks)] == hooks
    other = _language()
    _step(other, torch.optim.SGD(other.parameters(), lr=0.1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_model_trains_all_of_its_rows(copied):
    model = _language()
    held = _held(model)
    ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    _step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    twin = copied(model)
    assert _held(twin) == held
    _step(twin, torch.optim.AdamW(twin.parameters(), lr=0.1))
    assert all(now != held[name] for name, now in _held(twin).items())
    assert twin.embed.weight.grad[:HELD].count_nonzero() > 0
    _step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert _held(model) == held


class Exploding(torch.optim.SGD):
    """Moves everything, then fails, when it is armed."""

    armed = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)
        if self.armed:
            raise KeyError("mine")


def test_an_exception_in_a_step_leaves_rows_that_can_be_put_back():
    model = _language()
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = Exploding(model.parameters(), lr=0.1)
    optimizer.armed = True
    with pytest.raises(KeyError, match="mine"), frozen.guard(optimizer):
        optimizer.step()
    assert _unmoved(model, before) == []
    assert frozen.verify().ok == (_held(model) == held), "whatever a failed step leaves, a proof tells the truth"
    optimizer.armed = False
    optimizer.step()
    assert _held(model) == held and frozen.verify().ok


def test_a_write_after_a_step_that_failed_is_found_and_not_healed():
    """What a failed step left aside is put back once, and not held against all later writes."""
    model = _language()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = Exploding(model.parameters(), lr=0.1)
    optimizer.armed = True
    with pytest.raises(KeyError, match="mine"):
        optimizer.step()
    optimizer.armed = False
    optimizer.step()
    assert frozen.verify().ok
    guard = frozen.guard(optimizer)
    model.embed.weight.data[0] += 1
    spoilt = _held(model)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"after step 1, 1 frozen tensor changed:\n  embed\.weight"):
        optimizer.step()
    guard.remove()
    assert _held(model) == spoilt


def test_what_is_repaired_after_an_alarm_stays_repaired():
    model = _language()
    held = _held(model)
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    published = copy.deepcopy(model.state_dict())
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match="after step 1"), frozen.guard(optimizer):
        model.embed.weight.data[0] += 1
        _step(model, optimizer)
    model.load_state_dict(published)
    with frozen.guard(optimizer):
        for step in range(2):
            _step(model, optimizer, step)
            assert _held(model) == held


class DecaysAfterwards(torch.optim.SGD):
    """Does something of its own after the step that it inherits, as many optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer, and then pulls weights back, as Lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer, *, own: bool = False) -> None:
        self.inner = inner
        groups = [{"params": [nn.Parameter(torch.zeros(1))]}] if own else inner.param_groups
        super().__init__([dict(group) for group in groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: DecaysAfterwards(p, **SGD),
        lambda p: Wrapping(torch.optim.SGD(list(p), **SGD)),
        lambda p: Wrapping(torch.optim.SGD(list(p), **SGD), own=True),
    ],
    ids=["inherited", "wrapped", "wrapped, with groups of its own"],
)
@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_rows_stand_still_under_steps_within_steps(make, guarded):
    model = _language()
    torch.optim.SGD(model.parameters(), lr=0.1)  # the class that is inherited has its hooks by now
    held, before = _held(model), copy.deepcopy(model.state_dict())
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = make(model.parameters())
    watching = frozen.guard(optimizer) if guarded else None
    for step in range(3):
        _step(model, optimizer, step)
        assert _held(model) == held, f"after step {step + 1}"
    assert _unmoved(model, before) == []
    if watching is not None:
        watching.remove()


def test_a_write_to_a_frozen_row_is_found_at_the_next_step_and_not_healed():
    model = _language()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    guard = frozen.guard(optimizer, every=1)
    for step in range(3):
        _step(model, optimizer, step)
    model.embed.weight.data.view(torch.int32)[HELD - 1, 2] ^= 1
    spoilt = _held(model)
    with pytest.raises(ckptsurg.FrozenWeightsChanged, match=r"after step 4, 1 frozen tensor changed:\n  embed\.weight"):
        _step(model, optimizer)
    guard.remove()
    assert _held(model) == spoilt
    _step(model, optimizer)
    assert _held(model) == spoilt
    assert [one.name for one in frozen.verify().drifted] == ["embed.weight"]


def test_a_write_to_a_free_row_is_nobodys_business():
    model = _language()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1)
    with frozen.guard(optimizer):
        model.embed.weight.data[HELD:] = 7
        _step(model, optimizer)


def test_a_resized_model_is_held_by_the_rows_that_it_kept():
    """A model that grew after publication: the manifest's rows are there, with more of them below."""
    model = _language()
    manifest = ckptsurg.make_manifest([{"match": "embed.weight", "rows": f"[:{HELD}]"}], model)
    report = ckptsurg.verify(manifest, {**model.state_dict(), "embed.weight": torch.cat([model.embed.weight] * 2)})
    assert report.ok
    wider = nn.Embedding(2 * WORDS, WIDTH)
    wider.weight.data[:WORDS] = model.embed.weight.data
    model.embed = wider
    held = _held(model, ("embed",))
    with pytest.warns(UserWarning, match=rf"embed\.weight .*found F32 \[{2 * WORDS}, {WIDTH}\]\); where "):
        frozen = ckptsurg.freeze(model, manifest)
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1, weight_decay=0.1)
    with frozen.guard(optimizer):
        _step(model, optimizer)
    assert _held(model, ("embed",)) == held


def test_freeze_refuses_a_model_without_the_rows():
    model = _language()
    manifest = ckptsurg.make_manifest([ROWS], model)
    model.embed.weight.data[0, 0] += 1
    with pytest.raises(ckptsurg.FreezeError, match=r'"embed\.weight" has other bits'):
        ckptsurg.freeze(model, manifest)
    model = _language()
    model.head.weight.data[HELD:] += 1  # these train: an earlier run may have
    ckptsurg.freeze(model, manifest)


def test_what_is_saved_of_the_model_is_proven(tmp_path):
    model = _language()
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest([ROWS], model))
    _step(model, torch.optim.AdamW(frozen.trainable_parameters(), lr=0.1))
    assert frozen.verify_saved(model.state_dict()).ok
    save_file(model.state_dict(), tmp_path / "saved.safetensors")
    assert frozen.verify_saved(tmp_path / "saved.safetensors").ok
    spoilt = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoilt["embed.weight"][0, 0] += 1
    assert [one.name for one in frozen.verify_saved(spoilt).drifted] == ["embed.weight"]
