"""What can be wrong with a file: each mutation takes a random generator and returns what it did, in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import torch

from koala_sdxl.koala.files.conventions import KEPT_TRANSFORMERS_KEY, SCHEDULER_KEY
from tools.fuzz.files import STORED, WEIGHTS, Tensor, Weights, element, pack

OnWeights = Callable[[Weights, Random], str]
OnBytes = Callable[[bytes, Random], tuple[bytes, str]]
OnConfig = Callable[[dict[str, Any], Random], str]


def _pick(weights: Weights, random: Random) -> str:
    return random.choice(list(weights.tensors))


# --- tensors: names, shapes, types, values --------------------------------------------------------------------------


def drop(weights: Weights, random: Random) -> str:
    """One tensor is missing."""
    name = _pick(weights, random)
    del weights.tensors[name]
    return f"without {name}"


def drop_many(weights: Weights, random: Random) -> str:
    """A few, or most, are missing."""
    names = list(weights.tensors)
    gone = random.sample(names, random.randint(1, max(1, len(names) - 1)))
    for name in gone:
        del weights.tensors[name]
    return f"without {len(gone)} of {len(names)} tensors"


def drop_suffix(weights: Weights, random: Random) -> str:
    """No tensor with this ending is there: every bias, every up matrix, every alpha."""
    ending = _pick(weights, random).rpartition(".")[2]
    gone = [name for name in weights.tensors if name.endswith(ending)]
    if len(gone) == len(weights.tensors):
        gone.pop()
    for name in gone:
        del weights.tensors[name]
    return f"without the {len(gone)} tensors that end in {ending}"


def rename(weights: Weights, random: Random) -> str:
    """One tensor has another name, near its own or far from it."""
    name = _pick(weights, random)
    digits = [place for place, letter in enumerate(name) if letter.isdigit()]
    ways = [name + "_", name + ".weight", "x" + name, name.upper(), name.replace(".", "_"), name[:-1], "", "é\u2028"]
    if digits:
        place = random.choice(digits)
        ways += [name[:place] + str(random.randint(0, 99)) + name[place + 1 :]] * 6
    new = random.choice(ways)
    _rename(weights, {name: new})
    return f"{name} named {new!r}"


def _rename(weights: Weights, names: dict[str, str]) -> None:
    weights.tensors = {names.get(name, name): tensor for name, tensor in weights.tensors.items()}


def rename_all(weights: Weights, random: Random) -> str:
    """Every name has another beginning."""
    prefix = random.choice(["model.", "unet.", "module.", "state_dict.", "model.diffusion_model.", "_orig_mod."])
    _rename(weights, {name: prefix + name for name in weights.tensors})
    return f"every name begins with {prefix}"


def duplicate(weights: Weights, random: Random) -> str:
    """One tensor is there a second time, under a name like its own."""
    name = _pick(weights, random)
    new = random.choice([name + ".1", name + "_copy", "model." + name, name.replace("0", "1"), name.replace("1", "2")])
    weights.tensors.setdefault(new, weights.tensors[name])
    return f"{name} also as {new}"


def swap(weights: Weights, random: Random) -> str:
    """Two tensors have each other's names."""
    first = _pick(weights, random)
    alike = [name for name, tensor in weights.tensors.items() if tensor.shape == weights.tensors[first].shape]
    second = random.choice(alike) if random.random() < 0.7 else _pick(weights, random)
    _rename(weights, {first: second, second: first})
    return f"{first} and {second} swapped"


def reshape(weights: Weights, random: Random) -> str:
    """The same numbers in another shape."""
    name = _pick(weights, random)
    tensor = weights.tensors[name]
    numbers = len(tensor.data) // element(tensor.dtype)
    shapes = [(numbers,), (1, *tensor.shape), (*tensor.shape, 1), tensor.shape[::-1], (1, numbers), (numbers, 1)]
    if not tensor.shape:
        shapes += [(1,), (1, 1, 1, 1)]
    if tensor.shape and tensor.shape[0] % 2 == 0:
        shapes.append((tensor.shape[0] // 2, 2, *tensor.shape[1:]))
    if numbers == 1:
        shapes.append(())
    shape = random.choice(shapes)
    weights.tensors[name] = Tensor(tensor.dtype, shape, tensor.data)
    return f"{name} as {list(shape)}"


def resize(weights: Weights, random: Random) -> str:
    """More or fewer numbers along one axis."""
    name = _pick(weights, random)
    tensor = weights.tensors[name]
    shape = list(tensor.shape) or [1]
    axis = random.randrange(len(shape))
    shape[axis] = random.choice([0, 1, 2, 3, shape[axis] + 1, shape[axis] * 2, max(0, shape[axis] - 1)])
    values = torch.full(shape, 0.5, dtype=torch.float32).to(STORED[tensor.dtype])
    weights.tensors[name] = Tensor.of(values)
    return f"{name} of {list(shape)}"


def resize_all(weights: Weights, random: Random) -> str:
    """Every tensor of one size along an axis has another one there: another model's width."""
    sizes = [size for tensor in weights.tensors.values() for size in tensor.shape if size > 1]
    if not sizes:
        return "nothing to resize"
    old = random.choice(sizes)
    new = random.choice([old + 1, old * 2, old // 2 + 1, 33, 248])
    for name, tensor in weights.tensors.items():
        shape = [new if size == old else size for size in tensor.shape]
        if shape != list(tensor.shape) and element(tensor.dtype) * torch.Size(shape).numel() < 1 << 24:
            weights.tensors[name] = Tensor.of(torch.full(shape, 0.5).to(STORED[tensor.dtype]))
    return f"every size {old} is {new}"


def _retyped(tensor: Tensor, dtype: str) -> Tensor:
    return Tensor.of(tensor.values().to(torch.float32).nan_to_num().clamp(-100, 100).to(STORED[dtype]))


def retype(weights: Weights, random: Random) -> str:
    """One tensor's numbers in another type."""
    name, dtype = _pick(weights, random), random.choice(list(STORED))
    weights.tensors[name] = _retyped(weights.tensors[name], dtype)
    return f"{name} as {dtype}"


def retype_all(weights: Weights, random: Random) -> str:
    """All numbers, or those of all matrices, in another type."""
    dtype, least = random.choice(list(STORED)), random.choice([0, 2])
    for name, tensor in weights.tensors.items():
        if len(tensor.shape) >= least:
            weights.tensors[name] = _retyped(tensor, dtype)
    return f"tensors of {least} or more axes as {dtype}"


def reinterpret(weights: Weights, random: Random) -> str:
    """One tensor's bytes called another type of the same width."""
    name = _pick(weights, random)
    tensor = weights.tensors[name]
    dtype = random.choice([other for other in STORED if element(other) == element(tensor.dtype) and other != "BOOL"])
    weights.tensors[name] = Tensor(dtype, tensor.shape, tensor.data)
    return f"{name}'s bytes called {dtype}"


def not_finite(weights: Weights, random: Random) -> str:
    """NaN or infinity in one tensor."""
    name = _pick(weights, random)
    tensor = weights.tensors[name]
    if tensor.dtype not in ("F32", "F16", "BF16") or not tensor.data:
        return f"{name} has no room for NaN"
    values = tensor.values().clone()
    values.view(-1)[random.randrange(values.numel())] = random.choice([float("nan"), float("inf"), float("-inf")])
    weights.tensors[name] = Tensor.of(values)
    return f"NaN or infinity in {name}"


MARKS = ("absmax", "quant_map", "quant_state.bitsandbytes__nf4", "SCB", "scale_weight", "weight_scale", "qweight")


def mark_quantised(weights: Weights, random: Random) -> str:
    """A tensor beside a weight that only quantised files have, with the weight as it was or as codes."""
    name = _pick(weights, random)
    mark = random.choice(MARKS)
    new = random.choice([f"{name}.{mark}", f"{name.rpartition('.')[0]}.{mark}", "scaled_fp8", f"{name}.comfy_quant"])
    weights.tensors[new] = Tensor.of(torch.ones(random.choice([1, 4])))
    if random.random() < 0.5:
        weights.tensors[name] = _retyped(weights.tensors[name], random.choice(["I8", "U8", "F8_E4M3"]))
    return f"{new} beside {name}"


def shuffle(weights: Weights, random: Random) -> str:
    """The same tensors in another order: a whole file."""
    names = list(weights.tensors)
    random.shuffle(names)
    weights.tensors = {name: weights.tensors[name] for name in names}
    return "in another order"


ODD_TEXTS = ("", "null", "[]", "7", "{", "NaN", '"x"', "[" * 5000, '{"a":' * 3000, '{"prediction_type": 5}', "\x00")


def metadata(weights: Weights, random: Random) -> str:
    """A text in the metadata that the pack or another tool looks at."""
    keys = (SCHEDULER_KEY, KEPT_TRANSFORMERS_KEY, "koala.variant", "lora_adapter_metadata", "ss_base_model_version")
    key = random.choice(keys)
    text = random.choice(ODD_TEXTS)
    if key == SCHEDULER_KEY and random.random() < 0.7:
        stated: dict[str, Any] = {}
        scheduler(stated, random)
        text = json.dumps(stated)
    elif key == KEPT_TRANSFORMERS_KEY and random.random() < 0.7:
        text = random.choice(['{"down_blocks.1.attentions.0": [0]}', '{"x": [1]}', '{"down_blocks.1.attentions.0": 1}'])
    elif key == "lora_adapter_metadata" and random.random() < 0.7:
        values = [None, 0, -1, 1e308, float("nan"), "4", [4], {"a": 1}, True, 4]
        stated = {"unet.r": random.choice((2, 2, *values)), "unet.lora_alpha": random.choice((1, 16.0, *values))}
        stated |= {"unet.use_rslora": random.choice((True, False, None)), "unet.alpha_pattern": {"a": 1}}
        text = json.dumps(stated)
    weights.metadata[key] = text
    return f"metadata {key} = {text[:60]!r}"


# --- configurations ---------------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (float("nan"), float("inf"), -1, 0, "1000", None, [1], {"a": 1}, True, 1.5, 1e308, 10**7)
SCHEDULER_VALUES: dict[str, tuple[Any, ...]] = {
    "beta_start": (0.001, 0.0001, *NUMBERS),
    "beta_end": (0.02, *NUMBERS),
    "beta_schedule": ("linear", "squaredcos_cap_v2", "", "x", None, 5, ["linear"]),
    "num_train_timesteps": (500, 999, 1000.0, *NUMBERS),
    "prediction_type": ("v_prediction", "sample", "", None, 1, ["epsilon"]),
    "interpolation_type": ("log_linear", "x", None, 1),
    "steps_offset": (0, 2, 1000, *NUMBERS),
    "timestep_spacing": ("trailing", "linspace", "x", None, 1, []),
    "use_karras_sigmas": (True, "yes", None, 1),
    "use_exponential_sigmas": (True, "yes", 1),
    "use_beta_sigmas": (True, 1),
    "rescale_betas_zero_snr": (True, "yes", None, 1),
    "trained_betas": ([0.1] * 1000, [0.1], "x", [float("nan")] * 1000),
    "sigma_min": (0.1, "x", float("nan")),
    "sigma_max": (100.0, "x"),
    "timestep_type": ("continuous", "x", None),
    "final_sigmas_type": ("sigma_min", "x"),
    "an_unknown_setting": (1, None),
    "_class_name": ("DDIMScheduler", "EulerAncestralDiscreteScheduler", None, 5),
}


def scheduler(config: dict[str, Any], random: Random) -> str:
    """A setting with another value, or none."""
    key = random.choice(list(SCHEDULER_VALUES))
    if key in config and random.random() < 0.1:
        del config[key]
        return f"without {key}"
    config[key] = random.choice(SCHEDULER_VALUES[key])
    return f"{key} = {str(config[key])[:40]}"


ODD_JSON: tuple[bytes, ...] = (
    *(b"", b"null", b"[]", b"{", b"7", b"NaN", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 20000),
    *(b'{"a":' * 20000, b'{"beta_start": 1e999}', b'{"beta_start": NaN}', b"<html>", b"\x80\x02}q.", b"{}"),
)


def odd_json(content: bytes, random: Random) -> tuple[bytes, str]:
    """Another text in the place of a JSON file."""
    new = random.choice(ODD_JSON)
    return new, f"{new[:20]!r} for JSON"


# --- bytes ------------------------------------------------------------------------------------------------------------


def truncate(content: bytes, random: Random) -> tuple[bytes, str]:
    """The end is missing: of the data, of the header, or all but a few bytes."""
    header = 8 + int.from_bytes(content[:8], "little")
    end = random.choice(
        [random.randrange(len(content)), random.randrange(header), random.randrange(9), len(content) - 1]
    )
    return content[:end], f"cut to {end:,} of {len(content):,} bytes"


def flip_header(content: bytes, random: Random) -> tuple[bytes, str]:
    """A few bytes of the header are others."""
    changed = bytearray(content)
    header = min(8 + int.from_bytes(content[:8], "little"), len(content))
    places = [random.randrange(8, header) for _ in range(random.choice([1, 1, 1, 2, 8]))]
    for place in places:
        changed[place] = random.choice([changed[place] ^ (1 << random.randrange(8)), random.randrange(256)])
    return bytes(changed), f"header bytes {places[:4]} flipped"


def flip_data(content: bytes, random: Random) -> tuple[bytes, str]:
    """A byte of the weights is another: a whole file with other weights."""
    header = 8 + int.from_bytes(content[:8], "little")
    place = random.randrange(header, len(content))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :], f"data byte {place} flipped"


def header_length(content: bytes, random: Random) -> tuple[bytes, str]:
    """The header's length is another one."""
    length = int.from_bytes(content[:8], "little")
    new = random.choice([length + 1, length + 8, length - 8, 0, 1, 2, 10**8, 10**8 + 1, 2**63 - 1, 2**64 - 1])
    return new.to_bytes(8, "little") + content[8:], f"header of {new} instead of {length} bytes"


def garbage(content: bytes, random: Random) -> tuple[bytes, str]:
    """Something else under this name."""
    name, new = random.choice(
        [
            ("nothing", b""),
            ("a zip archive", b"PK\x03\x04" + content[:200]),
            ("a pickle", b"\x80\x02}q\x00."),
            ("a web page", b"<!DOCTYPE html><html><title>Sign in</title>"),
            ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
            ("zeros", bytes(4096)),
            ("random bytes", random.randbytes(4096)),
            ("the file behind a byte", b"\x00" + content),
            ("GGUF", b"GGUF" + bytes(64)),
            ("more bytes at the end", content + b"\x00" * random.choice([1, 8, 4096])),
        ]
    )
    return new, name


def table(content: bytes, random: Random) -> tuple[bytes, str]:
    """An entry of the header's table is odd: offsets, shape, type, JSON that is no table."""
    length = int.from_bytes(content[:8], "little")
    found, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in found if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry: dict[str, Any] = found[name]
    start, end = entry["data_offsets"]
    texts: list[tuple[str, Any, Any]] = [
        ("data_offsets", "overlap", found[other]["data_offsets"]),
        ("data_offsets", "are out of range", [start + len(data), end + len(data)]),
        ("data_offsets", "are swapped", [end, start]),
        ("data_offsets", "are negative", [-8, end]),
        ("data_offsets", "are huge", [2**63, 2**64 - 1]),
        ("data_offsets", "are floats", [float(start), float(end)]),
        ("data_offsets", "are one", [start]),
        ("shape", "is negative", [-1]),
        ("shape", "is huge", [2**40, 2**40]),
        ("shape", "has floats", [1.5]),
        ("shape", "is null", None),
        ("shape", "has 2,000 axes", [1] * 2000),
        ("dtype", "is unknown", "F99"),
        ("dtype", "is a number", 5),
        ("dtype", "is a type of 4 bits", "F4"),
        ("further", "is there", {"a": [1]}),
    ]
    if random.random() < 0.35:
        how, text = _odd_table(found, random)
        return pack(text, data), how
    key, how, value = random.choice(texts)
    entry[key] = value
    return pack(json.dumps(found).encode(), data), f"{name}: {key} {how}"


def _odd_table(found: dict[str, Any], random: Random) -> tuple[str, bytes]:
    """The table as a text that is odd JSON."""
    plain = json.dumps(found)
    name = next(key for key in found if key != "__metadata__")
    metadata: list[Any] = [None, [], 5, {"a": None}, {"a": 5}, {"a": {"b": "c"}}, "x", {"a": float("nan")}]
    ways: list[tuple[str, str]] = [
        *((f"metadata {value}", json.dumps({**found, "__metadata__": value})) for value in metadata),
        ("metadata nested 3,000 deep", plain[:-1] + ', "__metadata__": {"a": ' + "[" * 3000 + "]" * 3000 + "}}"),
        ("metadata nested 100 deep", plain[:-1] + ', "__metadata__": {"a": ' + "[" * 100 + "]" * 100 + "}}"),
        ("a name twice", plain[:-1] + f", {json.dumps(name)}: {json.dumps(found[name])}}}"),
        ("a huge number", plain[:-1] + ', "x": ' + "9" * 5000 + "}"),
        ("an entry that is null", json.dumps({**found, name: None})),
        ("a list", json.dumps([found])),
        ("a comma too many", plain[:-1] + ",}"),
        ("a lone surrogate", plain.replace(json.dumps(name), '"\\ud800"', 1)),
        ("a byte-order mark", "\ufeff" + plain),
        ("spaces in front", " " * 64 + plain),
    ]
    how, text = random.choice(ways)
    return f"header with {how}", text.encode()


ON_WEIGHTS: tuple[OnWeights, ...] = (
    *(drop, drop, drop_many, drop_suffix, rename, rename, rename_all, duplicate, swap, swap, reshape, reshape, resize),
    *(resize, resize_all, retype, retype, retype_all, reinterpret, not_finite, mark_quantised, shuffle, metadata),
)
"""Those that come twice are drawn twice as often."""
ON_BYTES: tuple[OnBytes, ...] = (truncate, flip_header, flip_header, flip_data, header_length, garbage, table, table)
PLAIN = frozenset(WEIGHTS)
