"""Checkpoints as files: any layout gives any other, every damage is found, and nothing hostile gets anywhere."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.terms.errors import FileError, UsageError
from paceline.train.checkpoint_files import Checkpoint, Policy, candidates, newest_valid, step_name, step_of
from paceline.train.manifest import Box, seal
from paceline.train.resume import read_tensor, read_tree
from paceline.train.state import hash_file, hash_tensors
from support.checkpoints import Shards, small, write_shards


# ---- layouts --------------------------------------------------------------------------------------------------------
def cut(shape: tuple[int, ...], parts: int, rng: random.Random) -> list[Box]:
    """Cut a tensor into so many boxes, or as many as it has elements, by cutting boxes in two again and again."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    while len(boxes) < parts:
        able = [(i, d) for i, (a, b) in enumerate(boxes) for d in range(len(shape)) if b[d] - a[d] > 1]
        if not able:
            break
        index, dim = rng.choice(able)
        start, stop = boxes.pop(index)
        at = rng.randrange(start[dim] + 1, stop[dim])
        boxes.append((start, (*stop[:dim], at, *stop[dim + 1 :])))
        boxes.append(((*start[:dim], at, *start[dim + 1 :]), stop))
    return boxes


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(*box, strict=True))


def shards_of(tensors: dict[str, Tensor], count: int, rng: random.Random) -> list[dict[str, Box]]:
    """Who holds what in a layout of `count` processes: some tensors cut, others whole on one of them."""
    held: list[dict[str, Box]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        boxes = cut(tuple(tensor.shape), rng.choice([1, count]), rng) if tensor.numel() else []
        owners = rng.sample(range(count), count)
        for owner, box in zip(owners, boxes, strict=False):
            held[owner][name] = box
    return held


def random_tensors(rng: random.Random) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
    found = {"0.step": torch.tensor(7.0), "0.empty": torch.zeros(0, 3)}
    for number in range(5):
        shape = [rng.randrange(1, 7) for _ in range(rng.randrange(1, 5))]
        kind = rng.choice(kinds)
        found[f"{number}.weight"] = torch.randint(0, 200, shape, generator=g).to(kind)
    return found


def read_box(checkpoint: Checkpoint, name: str, box: Box, kind: torch.dtype) -> Tensor:
    shape = [b - a for a, b in zip(*box, strict=True)]
    raw = checkpoint.read(name, box)
    return torch.frombuffer(raw, dtype=kind).view(shape) if raw else torch.empty(shape, dtype=kind)


@pytest.mark.parametrize("seed", range(12))
def test_any_layout_gives_any_other(seed: int, tmp_path: Path) -> None:
    """4 → 3 → 6 → 1 processes, tensors cut in any direction: bit for bit the same."""
    print("seed", seed)
    rng = random.Random(seed)
    tensors = random_tensors(rng)
    leaf = {name: {"$tensor": name} for name in tensors}
    state = {"models": {"model": {"state": leaf, "more": {}}}}
    whole = {name: ((0,) * t.dim(), tuple(t.shape)) for name, t in tensors.items()}
    empty = {name: (t, whole[name], tuple(t.shape)) for name, t in tensors.items() if not t.numel()}
    before: Checkpoint | None = None
    for step, count in enumerate((4, 3, 6, 1), start=1):
        held = shards_of(tensors, count, rng)
        shards: Shards = [
            {n: (before_or(before, n, box, tensors[n]), box, tuple(tensors[n].shape)) for n, box in shard.items()}
            for shard in held
        ]
        path = write_shards(tmp_path, [{**shards[0], **empty}, *shards[1:]], state, step)
        if before is not None:
            before.close()
        before = Checkpoint.open(path)
        before.verify()
        for name, tensor in tensors.items():
            assert torch.equal(read_tensor(before, name), tensor)
            for box in cut(tuple(tensor.shape), 3, rng) if tensor.numel() else ():
                assert torch.equal(read_box(before, name, box, tensor.dtype), tensor[slices(box)])
        assert before.hash() == hash_tensors(tensors)
    assert before is not None
    before.close()


def before_or(checkpoint: Checkpoint | None, name: str, box: Box, tensor: Tensor) -> Tensor:
    """A process's part of a tensor: read from the checkpoint before, or at first from the tensor."""
    return tensor[slices(box)] if checkpoint is None else read_box(checkpoint, name, box, tensor.dtype)


def test_the_hash_is_that_of_the_exported_model(tmp_path: Path) -> None:
    path = small(tmp_path)
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.hash() == hash_file(path / "model.safetensors")
        model = read_tree(checkpoint)["models"]["model"]["state"]
        assert checkpoint.hash() == hash_tensors(model)


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = small(tmp_path)
    with Checkpoint.open(path) as checkpoint:
        state = read_tree(checkpoint)["models"]["model"]["state"]
    model = torch.nn.Linear(4, 8)
    model.load_state_dict(load_file(path / "model.safetensors"))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


# ---- names and policies ---------------------------------------------------------------------------------------------
def test_names_tell_the_step() -> None:
    assert (step_name(500), step_name(500, 2)) == ("step-00000500", "step-00000500.2")
    assert [
        step_of(name) for name in ("step-00000500", "step-00000500.2", "step-5", "tmp-5-0-a", "step-00000500~")
    ] == [
        (500, 0),
        (500, 2),
        None,
        None,
        None,
    ]


def test_the_newest_valid_one_is_found(tmp_path: Path) -> None:
    for step in (5, 40, 300, 40):
        small(tmp_path, step)
    (tmp_path / "step-00009999").symlink_to(tmp_path / "step-00000005")
    (tmp_path / "step-00000500").mkdir()
    (tmp_path / "tmp-700-0-abc").mkdir()
    names = ["step-00000500", "step-00000300", "step-00000040.1", "step-00000040", "step-00000005"]
    assert [path.name for path in candidates(tmp_path)] == names
    flip(tmp_path / "step-00000300" / "state.safetensors", -1)
    said: list[str] = []
    found = newest_valid(tmp_path, lambda error: said.append(error.message))
    assert found is not None
    assert found.path.name == "step-00000040.1"
    found.close()
    assert ["step-00000500" in said[0], "step-00000300/state.safetensors: its bytes" in said[1]] == [True, True]
    assert newest_valid(tmp_path / "none", lambda error: None) is None


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("every=500", Policy(steps=500)),
        ("every=5min,keep=3", Policy(seconds=300, keep=3)),
        ("every=30s, busy=wait", Policy(seconds=30, wait=True)),
        ("keep=1,every=2h", Policy(seconds=7200, keep=1)),
    ],
)
def test_policies(text: str, policy: Policy) -> None:
    assert Policy.parse(text) == policy


@pytest.mark.parametrize(
    "text", ["", "500", "every=", "every=0", "every=-5", "every=5m", "every=5,keep=0", "every=5,x=1", "every=5,busy=no"]
)
def test_policies_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="PL105"):
        Policy.parse(text)


# ---- hostile --------------------------------------------------------------------------------------------------------
def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


class Evil:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/paceline-was-here",)


def pickled() -> bytes:
    out = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "evil": Evil()}, out)
    return out.getvalue()


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * (200 << 20))
    return out.getvalue()


Change = Callable[[Path], None]


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change what the manifest says."""

    def apply(path: Path) -> None:
        file = path / "MANIFEST.json"
        said = json.loads(file.read_bytes())
        change(said)
        said.pop("sha256", None)
        file.write_bytes(seal(json.dumps(said).encode()))

    return apply


def tensor(**fields: Any) -> Change:
    """Change the entry of the weight, of shape 8 x 4."""
    return manifest(lambda said: said["tensors"]["models/model/state/weight"].update(fields))


def part(**fields: Any) -> Change:
    return manifest(lambda said: said["tensors"]["models/model/state/weight"]["parts"][0].update(fields))


def file(**fields: Any) -> Change:
    return manifest(lambda said: said["files"][0].update(fields))


def truth(path: Path) -> None:
    """Let the manifest tell the truth about files that were changed."""

    def apply(said: dict[str, Any]) -> None:
        for entry in said["files"]:
            raw = (path / entry["name"]).read_bytes()
            entry |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    manifest(apply)(path)


def content(raw: bytes, *, honest: bool = False) -> Change:
    def apply(path: Path) -> None:
        (path / "model.safetensors").write_bytes(raw)
        if honest:
            truth(path)

    return apply


def raw_manifest(raw: bytes) -> Change:
    """Sealed, so that more than the seal is looked at."""
    return lambda path: (path / "MANIFEST.json").write_bytes(seal(raw)) and None


def instead(make: Callable[[Path], object], name: str = "model.safetensors") -> Change:
    """Something else in the place of a file."""

    def apply(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return apply


def swap(path: Path) -> None:
    a, b = path / "model.safetensors", path / "state.safetensors"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def state(value: Any) -> Change:
    return manifest(lambda said: said.update(state=value))


def many_parts(said: dict[str, Any]) -> None:
    """Columns that all begin in the same row, two of them the same: each has to be compared with each."""
    count = 40_000
    parts = [{"file": 0, "at": 4 * i, "start": [0, i], "stop": [1, i + 1]} for i in range(count)]
    parts[-1] |= {"start": [0, 5], "stop": [1, 6]}
    said["files"][0]["bytes"] = 4 * count + 1000
    said["tensors"] = {"models/model/state/weight": {"dtype": "F32", "shape": [1, count], "parts": parts}}
    said["state"] = {}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


HOSTILE: dict[str, Change] = {
    # files that are something else
    "pickle instead of a file": content(pickled()),
    "pickle, and the manifest knows": content(pickled(), honest=True),
    "zip bomb": content(bomb()),
    "zip bomb, and the manifest knows": content(bomb(), honest=True),
    "an empty file": content(b""),
    "an empty file, and the manifest knows": content(b"", honest=True),
    "truncated": lambda path: os.truncate(path / "model.safetensors", 40),
    "one byte less": lambda path: os.truncate(
        path / "model.safetensors", (path / "model.safetensors").stat().st_size - 1
    ),
    "one byte more": lambda path: os.truncate(
        path / "model.safetensors", (path / "model.safetensors").stat().st_size + 1
    ),
    "files swapped": swap,
    "no data file": lambda path: (path / "state.safetensors").unlink(),
    "no manifest": lambda path: (path / "MANIFEST.json").unlink(),
    "symlink to a secret": instead(lambda path: path.symlink_to("/etc/passwd")),
    "symlink to the other file": instead(lambda path: path.symlink_to("state.safetensors")),
    "symlinked manifest": instead(lambda path: path.symlink_to("/etc/passwd"), "MANIFEST.json"),
    "a pipe": instead(os.mkfifo),
    "a piped manifest": instead(os.mkfifo, "MANIFEST.json"),
    "a directory": instead(lambda path: path.mkdir()),
    "a device": instead(lambda path: path.symlink_to("/dev/zero")),
    # names
    **{
        f"file named {name!r}": file(name=name)
        for name in (
            *("../model.safetensors", "/etc/passwd", "/dev/zero", "a/b.safetensors", ".hidden.safetensors", "..", ""),
            *(
                "model.safetensors\0",
                "MANIFEST.json",
                "x" * 300 + ".safetensors",
                "model.pt",
                "%2e%2e.safetensors",
                5,
                None,
            ),
        )
    },
    "a file twice": manifest(lambda said: said["files"].append(dict(said["files"][0]))),
    # sizes
    **{f"a dimension of {n}": tensor(shape=[n, 4]) for n in (2**62, 2**63, 2**64, -1, 10**4000, 1.5, True, "8", None)},
    "2^62 twice": tensor(shape=[2**62, 2**62]),
    "as many dimensions as bytes": tensor(shape=[1] * 5000),
    "shape of no list": tensor(shape={"a": 1}),
    "another shape": tensor(shape=[8, 8]),
    "another type": tensor(dtype="F64"),
    "a type that is none": tensor(dtype="object"),
    "a file of 2^62 bytes": file(bytes=2**62),
    "a file of -1 bytes": file(bytes=-1),
    "no sha256": file(sha256=""),
    "sha256 of another": file(sha256="0" * 64),
    "sha256 of no digits": file(sha256="z" * 64),
    # parts
    **{f"a part at {n}": part(at=n) for n in (2**62, -8, 10**9, 1.0, None)},
    **{f"a part of file {n}": part(file=n) for n in (2, -1, 2**70, "0")},
    "a part that overlaps another": manifest(
        lambda said: said["tensors"]["models/model/state/bias"]["parts"][0].update(
            at=said["tensors"]["models/model/state/weight"]["parts"][0]["at"]
        )
    ),
    "a part outside": part(start=[0, 0], stop=[9, 4]),
    "an empty part": part(start=[4, 0], stop=[4, 4]),
    "a part that ends before it begins": part(start=[4, 0], stop=[2, 4]),
    "a part with one dimension": part(start=[0], stop=[8]),
    "half of a tensor": part(start=[0, 0], stop=[4, 4]),
    "no parts": tensor(parts=[]),
    "half of it twice": tensor(
        parts=[{"file": 0, "at": at, "start": [0, 0], "stop": [4, 4]} for at in (200, 300)],
    ),
    "two parts that cross": manifest(
        lambda said: (
            said["files"][0].update(bytes=10_000),
            said["tensors"]["models/model/state/weight"].update(
                parts=[
                    {"file": 0, "at": 1000, "start": [0, 0], "stop": [6, 4]},
                    {"file": 0, "at": 2000, "start": [4, 0], "stop": [6, 4]},
                ]
            ),
        )
    ),
    "forty thousand parts": manifest(many_parts),
    # JSON
    "no JSON": raw_manifest(b"\x80\x04\x95"),
    "nothing": raw_manifest(b""),
    "a list": raw_manifest(b"[]"),
    "a number": raw_manifest(b"1e999"),
    "many digits": raw_manifest(b"1" * 100_000),
    "deep lists": raw_manifest(b"[" * 1_000_000),
    "deep objects": raw_manifest(b'{"a":' * 500_000),
    "a manifest of 300 MB": lambda path: os.truncate(path / "MANIFEST.json", 300 << 20),
    "a million lists": raw_manifest(b"[" + b"[]," * 1_390_000 + b"[]]"),
    "a million lists in the state": raw_manifest(
        b'{"format":"paceline checkpoint","version":1,"step":1,"epoch":1,"files":[],"tensors":{},"state":{"$tensor":"x","a":['
        + b"[]," * 1_390_000
        + b"[]]}}"
    ),
    "ten million lists": raw_manifest(b"[" + b"[]," * 10_000_000 + b"[]]"),
    "half a manifest": lambda path: os.truncate(path / "MANIFEST.json", 200),
    "invalid UTF-8": raw_manifest(b'{"format": "\xff\xfe"}'),
    **{
        f"without {key!r}": manifest(lambda said, key=key: said.pop(key))
        for key in (  # type: ignore[misc]
            *("format", "version", "step", "epoch", "state", "files", "tensors"),
        )
    },
    **{
        f"{key!r} of another kind": manifest(lambda said, key=key: said.update({key: [[]]}))
        for key in (  # type: ignore[misc]
            *("format", "version", "step", "epoch", "state", "files", "tensors"),
        )
    },
    "another version": manifest(lambda said: said.update(version=2)),
    "a step of 2^70": manifest(lambda said: said.update(step=2**70)),
    "a step of -1": manifest(lambda said: said.update(step=-1)),
    "a tensor that is not there": state({"models": {"model": {"state": {"w": {"$tensor": "none"}}, "more": {}}}}),
    "a tensor named by a list": state({"kept": {"$tensor": ["x"]}}),
    # flipped bits
    **{
        f"{name}, bit of byte {at}": (lambda path, name=name, at=at: flip(path / name, at))
        for name, at in itertools.product(("model.safetensors", "state.safetensors"), (0, 7, 8, 60, -1))
    },
}

LOADS_AND_IS_REFUSED = {
    "deep state": state({"kept": deep(100)}),
    "a state that is no tree": state({"models": {"model": 5}}),
    "models that are a list": state({"models": [1]}),
    "float of text": state({"kept": {"average": {"$float": "x"}}}),
    "unhashable key": state({"kept": {"$items": [[{}, 1]]}}),
}

PROBE = """
import sys, time, json
from paceline.train.checkpoint_files import Checkpoint
from paceline.terms.errors import FileError
import paceline.launch.commands.verify, encodings.idna
from pathlib import Path
root, opened, allowed = sys.argv[1], [], False
def hook(event, args):
    if not allowed:
        return
    if event == "open" and isinstance(args[0], (str, bytes)) and not str(args[0]).startswith((root, "MANIFEST.json")) and "/" in str(args[0]):
        opened.append(f"open {args[0]!r}")
    if event in ("exec", "compile", "import", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class",
                 "marshal.loads", "ctypes.dlopen", "socket.connect", "shutil.unpack_archive", "os.fork"):
        opened.append(f"{event} {args!r}"[:200])
sys.addaudithook(hook)
for path in sorted(Path(root).iterdir()):
    began, said = time.monotonic(), None
    opened.clear(); allowed = True
    try:
        with Checkpoint.open(path) as checkpoint:
            checkpoint.verify()
            checkpoint.hash()
    except FileError as error:
        said = error.code
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:200]
    allowed = False
    rss = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    print(json.dumps([path.name, said, time.monotonic() - began, list(opened), rss]))
"""


@pytest.mark.timeout(300)
def test_hostile_checkpoints_are_refused(tmp_path: Path) -> None:
    """No code runs, nothing outside is opened, memory is bounded, each is refused within 5 s by a coded error."""
    (original,) = [small(tmp_path / "original")]
    room = tmp_path / "hostile"
    room.mkdir()
    names, largest = {}, 0
    for number, (name, change) in enumerate({"as it was": lambda path: None, **HOSTILE}.items()):
        path = room / f"{number:03d}"
        shutil.copytree(original, path)
        change(path)
        names[path.name] = name
        sizes = [entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path)]
        largest = max(largest, *(size for size in sizes if size < 250 << 20))
    assert len(HOSTILE) >= 100
    command = [sys.executable, "-c", PROBE, str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(names)
    assert told[0][1:2] == [None]
    wrong = [f"{names[name]}: {said}" for name, said, *_ in told[1:] if said != "PL613"]
    assert not wrong, "\n".join(wrong)
    assert not [f"{names[name]}: {seconds:.1f} s" for name, _, seconds, *_ in told if seconds > 5]
    assert not [f"{names[name]}: {opened}" for name, _, _, opened, _ in told if opened]
    assert max(rss for *_, rss in told) <= 2 * largest + (256 << 20)
    assert not Path("/tmp/paceline-was-here").exists()


@pytest.mark.parametrize("case", sorted(LOADS_AND_IS_REFUSED))
def test_a_state_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    path = small(tmp_path)
    LOADS_AND_IS_REFUSED[case](path)

    def read() -> None:
        with Checkpoint.open(path) as checkpoint:
            checkpoint.hash()
            read_tree(checkpoint)

    with pytest.raises(FileError, match="PL613"):
        read()


def test_what_was_verified_is_what_is_read(tmp_path: Path) -> None:
    """Files that are replaced after they were verified are not the ones that are read."""
    path = small(tmp_path)
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        before = checkpoint.hash()
        other = small(tmp_path / "other", seed=9)
        for name in ("model.safetensors", "state.safetensors"):
            (other / name).replace(path / name)
        assert checkpoint.hash() == before
        assert read_tree(checkpoint)["models"]["model"]["state"]["weight"].shape == (8, 4)


def test_a_file_that_is_cut_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = small(tmp_path)
    with Checkpoint.open(path) as checkpoint:
        os.truncate(path / "model.safetensors", 100)
        with pytest.raises(FileError, match="has become shorter"):
            checkpoint.read("models/model/state/weight")
        with pytest.raises(FileError, match="has become shorter"):
            checkpoint.verify()


def test_verifying_takes_no_memory(tmp_path: Path) -> None:
    """It reads in pieces: 64 MB of data under a limit that leaves no room for them."""
    from paceline.train.checkpoint import save_tree

    path = save_tree({"models": {"model": {"state": {"w": torch.zeros(16 << 20)}, "more": {}}}}, tmp_path)
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from paceline.train.checkpoint_files import Checkpoint\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)\n"
        "with Checkpoint.open(Path(sys.argv[1])) as c: c.verify(); print(c.hash())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", range(5))
def test_every_changed_bit_of_a_manifest_is_noticed(seed: int, tmp_path: Path) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    path = small(tmp_path)
    raw = (path / "MANIFEST.json").read_bytes()
    for _ in range(200):
        changed, at = bytearray(raw), rng.randrange(len(raw))
        match rng.randrange(4):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case _:
                changed[at : at + 9] = changed[at : at + 9][::-1]
        if changed == raw:
            continue
        (path / "MANIFEST.json").write_bytes(changed)
        with pytest.raises(FileError, match="PL613"):
            Checkpoint.open(path)


@pytest.mark.parametrize("seed", range(5))
def test_a_sealed_manifest_of_nonsense_is_refused_or_harmless(seed: int, tmp_path: Path) -> None:
    """Values of the manifest are put in each other's places. Whoever made it has sealed it, so only sense is looked for."""
    print("seed", seed)
    rng = random.Random(seed)
    path = small(tmp_path)
    original = json.loads((path / "MANIFEST.json").read_bytes())
    codes = set()
    for _ in range(200):
        said = json.loads(json.dumps(original))
        places = list(inside(said))
        (holder, key), (giver, other) = rng.choice(places), rng.choice(places)
        holder[key] = (
            json.loads(json.dumps(giver[other])) if rng.random() < 0.7 else rng.choice([0, -1, 2**62, "", [], {}])
        )
        said.pop("sha256", None)
        (path / "MANIFEST.json").write_bytes(seal(json.dumps(said).encode()))
        try:
            with Checkpoint.open(path) as checkpoint:
                checkpoint.verify()
                checkpoint.hash()
                read_tree(checkpoint)
        except FileError as error:
            codes.add(error.code)
    assert codes == {"PL613"}


def inside(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value: what holds it, and its key there."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from inside(item)
