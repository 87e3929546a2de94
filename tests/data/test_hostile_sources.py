"""What a source may not be, for every key that names shards: a shell, a chain, an expansion, a device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stack.config import UserError
from stack.data.sources import find_shards

ROOT = Path(__file__).parents[2]
# {ran} is a file that must not appear, {folder} one of harmless shards.
REFUSED = {
    "pipe": ("pipe:touch {ran}", "runs a shell"),
    "chained": ("simplecache::file://{folder}/00000.tar", "'::' is not expanded"),
    "zip in a URL": ("zip://x.tar::file://{folder}/00000.tar", "'::' is not expanded"),
    "variable": ("{folder}/${HOME}/x.tar", "'${' is not expanded"),
    "command": ("{folder}/$(touch {ran}).tar", "'$(' is not expanded"),
    "backticks": ("{folder}/`touch {ran}`.tar", "'`' is not expanded"),
    "interpolation": ("${oc.env:HOME}/x.tar", "'${' is not expanded"),
    "huge braces": ("{folder}/{0..999999999}.tar", "more than 1,000,000 shards"),
    "nested braces": ("{folder}/{0..99999}/{0..99999}.tar", "more than 1,000,000 shards"),
    "backwards": ("{folder}/{00001..00000}.tar", "counts backwards"),
    "half a URL": ("https://***@host/x.tar", "not saved"),
    "a device": ("file:///dev/zero", "not a regular file"),
    "a named pipe": ("file://{folder}/../fifo.tar", "not a regular file"),
    "a folder of the kernel": ("file:///proc/self/fd/*.tar", "no such"),
    "no host": ("file://localhost{folder}", "no such folder or shard"),
    "an unknown protocol": ("pipes://x/y.tar", "unknown protocol 'pipes'"),
}
KEYS = ("data index", "source", "data.source", "data.source mixture", "data.path", "data.path mixture")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pack, sample):
    folder = tmp_path_factory.mktemp("sources")
    pack(folder / "shards" / "00000.tar", [member for number in range(3) for member in sample(str(number), number)])
    os.mkfifo(folder / "fifo.tar")
    return folder


def command(key: str, source: str, stage, run: Path) -> list[object]:
    """The command line that gives `source` under this key."""
    if key == "data index":
        return ["data", "index", source]
    if key == "source":
        return ["preencode", stage.folder / "preencode.yaml", f"source={source}", f"out={run}"]
    name, _, mixture = key.partition(" ")
    config = stage.folder / "autoencoder.yaml"
    if name == "data.path":
        config = stage.train_config("hostile-source")
    value = source if not mixture else {source: 0.5, "/nowhere": 0.5}
    kind = name.partition(".")[2]
    path = run.with_suffix(".yaml")
    path.write_text(
        yaml.safe_dump({"base": str(config), "run": {"dir": str(run)}, "data": {kind: value}}, sort_keys=False)
    )
    return ["train", path]


@pytest.mark.parametrize("key", KEYS)
def test_hostile_sources_are_refused_in_one_line(key, folder, stage, mmdit, tmp_path):
    for number, (text, says) in enumerate(REFUSED.values()):
        source = text.replace("{folder}", str(folder / "shards")).replace("{ran}", str(tmp_path / "ran"))
        began = time.monotonic()
        done = mmdit(*command(key, source, stage, tmp_path / str(number)))
        assert done.returncode == 2, (source, done.stderr)
        assert "Traceback" not in done.stderr
        line = done.stderr.strip().split("\n")[-1]
        # A folder of pre-encoded shards is looked for before there are any shards to find in it.
        alike = says in line or (key.startswith("data.path") and "no such folder" in line)
        assert alike, (source, line)
        assert time.monotonic() - began < 10
    assert not (tmp_path / "ran").exists()
    assert not list(Path("/dev").glob("*index*"))


def test_braces_are_not_written_out_before_they_are_counted():
    """In a process that may have little memory: a thousand million names take a hundred gigabytes."""
    code = """
import resource
from pathlib import Path
from stack.config import UserError
from stack.data.sources import find_shards
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**31, mapped + 2**31))
for source in SOURCES:
    try:
        find_shards(source)
    except UserError as error:
        print(str(error)[-80:])
"""
    sources = ["x/{0..999999999}.tar", "x/" + "{0..9}" * 30, "x/" + "{,}" * 500, "https://host/{0..999999999}.tar"]
    sources += ["x/{0..%s}.tar" % ("9" * 5000), "{" * 5000 + "0..1" + "}" * 5000]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("SOURCES", repr(sources))], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    lines = done.stdout.splitlines()
    assert [line.endswith("more than 1,000,000 shards") for line in lines] == [True] * 4 + [False] * 2
    assert len(lines) == len(sources)


def test_files_by_their_url_are_found_where_the_path_is(folder, stage, mmdit, tmp_path):
    assert find_shards(f"file://{folder}/shards") == find_shards(folder / "shards")
    config = stage.train_config("by-url", run={"dir": str(tmp_path / "run")}, schedule={"steps": 1})
    done = mmdit("train", config, f"data.path=file://{stage.encoded}")
    assert done.returncode == 0, done.stderr


def test_what_is_no_tar_has_no_samples_and_gets_no_index_where_none_can_be(mmdit):
    done = mmdit("data", "index", "file:///proc/self/environ")
    assert (done.returncode, "broken: bad header at byte 0" in done.stdout) == (0, True)
    assert done.stdout.endswith("0 samples in 1 shards\n")


def test_a_folder_that_ends_in_tar_is_no_shard(tmp_path):
    from stack.data.shards import index_shards

    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        index_shards(tmp_path)
