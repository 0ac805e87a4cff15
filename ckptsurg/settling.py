"""Which cause the evidence settles. One that it does not settle is None, never a guess."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .report import Difference
from .selectors import module_and_leaf
from .traits import FEW_ULPS, SCATTERED, Traits

__all__ = ["Evidence", "moving_buffer", "reparametrised_as", "with_causes"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of tensors that moved.

    Attributes:
        names: All names of the manifest.
        given: What the other side calls its tensors, wrappers aside.
        ranks: Number of dimensions of each frozen floating-point tensor.
        saved: Whether the other side was saved, so that what it lacks was left out.
        witnessed: Causes that were seen while the model trained, by name; None where nobody watched.
        traits: How each tensor changed, where a baseline shows it.
        twins: Frozen tensors that were equal to a trainable one before, and are so after.
        recognised: Whether any tensor of the manifest is there.
        uniform: Frozen vectors that held, and are one value all over: an average of it may well be that value.
        standing: Counters of norm layers that have counted, and not gone on: no forward pass moved their statistics.
    """

    names: Collection[str]
    given: Collection[str]
    ranks: Mapping[str, int]
    saved: bool = True
    witnessed: Mapping[str, str] | None = None
    traits: Mapping[str, Traits] = field(default_factory=dict)
    twins: Collection[str] = ()
    recognised: bool = True
    uniform: Collection[str] = ()
    standing: Collection[str] = ()


def with_causes(drifted: Sequence[Difference], evidence: Evidence) -> list[Difference]:
    """The differences with their causes, where the evidence settles them.

    Args:
        drifted: Every frozen tensor that is not what it should be.
        evidence: What is known of them.
    """
    if not drifted:
        return []
    settle = _Settling(drifted, evidence)
    return [difference.model_copy(update={"cause": settle.cause(difference)}) for difference in drifted]


#: Fewer elements may go one way by chance.
_LEAST_CHANGED = 16
#: One element alone may be on a grid by chance.
_LEAST_COARSE = 2
#: One matrix alone may be anything; adapters sit on several.
_LEAST_MERGED = 2


class _Settling:
    """Names causes in the light of everything that moved."""

    def __init__(self, drifted: Sequence[Difference], evidence: Evidence) -> None:
        self._evidence = evidence
        # A dict, for it has the order of a list, and a tensor is found in it at once.
        self._moved = dict.fromkeys(one.name for one in drifted if one.verdict not in ("missing", "dtype_only"))
        self._missing = {one.name for one in drifted if one.verdict == "missing"}
        kinds = {name: moving_buffer(name, evidence.names) for name in self._moved}
        # Optimizers, casts and averages do not single buffers out: where nothing else moved, the forward pass did it.
        self._buffers = kinds if all(kinds.values()) else {}
        if evidence.witnessed is not None:  # whoever watched knows better, but for a layer that trained in passing
            self._buffers = {name: kind for name, kind in kinds.items() if kind and _counter_name(name) in self._moved}

    def cause(self, difference: Difference) -> str | None:
        name, evidence = difference.name, self._evidence
        match difference.verdict:
            case "missing":
                return self._why_missing(name)
            case "sign_of_zero" | "nan_payload" | "dtype_only":
                return difference.verdict
            case "dtype" | "changed":
                traits = evidence.traits.get(name)
                if traits is not None and traits.cast_to is not None:
                    return "dtype_only"
                if difference.verdict == "dtype":
                    return None
                cause = (evidence.witnessed or {}).get(name) or self._why_changed(name, traits)
                if cause == "batchnorm_stats" and self._did_not_count(name):
                    return None
                if cause == "embedding_max_norm" and traits is not None and traits.rose:
                    return None
                return cause
        return None

    def _why_missing(self, name: str) -> str | None:
        evidence = self._evidence
        if reparametrised_as(name, evidence.given) is not None:
            return "reparametrised"
        # Where nothing is there, names differ, or it is another model: that is no omission.
        return "not_saved" if evidence.recognised and evidence.saved else None

    def _why_changed(self, name: str, traits: Traits | None) -> str | None:
        if name in self._evidence.twins:
            return "tied"
        if (buffer := self._buffers.get(name)) is not None:
            return buffer
        if traits is None:
            return None
        if self._counted_on(name):
            return "batchnorm_stats"
        if self._decayed(traits):
            return "weight_decay"
        if self._averaged:
            return "ema_rounding"
        return "merge_roundtrip" if self._merged else None

    def _counter(self, name: str) -> Traits | None:
        """How the counter of a running statistic changed; None if it did not, or that is not known."""
        return self._evidence.traits.get(_counter_name(name)) if _counts(name) else None

    def _counted_on(self, name: str) -> bool:
        """Whether the counter has gone up, as only a forward pass makes it; and the model is no retrained one."""
        counter = self._counter(name)
        return counter is not None and counter.grew and self._are_akin

    def _did_not_count(self, name: str) -> bool:
        """Whether the counter stood still, or went back: it was reset, or something else was loaded."""
        counter = self._counter(name)
        return _counter_name(name) in self._evidence.standing or (counter is not None and not counter.grew)

    def _decayed(self, traits: Traits) -> bool:
        """Whether a tensor shrank by one ratio, and by no other one than the rest."""
        # Equal values shrink by one ratio whatever moves them, so others have to bear witness.
        return bool(self._shrunk) and (
            traits.shrank_by_one_ratio or any(traits.shrank_like(one) for one in self._shrunk)
        )

    @cached_property
    def _shrunk(self) -> Sequence[Traits]:
        """What shrank by one ratio each, if all by about as much; of equal ratios, one."""
        alike = [one for one in self._evidence.traits.values() if one.shrank_by_one_ratio]
        if not all(one.shrank_as_much(alike[0]) for one in alike):
            return ()
        return list({(one.ratios, one.epsilon): one for one in alike}.values())

    @cached_property
    def _are_akin(self) -> bool:
        """Whether all matrices that moved still point where they did."""
        return all(one.is_akin for one in self._traits(lambda rank: rank >= 2))

    @cached_property
    def _averaged(self) -> bool:
        """Whether everything moved as in a moving average of values that stand still."""
        traits = self._traits()
        if not traits or not all(one.is_rounding_of_products for one in traits):
            return False
        changed, elements = sum(one.changed for one in traits), sum(one.elements for one in traits)
        if not _LEAST_CHANGED <= changed < SCATTERED * elements:
            return False
        if all(one.is_rounding_of_factor for one in traits):
            return False
        shrank, rose = any(one.shrank for one in traits), any(one.rose for one in traits)
        one_way = not (shrank and rose) or all(one.ulps <= FEW_ULPS for one in traits)
        everywhere = not self._some_held(lambda rank: rank >= 2) and (
            self._traits(lambda rank: rank == 1) or not self._some_held(lambda rank: rank == 1, telling=True)
        )
        return one_way and bool(everywhere)

    @cached_property
    def _merged(self) -> bool:
        """Whether some matrices, and nothing but matrices, moved as rounding makes them that adds and takes away."""
        traits = self._traits()
        return (
            len(traits) >= _LEAST_MERGED
            and all(one.is_rounding_of_sums for one in traits)
            and sum(one.coarse for one in traits) >= _LEAST_COARSE
            and not self._traits(lambda rank: rank == 1)
            and self._some_held(lambda rank: rank == 1)
        )

    def _traits(self, law: Callable[[int], bool] = lambda rank: True) -> list[Traits]:
        """Of the frozen tensors with fractions that moved, those of some ranks; none if one of them is not known."""
        ranks, known = self._evidence.ranks, self._evidence.traits
        names = [name for name in self._moved if name in ranks and law(ranks[name])]
        return [known[name] for name in names] if all(name in known for name in names) else []

    def _some_held(self, law: Callable[[int], bool], *, telling: bool = False) -> bool:
        """Whether a tensor of some ranks held; ``telling``: one that is not one value all over, as a new norm is."""
        gone = {*self._moved, *self._missing, *(self._evidence.uniform if telling else ())}
        return any(law(rank) and name not in gone for name, rank in self._evidence.ranks.items())


def _counts(name: str) -> bool:
    """Whether a tensor is a statistic of a layer that counts its batches, as PyTorch's do."""
    return module_and_leaf(name)[1] in _STATISTICS["running_mean"]


def _counter_name(name: str) -> str:
    """What counts the batches of the norm layer that has a tensor."""
    module, separator, _ = name.rpartition(".")
    return f"{module}{separator}num_batches_tracked"


#: What a norm layer writes in training, beside the mean that it has in any case: of PyTorch, and of Keras.
_STATISTICS = {
    "running_mean": frozenset(("running_mean", "running_var", "num_batches_tracked")),
    "moving_mean": frozenset(("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")),
}
_OBSERVED = frozenset(
    (
        *("min_val", "max_val", "min_vals", "max_vals", "histogram", "scale", "zero_point"),
        *("fake_quant_enabled", "observer_enabled"),
    )
)
#: DeepSeek-V3 and its kin; Megatron-LM.
_ROUTER_BIASES = frozenset(("e_score_correction_bias", "expert_bias", "expert_biases"))


def moving_buffer(name: str, names: Collection[str]) -> str | None:
    """What writes to a buffer in the forward pass, told by its name and its siblings; None for other tensors.

    Args:
        name: Of a tensor.
        names: Of all tensors of its model.
    """
    start, leaf = module_and_leaf(name)
    if any(leaf in leaves and start + mean in names for mean, leaves in _STATISTICS.items()):
        return "batchnorm_stats"
    if leaf == "vector_u":  # of Keras
        return "spectral_norm"
    if leaf in ("_u", "_v") and f"{start.removesuffix('0.')}original" in names:
        return "spectral_norm"
    if leaf.endswith(("_u", "_v")) and f"{start}{leaf[:-2]}_orig" in names:
        return "spectral_norm"
    if leaf in _OBSERVED and any(f"{start}{sibling}" in names for sibling in ("min_val", "fake_quant_enabled")):
        return "observer"
    if "amax" in leaf and "history" in leaf:
        return "observer"
    return "router_bias" if leaf in _ROUTER_BIASES else None


def reparametrised_as(name: str, given: Collection[str]) -> str | None:
    """The name under which a reparametrisation keeps a tensor; None where there is none.

    ``torch.nn.utils.parametrize`` moves ``weight`` to ``parametrizations.weight.original``; the older hooks and
    pruning to ``weight_orig``, weight norm to ``weight_g`` and ``weight_v``.
    """
    module, separator, leaf = name.rpartition(".")
    start = module + separator
    candidates = [f"parametrizations.{leaf}.original", f"parametrizations.{leaf}.original0", f"{leaf}_orig"]
    if f"{start}{leaf}_g" in given:
        candidates.append(f"{leaf}_v")
    return next((start + candidate for candidate in candidates if start + candidate in given), None)
