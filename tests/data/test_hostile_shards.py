"""What a shard's author can put into it: code, and names that lead elsewhere. Through the commands that users type."""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from stack.data.index import SUFFIX, ShardIndex

ROOT = Path(__file__).parents[2]
RUN_BY_WEBDATASET = {"pyd", "pkl", "pickle", "pth"}
READ = ("png", "jpg", "webp", "safetensors")  # what is read here is no pickle either
GOOD = 10  # harmless samples beside the hostile ones


class Touch:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def payload(name: str, folder: Path) -> bytes:
    data = pickle.dumps(Touch(folder / name))
    return gzip.compress(data) if name.endswith(".gz") else data


def names() -> list[str]:
    """Every extension that webdataset decodes without being asked to, as it stands, packed and in capitals."""
    from webdataset import autodecode

    found = sorted({*autodecode.decoders, "pt"})
    return [*found, *(f"{name}.gz" for name in found), *(name.upper() for name in found), "emb.pth", "emb.PKL.gz"]


def of_kind(name: str) -> str:
    return name.lower().removesuffix(".gz").rpartition(".")[2]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, pack, sample):
    """A folder with a shard in which a pickle stands under each of the names, and ran/, where a loaded one shows."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "ran").mkdir()
    members = [member for number in range(GOOD) for member in sample(f"good{number}", number)]
    for name in names():
        own = dict(sample(name.replace(".", "-"), 1))
        extension = name.lower() if name in ("TXT", "JSON") else name  # in place of the sample's own
        own[f"{name.replace('.', '-')}.{extension}"] = payload(name, folder / "ran")
        members += own.items()
    for name in READ:
        own = dict(sample(f"as-{name}", 1))
        if name != "safetensors":
            del own[f"as-{name}.png"]
        members += {**own, f"as-{name}.{name}": payload(name, folder / "ran")}.items()
    pack(folder / "shards" / "00000.tar", members, tarfile.GNU_FORMAT)
    return folder


def ran(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "ran").iterdir())


def forbidden() -> set[str]:
    return {name.replace(".", "-") for name in names() if of_kind(name) in {*RUN_BY_WEBDATASET, "pt"}}


def test_plain_webdataset_runs_the_pickles(tmp_path, pack):
    """So the tests below can fail."""
    import webdataset

    (tmp_path / "ran").mkdir()
    for name in names():
        path = pack(tmp_path / "x.tar", [(f"a.{name}", payload(name, tmp_path / "ran"))])
        try:
            list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
        except Exception:  # what is no pickle, or does not load to the end
            continue
    assert {of_kind(name) for name in ran(tmp_path)} == RUN_BY_WEBDATASET
    assert set(ran(tmp_path)) == {name for name in names() if of_kind(name) in RUN_BY_WEBDATASET}
    with contextlib.suppress(tarfile.ReadError):
        list(webdataset.WebDataset(f"pipe:touch {tmp_path}/ran/pipe", shardshuffle=False))
    assert "pipe" in ran(tmp_path)


def test_no_pickle_runs_when_a_shard_is_indexed(hostile, mmdit, tmp_path):
    done = mmdit("data", "index", hostile / "shards", "--index", tmp_path)
    assert done.returncode == 0, done.stderr
    assert ran(hostile) == []
    [path] = tmp_path.rglob(f"*{SUFFIX}")
    index = ShardIndex("", path)
    rejected = dict(index.rejected)
    assert {index.key(row) for row in index.bad_captions} == {"txt", "TXT"}
    assert {key for key, reason in rejected.items() if reason.startswith("forbidden member")} == forbidden()
    others = {key: reason.partition(":")[0] for key, reason in rejected.items() if key not in forbidden()}
    assert others == {
        "as-png": "image not readable",
        "as-jpg": "image not readable",
        "as-webp": "image not readable",
        "as-safetensors": "safetensors not readable",
    }
    for key in rejected:
        assert f"\n  {key}: " in done.stdout


def test_no_pickle_runs_when_samples_are_encoded(hostile, mmdit, stage, tmp_path, listed):
    config = tmp_path / "preencode.yaml"
    values = yaml.safe_load((stage.folder / "preencode.yaml").read_text())
    own = {"source": str(hostile / "shards"), "out": str(tmp_path / "out"), "index": str(tmp_path / "index")}
    captions = {"a": "json.caption", "b": "txt"}
    config.write_text(yaml.safe_dump({**values, **own, "captions": captions, "max_rejected": 1}))
    done = mmdit("preencode", config)
    assert done.returncode == 0, done.stderr
    assert ran(hostile) == []
    rejected = listed(tmp_path / "out" / "rejected.jsonl")
    assert rejected.keys() == {*forbidden(), "txt", "TXT", "json", "JSON", *(f"as-{n}" for n in READ)}
    assert {rejected[key].partition(":")[0] for key in ("json", "JSON")} == {"JSON not readable"}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rejected"] == len(rejected)


def test_no_pickle_runs_when_images_are_trained_on(hostile, mmdit, stage, tmp_path, listed):
    options = (f"run.dir={tmp_path}/run", f"data.source={hostile}/shards", f"data.index={tmp_path}/index")
    done = mmdit("train", stage.folder / "autoencoder.yaml", *options, "data.max_rejected=1", "schedule.steps=1")
    assert done.returncode == 0, done.stderr
    assert ran(hostile) == []
    rejected = listed(tmp_path / "run" / "rejected.jsonl")
    assert rejected.keys() == {*forbidden(), *(f"as-{name}" for name in READ)}


def test_no_pickle_runs_in_place_of_an_index_a_manifest_or_a_pre_encoded_sample(mmdit, stage, tmp_path, pack):
    (tmp_path / "ran").mkdir()
    encoded = shutil.copytree(stage.encoded, tmp_path / "encoded")
    for path in encoded.glob("*.tar"):  # copytree keeps the times only to the microsecond
        assert mmdit("data", "index", path).returncode == 0
    for path in encoded.glob(f"*{SUFFIX}"):
        path.write_bytes(payload("index", tmp_path / "ran"))
    config = stage.train_config("pickled", run={"dir": str(tmp_path / "run")}, schedule={"steps": 1})
    assert mmdit("train", config, f"data.path={encoded}").returncode == 0
    with tarfile.open(encoded / "00000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    for name in ("safetensors", "pkl"):
        replaced = dict(members)
        replaced[f"000000000.{name}"] = payload(name, tmp_path / "ran")
        pack(encoded / "00000.tar", sorted(replaced.items()))
        assert mmdit("data", "index", encoded).returncode == 0
        done = mmdit("train", config, f"data.path={encoded}")
        assert (done.returncode, "00000.tar: 39 samples, manifest.json says 40" in done.stderr) == (2, True)
    (encoded / "manifest.json").write_bytes(payload("manifest", tmp_path / "ran"))
    done = mmdit("train", config, f"data.path={encoded}")
    assert (done.returncode, "not valid JSON" in done.stderr) == (2, True)
    assert ran(tmp_path) == []


def test_nothing_here_can_unpickle_or_evaluate():
    """The whole of the source: no module that does so is imported, no such function is called."""
    modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code"}
    calls = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "os.system"}
    calls |= {"os.popen", "subprocess.getoutput", "webdataset.WebDataset", "webdataset.DataPipeline"}
    for path in (path for top in ("stack", "launch", "autoencoders") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not modules & {str(name).partition(".")[0] for name in named}, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, path
                assert not any(keyword.arg in ("shell", "allow_pickle") for keyword in node.keywords), path


# ---- names

LONG = 10_000
NAMES = {
    "up": "../../outside/up",
    "up in the middle": "a/../../outside/middle",
    "absolute": "/tmp/outside-absolute",
    "Windows": "w\\..\\..\\outside\\windows",
    "drive": "C:\\outside\\drive",
    "share": "\\\\server\\share\\outside",
    "zero": "nul\0/../outside",
    "long": "long/" + "x" * LONG,
    "longer": "longer/" + "é" * 500_000,
    "not UTF-8": "latin\udce4\udcff",
    "line": 'line\n{"shard": "forged"}',
    "terminal": "terminal\x1b]0;owned\x07\x1b[2J\r",
    "right to left": "rtl\u202egnp",
    "quotes": "q\"'`$(touch outside)",
    "dash": "--delete",
}
OUTSIDE = {NAMES[name] for name in ("up", "up in the middle", "absolute", "drive", "share")} | {"w\\"}


@pytest.fixture(scope="module")
def misnamed(tmp_path_factory, pack, sample):
    """One shard in each of tar's formats that can hold such names."""
    folder = tmp_path_factory.mktemp("misnamed")
    members = [member for number in range(GOOD) for member in sample(f"good{number}", number)]
    members += [member for name in NAMES.values() for member in sample(name, 2)]
    members += [(f"good3.{'extension' * 1000}", b""), ("good4.\udcff", b""), (".png", b""), ("..png", b""), ("/", b"")]
    keys = [name.partition(".")[0] for name, _ in members]
    order = sorted(range(len(members)), key=lambda at: keys[at] if keys[at].startswith("good") else "")
    members = [members[at] for at in order]  # those of a sample together
    pack(folder / "00000.tar", members, tarfile.PAX_FORMAT)
    pack(folder / "00001.tar", [member for member in members if "\0" not in member[0]], tarfile.GNU_FORMAT)
    return folder


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_no_name_leads_out_of_the_folders_of_an_index_and_of_the_output(
    misnamed, mmdit, stage, tmp_path, listed, monkeypatch
):
    (tmp_path / "inside" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inside" / "work")
    before = tree(misnamed)
    done = mmdit("data", "index", misnamed, "--index", tmp_path / "inside" / "index")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "inside" / "out"
    options = (f"source={misnamed}", f"out={out}", f"index={tmp_path}/inside/index", "max_rejected=1")
    encoded = mmdit("preencode", stage.folder / "preencode.yaml", *options)
    assert encoded.returncode == 0, encoded.stderr
    assert tree(misnamed) == before
    assert not Path("/tmp/outside-absolute.png").exists()
    shards = ["00000", "00001"]
    [parent] = (path.name for path in (tmp_path / "inside" / "index").iterdir())
    expected = {"inside", "inside/work", "inside/out", "inside/out/.claims", "inside/index", f"inside/index/{parent}"}
    expected |= {f"inside/index/{parent}/{shard}{SUFFIX}" for shard in shards}
    expected |= {f"inside/out/{shard}{ending}" for shard in shards for ending in (".tar", SUFFIX, "_stats.json")}
    assert tree(tmp_path) == expected | {"inside/out/manifest.json", "inside/out/rejected.jsonl"}
    for shard in shards:
        with tarfile.open(out / f"{shard}.tar") as tar:
            for member in tar:
                assert member.isfile()
                assert not {"..", ""} & set(member.name.split("/"))
    rejected = listed(out / "rejected.jsonl")
    assert {key for key, reason in rejected.items() if reason == "path outside the archive"} == OUTSIDE
    assert all(len(text) <= 300 for entry in rejected.items() for text in entry)
    for text in (done.stdout, done.stderr, encoded.stdout, encoded.stderr):
        assert all(line.isprintable() for line in text.split("\n"))
        text.encode()  # a terminal takes no half characters
        assert '\n{"shard": "forged"}' not in text


def test_indices_of_misnamed_members_are_well_formed(misnamed, mmdit, tmp_path):
    assert mmdit("data", "index", misnamed, "--index", tmp_path).returncode == 0
    paths = sorted(tmp_path.rglob(f"*{SUFFIX}"))
    assert len(paths) == 2
    for path in paths:
        index = ShardIndex("x.tar", path)
        assert {f"good{number}" for number in range(GOOD)} <= set(index.keys)
        assert index.extensions == ["json", "png", "txt"]
        assert index.rejected
        with safe_open(path, framework="np") as file:  # the format's own reader agrees
            facts = json.loads(file.metadata()["index"])
            assert json.loads(file.get_tensor("rejected").tobytes()) == [list(pair) for pair in index.rejected]
        assert int.from_bytes(path.read_bytes()[:8], "little") < 2**16
        assert facts["damage"] == ""


def test_a_shard_of_long_names_alone_has_an_index_that_can_be_read(tmp_path, pack):
    """As a header the reasons took more than a safetensors file may have."""
    from stack.data.index import build_index

    members = [(str(number) + "\udcff" * 1_000_000 + ".png", b"") for number in range(8)]
    index = build_index(pack(tmp_path / "x.tar", members, tarfile.GNU_FORMAT))
    assert len(index.rejected) == 8
    index.save(tmp_path / "x.index")
    assert (tmp_path / "x.index").stat().st_size < 2**16


def test_as_many_extensions_as_samples_take_no_more_memory_than_few(tmp_path, pack, sample):
    from stack.data.index import build_index

    few, many = ([*sample("a"), *sample("b"), *sample("c")] for _ in range(2))
    many = [*many, *((f"c.x{number}", b"") for number in range(1000))]
    sizes = []
    for name, members in (("few", few), ("many", many)):
        index = build_index(pack(tmp_path / f"{name}.tar", members))
        assert index.keys == ["a", "b", "c"]
        index.save(tmp_path / f"{name}.index")
        sizes.append((tmp_path / f"{name}.index").stat().st_size)
    assert sizes[1] < sizes[0] + 64
