"""Random checkpoints, patterns and specs: realistic ones and odd ones, each a function of one ``random.Random``."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from hypothesis import strategies as st

from .oracle import BITS, DRAWABLE, Tensor, Wrong, fates, nbytes, select

#: The source of chance of a hypothesis test. A seed: a source that shrinks is too slow for this much of it.
chance = st.integers(0, 2**32 - 1).map(random.Random)


# --- Names ------------------------------------------------------------------------------------------


def _resnet(rng: random.Random) -> list[str]:
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{leaf}" for leaf in norm), "fc.weight", "fc.bias"]
    for stage in range(1, rng.randint(1, 3) + 1):
        for block in range(rng.randint(1, 3)):
            names += [f"layer{stage}.{block}.conv{n}.weight" for n in (1, 2)]
            names += [f"layer{stage}.{block}.bn1.{leaf}" for leaf in norm]
    return names


def _transformer(rng: random.Random) -> list[str]:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "score.weight"]
    for stack in rng.sample(["model", "encoder", "decoder"], rng.randint(1, 2)):
        numbers = list(range(rng.randint(1, 5)))
        if rng.random() < 0.3:
            numbers = sorted(rng.sample(range(12), rng.randint(1, 4)))
        for n in numbers:
            names += [f"{stack}.layers.{n}.self_attn.{p}_proj.weight" for p in "qv"]
            names += [f"{stack}.layers.{n}.norm.{leaf}" for leaf in ("weight", "bias")]
    return names


def _keras(rng: random.Random) -> list[str]:
    names = [f"layers/dense/vars/{n}" for n in range(2)] + [
        f"layers/dense_{n}/vars/0" for n in range(rng.randint(1, 4))
    ]
    return [*names, *(f"optimizer/{n}.m" for n in rng.sample(range(9), 3)), "top/dense.kernel"]


def _sequential(rng: random.Random) -> list[str]:
    return [f"{n}.{leaf}" for n in range(rng.randint(2, 12)) for leaf in ("weight", "bias")] + ["10", "head.3"]


def _odd(rng: random.Random) -> list[str]:
    names = ["fc", "fc.weight", "fc2.weight", "FC.weight", "a b.c", "a*b.c", "a?b", "!bang", "re:fc", "x[0].w", "x.0.w"]
    names += ["café.w", "cafe\u0301.w", "emoji.🙂", "a..b", ".lead", "trail.", "*", "**", "tab\there", "x{1,2}.w", "-1"]
    names += [
        "weight",
        "a/b.c",
        "a.b/c",
        "a.b.c",
        "мир.слой.0",
        "q" * 70,
        "l.0",
        "l.1.w",
        "layer1",
        "layer10.w",
        "__x__",
    ]
    return rng.sample(names, rng.randint(3, 14))


def names_of(rng: random.Random) -> list[str]:
    """Names of tensors, no two alike, in any order."""
    families = rng.sample([_resnet, _transformer, _keras, _sequential, _odd, _odd], rng.randint(1, 2))
    names = list(dict.fromkeys(name for family in families for name in family(rng)))
    rng.shuffle(names)
    return names[: rng.randint(3, 26)]


# --- Checkpoints ------------------------------------------------------------------------------------


def _tensor(rng: random.Random) -> Tensor:
    dtype = rng.choice([*BITS, *5 * ["F32"], *3 * ["BF16"], "F16", "F64"])
    if rng.random() < 0.12:
        shape = rng.choice([(12_288 + rng.randrange(3000) * 8,), (96, 128), (5000, 4), (16_384,)])
    else:
        shape = tuple(rng.choice([1, 2, 3, 4, 7, 8, 12]) for _ in range(rng.choice([0, 1, 1, 2, 2, 2, 3, 4])))
        if rng.random() < 0.06:
            shape = (*shape, 0)
    if BITS[dtype] < 8 and prod(shape) % 4:
        shape = (*shape, 4)
    return Tensor(dtype, shape, random.Random(rng.getrandbits(32)).randbytes(nbytes(dtype, shape)))


def tensors_of(rng: random.Random) -> dict[str, Tensor]:
    """Named tensors with random bits; some tied."""
    tensors = {name: _tensor(rng) for name in names_of(rng)}
    for name in tensors:
        if rng.random() < 0.08:
            twin = rng.choice(list(tensors.values()))
            tensors[name] = Tensor(twin.dtype, twin.shape, twin.data)
    return tensors


def write_file(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, rng: random.Random | None = None
) -> None:
    """Write a safetensors file by hand; with a source of chance, as oddly as the format allows."""
    order = list(tensors)
    if rng is not None:
        rng.shuffle(order)
    offsets, position = {}, 0
    for name in order:
        offsets[name] = [position, position := position + len(tensors[name].data)]
    listed = list(tensors)
    entries: dict = {} if metadata is None else {"__metadata__": metadata}
    for name in listed:
        tensor = tensors[name]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets[name]}
    if rng is not None and rng.random() < 0.3:
        entries = dict(reversed(entries.items()))
    header = json.dumps(entries, ensure_ascii=rng is not None and rng.random() < 0.5).encode()
    header += b" " * (-len(header) % 8 if rng is None or rng.random() < 0.5 else rng.randrange(12))
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(tensors[name].data for name in order))


def _metadata(rng: random.Random) -> dict[str, str] | None:
    given = {"format": "pt", "who": f"me {rng.randrange(3)}", "ünïcode": "→", "": "x" * rng.randrange(50)}
    return rng.choice([None, {}, {"format": "pt"}, dict(rng.sample(list(given.items()), 3))])


def write_checkpoint(rng: random.Random, home: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a checkpoint below a folder: one file, a folder of one, or 1 to 5 shards; answers the path to open."""
    tensors = tensors_of(rng) if tensors is None else tensors
    home.mkdir(parents=True, exist_ok=True)
    form = rng.choice(["file", "folder", "shards", "shards"])
    if form == "file":
        path = home / rng.choice(["model.safetensors", "w.safetensors", "a b.v1.safetensors"])
        write_file(path, tensors, _metadata(rng), rng)
        return path
    folder = home / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "odd",\n  "n": 1e3}')
    (folder / "tokenizer.txt").write_bytes(b"\x00\xff tokens")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    if form == "folder":
        write_file(folder / "model.safetensors", tensors, _metadata(rng), rng)
        return folder
    count = min(rng.randint(1, 5), len(tensors))
    stem = rng.choice(["model-{:05d}-of-" + f"{count:05d}", "part{}", "s p{}"])
    files = [stem.format(number + 1) + ".safetensors" for number in range(count)]
    homes = {name: files[position] if position < count else rng.choice(files) for position, name in enumerate(tensors)}
    for file in files:
        write_file(folder / file, {n: t for n, t in tensors.items() if homes[n] == file}, _metadata(rng), rng)
    total = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": rng.choice([total, total, 1]), "by": "hand"}, "weight_map": homes}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return rng.choice([folder, path])


# --- Patterns ---------------------------------------------------------------------------------------


def _slice(rng: random.Random) -> str:
    def bound() -> str:
        return str(rng.choice([0, 0, 1, 1, 2, 3, 5, -1, -1, -2, -3])) if rng.random() < 0.6 else ""

    form = rng.random()
    if form < 0.3:
        return f"[{bound() or 0}]"
    return f"[{bound()}:{bound()}{':' + rng.choice(['', '2', '-1', '3']) if form > 0.85 else ''}]"


def _glob(rng: random.Random, segment: str) -> str:
    if not segment or rng.random() < 0.4:
        return "*"
    at = rng.randrange(len(segment))
    return rng.choice([segment[:at] + "?" + segment[at + 1 :], segment[:at] + "*", "*" + segment[at:]])


KINDS = [
    *("name", "module", "glob", "globs", "deep", "deep", "braces", "braces", "range", "slice", "slice", "slice"),
    *("re", "typo"),
]


def pattern_of(rng: random.Random, names: list[str]) -> str:
    """One pattern without ``!``, derived from the names; most select something."""
    name = rng.choice(names)
    joints = re.findall(r"[./]", name)
    segments = re.split(r"[./]", name)
    at = rng.randrange(len(segments))
    kind = rng.choice(KINDS)
    if kind == "name":
        return name
    if kind == "re":
        return "re:" + rng.choice(
            [re.escape(name), re.escape(segments[0]) + ".*", r".*\.weight", f".*{re.escape(name[-1:])}"]
        )
    if kind == "typo":
        return rng.choice([name + "s", name.upper(), name[1:] or "z", name.replace(".", "_"), name + ".x"])
    if kind in ("glob", "globs"):
        for index in {at, rng.randrange(len(segments)) if kind == "globs" else at}:
            segments[index] = _glob(rng, segments[index])
    if kind == "deep":
        low, high = sorted(rng.choices(range(len(segments) + 1), k=2))
        segments[low:high] = ["**"]
        joints = ["."] * len(segments)
    if kind == "braces":
        others = [re.split(r"[./]", other) for other in rng.choices(names, k=rng.randint(1, 3))]
        choices = [segments[at], *(other[at] for other in others if len(other) > at)]
        segments[at] = "{" + ",".join(choices) + "}"
    if kind == "range":
        segments[0] = re.sub(r"\d+", lambda m: f"{{{rng.choice([0, int(m[0])])}..{int(m[0])}}}", segments[0], count=1)
        segments[at] = re.sub(r"^\d+$", f"{{0..{rng.choice([0, 1, 1, 2, 3])}}}", segments[at])
    if kind == "slice":
        numbered = [index for index, segment in enumerate(segments) if segment.isdecimal()]
        for index in rng.sample(numbered, min(len(numbered), 1)):
            if index and rng.random() < 0.5:
                segments[index - 1] = _glob(rng, segments[index - 1])
            segments[index] = _slice(rng)
    if kind in ("module", "slice", "glob", "braces", "range") and rng.random() < 0.7:
        segments = segments[: max(at, 1 + max((i for i, s in enumerate(segments) if s[:1] == "["), default=at))]
    text = segments[0] if segments else "**"
    for joint, segment in zip([*joints, *"." * len(segments)], segments[1:], strict=False):
        joint = rng.choice("./") if rng.random() < 0.1 else joint
        text += segment if segment[:1] == "[" else joint + segment
    return text or "**"


def item_of(rng: random.Random, base: dict[str, Tensor], bang: str = "") -> str | dict:
    """A pattern, or an object that says more."""
    names = list(base)
    item: dict = {"match": bang + pattern_of(rng, names)}
    if rng.random() < 0.7:
        return item["match"]
    if rng.random() < 0.6:
        like = base[rng.choice(names)]
        leaf = re.split(r"[./]", rng.choice(names))[-1] or "weight"
        where = {"dtype": like.dtype, "ndim": len(like.shape), "beside": leaf}
        item["where"] = {key: where[key] for key in rng.sample(list(where), rng.choice([1, 1, 2]))}
    if rng.random() < 0.3 and "[" not in item["match"]:
        item["optional"] = True
    elif rng.random() < 0.5:
        try:
            item["expect"] = len(select({**item, "match": item["match"].removeprefix("!")}, base)) or 1
        except Wrong:
            item["expect"] = 1
    return item


def selector_of(rng: random.Random, base: dict[str, Tensor]) -> str | dict | list:
    """One pattern, an object, or a list with ``!``."""
    if rng.random() < 0.4:
        return item_of(rng, base)
    first = "**" if rng.random() < 0.6 else item_of(rng, base)
    return [first, *(item_of(rng, base, rng.choice(["", "!", "!"])) for _ in range(rng.randint(0, 3)))]


# --- Specs ------------------------------------------------------------------------------------------


def _init(rng: random.Random) -> object:
    inits = ["zeros", "ones", "normal", "uniform", {"normal": {"std": 0.02}}, {"constant": {"val": 0.5}}]
    return "zeroes" if rng.random() < 0.03 else rng.choice([*inits, {"uniform": {"a": -0.5, "b": 0.5}}])


def _reinit(rng: random.Random, base: dict[str, Tensor]) -> dict:
    drawable = [name for name, tensor in base.items() if tensor.dtype in DRAWABLE]
    name = rng.choice(drawable or list(base))
    item = item_of(rng, base)
    rule = {"match": name} if rng.random() < 0.6 else item if isinstance(item, dict) else {"match": item}
    rank, rule = len(base[name].shape), {**rule, "init": _init(rng)}
    form = rng.random()
    if form < 0.4 and rank:
        dimensions = rng.sample(range(rank), rng.choice([1, 1, min(2, rank)]))
        sizes = [rng.choice([1, 3, 5, 10, 40]) for _ in dimensions]
        rule["shape"] = {
            str(d - rank if rng.random() < 0.3 else d): size for d, size in zip(dimensions, sizes, strict=True)
        }
        if rng.random() < 0.05:
            rule["shape"] = {str(rank): 3}
    elif form < 0.6:
        rule["shape"] = [rng.choice([0, 1, 4, 9, 80]) for _ in range(rank)]
    if rng.random() < 0.4:
        rule["keep"] = True
    if rng.random() < 0.3:
        rule["frozen"] = True
    return rule


def _add(rng: random.Random, base: dict[str, Tensor]) -> dict:
    name = rng.choice([*(f"new.{n}" for n in "abc"), "score.weight", rng.choice(list(base))])
    shape = [rng.choice([0, 1, 3, 8, 50]) for _ in range(rng.randint(0, 3))]
    dtype = rng.choice([*sorted(DRAWABLE), *sorted(DRAWABLE), "I64", "F4"])
    return {"name": name, "shape": shape, "dtype": dtype, "init": _init(rng)} | (
        {"frozen": True} if rng.random() < 0.3 else {}
    )


def _draft(rng: random.Random, base: dict[str, Tensor]) -> dict:
    spec: dict = {"version": 1}
    if rng.random() < 0.5:
        spec |= {"name": "a spec", "seed": rng.choice([0, 7, 2**63])}
    if rng.random() < 0.45:
        spec["drop"] = item_of(rng, base) if rng.random() < 0.6 else selector_of(rng, base)
    kind = rng.random()
    if kind < 0.1:
        part = pattern_of(rng, list(base))
        spec |= {"freeze": ["**", f"!{part}"], "train": part}
    elif kind < 0.65:
        spec["freeze"] = selector_of(rng, base)
    if 0.6 < kind < 0.9:
        spec["train"] = selector_of(rng, base)
    if rng.random() < 0.55:
        spec["reinit"] = [_reinit(rng, base) for _ in range(rng.choice([1, 1, 2]))]
        if "freeze" in spec and rng.random() < 0.8:
            frozen = spec["freeze"] if isinstance(spec["freeze"], list) else [spec["freeze"]]
            optional = [{"match": "!" + rule["match"], "optional": True} for rule in spec["reinit"]]
            spec["freeze"] = frozen + optional
    if rng.random() < 0.3:
        spec["add"] = [_add(rng, base) for _ in range(rng.choice([1, 1, 2]))]
    return spec


@dataclass
class Drawn:
    spec: dict
    is_wrong: bool


def spec_of(rng: random.Random, base: dict[str, Tensor], *, valid: bool = False, tries: int = 40) -> Drawn:
    """A spec for these tensors: in error now and then, unless it has to be valid."""
    allowed = not valid and rng.random() < 0.2
    for _ in range(tries):
        spec = _draft(rng, base)
        try:
            fates(spec, base)
        except Wrong:
            if allowed:
                return Drawn(spec, is_wrong=True)
            continue
        return Drawn(spec, is_wrong=False)
    return Drawn({"version": 1}, is_wrong=False)
