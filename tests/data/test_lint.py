"""What `mmdit data lint` finds, and that it finds nothing where nothing is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from stack.config import UserError
from stack.data.lint import Problem, lint
from stack.data.remote import CacheConfig, ShardCache
from stack.data.shards import index_shards

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def _image(form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((40, 30), 80).convert("RGB").save(stream, form, **options)
    return stream.getvalue()


def _sample(key: str, extension: str = "png", image: bytes | None = None) -> dict[str, bytes]:
    form = "PNG" if extension == "png" else "JPEG"
    return {f"{key}.{extension}": image or _image(form), f"{key}.txt": b"noise", f"{key}.json": b'{"a": 1}'}


def _write(path: Path, *samples: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in (item for sample in samples for item in sample.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _found(source: Path, folder: Path | None = None) -> list[tuple[str, str, str]]:
    """(name of the shard, key, kind) of all problems."""
    return [(Path(p.shard).name, p.key, p.reason.partition(":")[0]) for p in lint(source, folder)]


# ---- raw shards


@pytest.mark.skipif(not DATA.is_dir(), reason="shared data is not here")
@pytest.mark.parametrize("name", ["photos", "emoji"])
def test_nothing_is_wrong_with_real_shards(name: str) -> None:
    read = []
    assert list(lint(DATA / name, progress=lambda *counts: read.append(counts))) == []
    assert len(read) == len(list((DATA / name).glob("*.tar")))
    assert sum(size for _, size in read) == sum(path.stat().st_size for path in (DATA / name).glob("*.tar"))
    assert sum(samples for samples, _ in read) == {"photos": 384, "emoji": 3786}[name]


def test_every_problem_of_raw_shards_is_found(tmp_path: Path) -> None:
    png, jpeg = _image(), _image("JPEG", quality=95)
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    folder = tmp_path / "shards"
    _write(
        folder / "00000.tar",
        _sample("whole"),
        _sample("cut", "jpg", jpeg[: len(jpeg) // 2]),  # its header is whole: indexing finds nothing
        _sample("flipped", image=bytes(flipped)),
        _sample("named", "jpg", png),
        _sample("header", image=b"GIF89a"),
        {**_sample("list"), "list.json": b"[]"},
        {**_sample("json"), "json.json": b"{'a': 1}"},
        {**_sample("long"), "long.json": b'"' + b"x" * 2**20},
        {"silent.png": png},
        {**_sample("empty"), "empty.txt": b" "},
        {**_sample("latin"), "latin.txt": b"gr\xfcn"},
        {**_sample("code"), "code.pkl": b"x"},
        _sample("twice"),
    )
    _write(folder / "00001.tar", _sample("twice"), _sample("other"))
    damaged = _write(folder / "00002.tar", _sample("kept"), _sample("lost"))
    with tarfile.open(damaged) as tar:
        cut = tar.getmember("lost.txt").offset
    damaged.write_bytes(damaged.read_bytes()[:cut])
    (folder / "00003.tar").mkdir()
    os.mkfifo(folder / "00004.tar")
    assert _found(folder) == [
        ("00000.tar", "code", "forbidden member"),
        ("00000.tar", "header", "image not readable"),
        ("00000.tar", "cut", "image not decodable"),
        ("00000.tar", "flipped", "image not decodable"),
        ("00000.tar", "named", "extension"),
        ("00000.tar", "list", "JSON not readable"),
        ("00000.tar", "json", "JSON not readable"),
        ("00000.tar", "long", "text too large"),
        ("00000.tar", "silent", "no caption"),
        ("00000.tar", "empty", "empty caption"),
        ("00000.tar", "latin", "caption not UTF-8"),
        ("00002.tar", "", "damaged archive"),
        ("00002.tar", "lost", "incomplete"),
        ("00003.tar", "", "shard not readable"),
        ("00004.tar", "", "shard not readable"),
        ("00001.tar", "twice", "duplicate key"),
    ]
    assert not list(folder.glob("*index*")), "nothing is written"


def test_shards_without_captions_among_others_are_named(tmp_path: Path) -> None:
    silent = {"a.png": _image()}
    _write(tmp_path / "00000.tar", silent)
    assert _found(tmp_path) == []
    _write(tmp_path / "00001.tar", _sample("b"))
    assert _found(tmp_path) == [("00000.tar", "", "no captions")]


def test_what_the_index_alone_refuses_is_listed_first(tmp_path: Path) -> None:
    _write(tmp_path / "a.tar", _sample("a", "jpg", _image()), {"b.png": b"", "b.txt": b"noise"})
    assert [str(problem) for problem in lint(tmp_path)] == [
        f"{tmp_path}/a.tar: b: image not readable: cannot identify image file",
        f"{tmp_path}/a.tar: a: extension: .jpg holds PNG",
    ]


def test_a_telephone_s_jpeg_with_further_pictures_is_a_jpeg(tmp_path: Path) -> None:
    second = Image.new("RGB", (40, 30))
    _write(tmp_path / "a.tar", _sample("a", "jpg", _image("MPO", save_all=True, append_images=[second])))
    assert _found(tmp_path) == []


def test_a_problem_is_one_line_whatever_the_key(tmp_path: Path) -> None:
    _write(tmp_path / "a.tar", {"new\nline.png": b"", "\udcff.txt": b"x"})
    lines = [str(problem) for problem in lint(tmp_path)]
    assert [line.partition("a.tar: ")[2] for line in lines] == [
        r"new\nline: image not readable: cannot identify image file",
        r"\udcff: no image: only .txt (a key ends at the first dot of the name)",
    ]
    assert all("\n" not in line and line.encode() for line in lines)


def test_keys_of_several_shards_and_folders(tmp_path: Path) -> None:
    _write(tmp_path / "a" / "0.tar", _sample("x"), _sample("y"))
    _write(tmp_path / "b" / "0.tar", _sample("y"), _sample("z"))
    _write(tmp_path / "b" / "1.tar", _sample("z"), _sample("y"))
    assert list(lint(f"{tmp_path}/*/*.tar")) == [
        Problem(f"{tmp_path}/b/0.tar", "y", f"duplicate key: also in {tmp_path}/a/0.tar"),
        Problem(f"{tmp_path}/b/1.tar", "z", f"duplicate key: also in {tmp_path}/b/0.tar"),
        Problem(f"{tmp_path}/b/1.tar", "y", f"duplicate key: also in {tmp_path}/a/0.tar"),
    ]
    assert list(lint(tmp_path / "b" / "1.tar")) == []


@pytest.mark.parametrize("beside", [True, False])
def test_an_index_that_no_longer_fits(tmp_path: Path, beside: bool) -> None:
    folder = None if beside else tmp_path / "index"
    path = _write(tmp_path / "shards" / "a.tar", _sample("a"))
    index_shards(path, folder)
    assert _found(path, folder) == []
    before = path.stat()
    os.utime(path, ns=(1, 1))
    (problem,) = lint(path, folder)
    assert problem.reason.startswith("index: the shard changed since it was indexed (its samples are the same)")
    _write(path, _sample("b"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    (problem,) = lint(path, folder)
    assert problem.reason.startswith("index: it tells of other samples")
    _write(path, *[_sample(key) for key in "abcdefgh"])
    (problem,) = lint(path, folder)
    assert "bytes then" in problem.reason


def test_an_empty_shard_and_a_missing_one(tmp_path: Path) -> None:
    _write(tmp_path / "a.tar")
    assert list(lint(tmp_path)) == []
    with pytest.raises(UserError, match="no such folder or shard"):
        list(lint(tmp_path / "b.tar"))


def test_the_command(tmp_path: Path, mmdit: Callable) -> None:
    _write(tmp_path / "a.tar", _sample("a"), _sample("b", "jpg", _image()))
    done = mmdit("data", "lint", tmp_path)
    size = (tmp_path / "a.tar").stat().st_size
    assert (done.returncode, done.stdout.splitlines()) == (
        1,
        [
            f"{tmp_path}/a.tar: b: extension: .jpg holds PNG",
            f"1 problem in 2 samples of 1 shards, {size / 1e6:.1f} MB",
        ],
    )
    _write(tmp_path / "a.tar", _sample("a"))
    done = mmdit("data", "lint", tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1][:40]) == (0, "no problem in 1 samples of 1 shards, 0.0")
    assert mmdit("data", "lint", tmp_path / "none").returncode == 2


# ---- pre-encoded shards


@pytest.fixture
def encoded(stage, tmp_path: Path) -> Path:
    shutil.copytree(stage.encoded, tmp_path / "encoded", ignore=shutil.ignore_patterns(".claims"))
    for index in (tmp_path / "encoded").glob("*.index.*"):
        index.unlink()  # says when its shard was written, which copying keeps, but not what is changed below
    return tmp_path / "encoded"


def _change(folder: Path, change: Callable[[dict, dict], None], key: str = "000000003") -> None:
    """Rewrite one sample's tensors and JSON, and have the manifest know of it."""
    shard = folder / "00000.tar"
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    tensors, facts = load(members[f"{key}.safetensors"]), json.loads(members[f"{key}.json"])
    change(tensors, facts)
    members[f"{key}.safetensors"], members[f"{key}.json"] = save(tensors), json.dumps(facts).encode()
    _write(shard, members)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"]["00000.tar"]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("t5_dtype=float8", "captions.txt=txt", "captions.scene=json.caption", "captions.none=json.nothing"),
        ("text.pad=full", "text.t5_max_tokens=20", "dtype=float32"),
        ("text.clip_tokens=false", "text.clip_g=null", "min_side=30"),
        ("text.t5=null",),
    ],
)
def test_nothing_is_wrong_with_what_preencode_writes(stage, tmp_path, mmdit, settings) -> None:
    done = mmdit("preencode", stage.folder / "preencode.yaml", f"out={tmp_path}/out", *settings)
    assert done.returncode == 0, done.stderr
    assert list(lint(tmp_path / "out")) == []


def _set(name: str, index: object, value: float) -> Callable[[dict, dict], None]:
    def change(tensors: dict, facts: dict) -> None:
        tensors[name][index] = value

    return change


def _replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    def change(tensors: dict, facts: dict) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


def _both(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
    def change(tensors: dict, facts: dict) -> None:
        for name in ("latent_mean", "latent_logvar"):
            tensors[name] = make(tensors[name]).contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (_set("t5", (0, 5), float("nan")), ["non-finite: t5 has 1 of "]),
        (_set("latent_mean", 2, float("-inf")), ["non-finite: latent_mean has 64 of 256 values"]),
        (_replace("clip_l", torch.Tensor.float), ["dtype: clip_l is F32, manifest.json says BF16"]),
        (_both(lambda z: torch.cat([z, z])), ["latent: 8 channels, manifest.json says 4"]),
        (
            _both(lambda z: torch.cat([z, z], 2)),
            ["bucket: 64×32 pixels is none of the buckets in manifest.json", "bucket: JSON says [32, 32], the latent"],
        ),
        (_replace("t5", lambda t: t[:, :64]), ["shape: t5 is ["]),
        (
            _replace("pooled", lambda t: t[None]),
            ["samples: 39, manifest.json says 40", "safetensors not readable: pooled is BF16"],
        ),
        (
            _replace("clip_g", lambda t: t[:-1]),
            ["samples: 39, manifest.json says 40", "safetensors not readable: clip_g has "],
        ),
        (_replace("t5", lambda t: t.repeat(40, 1)), ["shape: t5 is ["]),
        (lambda tensors, facts: tensors.pop("clip_g"), ["tensors: clip_g is missing"]),
        (
            lambda tensors, facts: tensors.update(clip_h=tensors["pooled"].clone()),
            ["samples: 39, manifest.json says 40", "safetensors not readable: tensor 'clip_h'"],
        ),
        (
            lambda tensors, facts: tensors.update({"pooled.1": tensors["pooled"].clone()}),
            ["captions: tensors of caption 1", *(f"tensors: {n}.1 is missing" for n in ("clip_g", "clip_l", "t5"))],
        ),
        (lambda tensors, facts: facts.update(caption=""), ["caption missing: the text of 'txt'"]),
        (lambda tensors, facts: facts.pop("crop"), ["JSON: no crop"]),
    ],
)
def test_a_sample_that_does_not_fit_the_manifest(encoded: Path, change: Callable, reasons: list[str]) -> None:
    _change(encoded, change)
    problems = list(lint(encoded))
    assert {(Path(p.shard).name, p.key) for p in problems} <= {("00000.tar", "000000003"), ("00000.tar", "")}
    assert [problem.reason[: len(reason)] for problem, reason in zip(problems, reasons, strict=True)] == reasons


def test_a_caption_that_the_json_tells_of_but_not_the_tensors(stage, tmp_path, mmdit) -> None:
    out = tmp_path / "out"
    settings = ("captions.txt=txt", "captions.scene=json.caption")
    assert mmdit("preencode", stage.folder / "preencode.yaml", f"out={out}", *settings).returncode == 0

    def lose(tensors: dict, facts: dict) -> None:
        for name in list(tensors):
            if name.endswith(".1"):
                del tensors[name]

    for index in out.glob("*.index.*"):
        index.unlink()
    _change(out, lose)
    assert [problem.reason for problem in lint(out)] == ["caption missing: the tensors of 'scene'"]
    _change(out, lambda tensors, facts: facts["captions"].pop("scene"))  # a sample may lack it
    assert list(lint(out)) == []


def test_a_folder_that_does_not_fit_its_manifest(encoded: Path) -> None:
    data = bytearray((encoded / "00001.tar").read_bytes())
    data[3000] ^= 1  # a tensor's value, perhaps: it decodes to something
    (encoded / "00001.tar").write_bytes(data)
    shutil.copy(encoded / "00002.tar", encoded / "00007.tar")
    (encoded / "00002.tar").unlink()
    (encoded / ".00002.tar.host.1.tmp").touch()
    manifest = json.loads((encoded / "manifest.json").read_text())
    manifest["samples"] = 5
    (encoded / "manifest.json").write_text(json.dumps(manifest))
    assert _found(encoded) == [
        ("00001.tar", "", "sha256"),
        ("00007.tar", "", "shard"),
        ("00002.tar", "", "shard missing"),
        ("manifest.json", "", "samples"),
        ("00007.tar", "", "unfinished shard"),
        (".00002.tar.host.1.tmp", "", "temporary file"),
    ]
    assert _found(encoded / "00001.tar") == [("00001.tar", "", "sha256"), ("manifest.json", "", "samples")]


def test_a_cut_shard(encoded: Path) -> None:
    data = (encoded / "00000.tar").read_bytes()
    (encoded / "00000.tar").write_bytes(data[: len(data) // 2 // 512 * 512])
    found = _found(encoded)
    assert [kind for _, key, kind in found if not key] == ["damaged archive", "samples", "sha256"]
    assert {kind for _, key, kind in found if key} == {"incomplete"}


def test_a_folder_whose_pre_encoding_has_not_finished(encoded: Path) -> None:
    (encoded / "manifest.json").unlink()
    (encoded / "00002_stats.json").unlink()
    problems = [str(problem) for problem in lint(encoded)]
    assert problems == [
        f"{encoded}: manifest: no manifest.json; pre-encoding has not finished, run `mmdit preencode` again",
        f"{encoded}/00002.tar: unfinished shard: no 00002_stats.json",
    ]


def test_a_raw_sample_among_pre_encoded_ones(encoded: Path) -> None:
    _write(encoded / "00003.tar", _sample("a"))
    assert _found(encoded) == [
        ("00003.tar", "a", "not pre-encoded"),
        ("00003.tar", "", "shard"),
        ("00003.tar", "", "unfinished shard"),
    ]


def test_shards_on_a_web_server(encoded: Path, tmp_path: Path) -> None:
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    cache = ShardCache(CacheConfig(dir=tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/encoded"
            assert list(lint(url, cache=cache)) == []
            (encoded / "00001.tar").unlink()
            _change(encoded, _set("t5", (0, 5), float("nan")))
            problems = list(lint(f"{url}/", cache=cache))
        finally:
            server.shutdown()
            thread.join()
    assert [(p.shard, p.key, p.reason.partition(" has ")[0]) for p in problems] == [
        (f"{url}/00000.tar", "000000003", "non-finite: t5"),
        (f"{url}/00001.tar", "", "shard missing: manifest.json tells of 40 samples"),
    ]


def test_non_finite_float8(stage, tmp_path, mmdit) -> None:
    out = tmp_path / "out"
    assert mmdit("preencode", stage.folder / "preencode.yaml", f"out={out}", "t5_dtype=float8").returncode == 0
    for index in out.glob("*.index.*"):
        index.unlink()

    def spoil(tensors: dict, facts: dict) -> None:
        tensors["t5"].view(torch.uint8)[0, :3] = torch.tensor([0x7F, 0xFF, 0x7E], dtype=torch.uint8)
        tensors["t5_scale"][1] = float("inf")

    _change(out, spoil)
    reasons = [problem.reason for problem in lint(out)]
    assert {reason.partition(" of ")[0] for reason in reasons} == {"non-finite: t5 has 2", "non-finite: t5_scale has 1"}
