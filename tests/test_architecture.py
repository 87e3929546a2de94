"""The rules of DESIGN's layout that code can check: which way imports point, and what stays small."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package of stack may import those of its own row and of the rows above.
LAYERS = [
    {"claims", "config", "dist", "files", "log", "shown", "yaml_text"},
    {"nn", "flow", "data", "text"},
    {"models"},
    {"parallel"},
    {"train"},
    {"preencode", "evaluate", "export"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SOURCES = [path for top in ("stack", "launch", "autoencoders") for path in sorted((ROOT / top).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        top, _, rest = name.partition(".")
        allowed = {"autoencoders": {"autoencoders"}, "stack": {"autoencoders", "stack"}}.get(parts[0])
        if top in ("stack", "launch", "autoencoders") and allowed is not None:
            assert top in allowed, f"{path} imports {name}"
        if parts[0] == "stack" and top == "stack" and parts[1] in LEVEL:
            target = rest.split(".")[0]
            assert LEVEL.get(target, 0) <= LEVEL[parts[1]], f"{path} imports {name}"


@pytest.mark.parametrize(
    ("module", "homes"),
    [
        ("deepspeed", {"stack/parallel/zero.py"}),
        ("transformers", {"stack/text/encoders.py"}),
        ("open_clip", {"stack/text/encoders.py"}),
        (
            "diffusers",
            {"autoencoders/codec.py", *(f"stack/models/{name}.py" for name in ("dit", "unet", "classifier"))},
        ),
        ("wandb", {"stack/log.py"}),
        ("submitit", {"launch/submit.py"}),
        ("triton", {"stack/nn/kernels/fused.py"}),
        ("torch_fidelity", {"stack/evaluate/metrics.py"}),
        ("sklearn", {"stack/data/digits.py"}),
    ],
)
def test_a_heavy_library_has_few_homes(module, homes):
    users = {str(p.relative_to(ROOT)) for p in SOURCES if any(n.split(".")[0] == module for n in imports(p))}
    assert users == homes


def locale_dependent(call: ast.Call) -> bool:
    """Whether a call opens a text file or a process's text stream without naming the encoding."""
    function, keywords = call.func, {keyword.arg: keyword.value for keyword in call.keywords}
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    if "encoding" in keywords or None in keywords:  # None: **options
        return False
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output", "check_call"):
        return bool({"text", "universal_newlines"} & keywords.keys())
    if name not in ("open", "fdopen") or owner in ("Image", "tarfile", "gzip") or (owner, name) == ("os", "open"):
        return False
    at = (
        0 if isinstance(function, ast.Attribute) and owner not in ("os", "io") else 1
    )  # path.open(mode), open(path, mode)
    mode = keywords.get("mode", call.args[at] if len(call.args) > at else ast.Constant("r"))
    return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_name_their_encoding(path):
    """ruff's PLW1514 finds only those calls whose object it knows to be a path."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [f"{path}:{call.lineno}" for call in calls if locale_dependent(call)]


def test_no_file_is_over_600_lines():
    assert not [path for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > 600]


@pytest.mark.parametrize("start", [["-c"], ["-m", "torch.distributed.run", "--nproc-per-node=1", "--no-python"]])
def test_tokenizers_is_the_package_from_pypi(start):
    """transformers imports it, and launchers put the repository's root, which has a folder of that name, first."""
    assert not list((ROOT / "tokenizers").rglob("*.py"))
    code = "import tokenizers; print(tokenizers.__file__); tokenizers.Tokenizer"
    command = [sys.executable, *start, *([sys.executable, "-c"] if start != ["-c"] else []), code]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout


def test_help_answers_without_the_heavy_libraries():
    """Importing torch alone takes over a second."""
    code = "import sys; sys.argv = ['mmdit', '--help']; import launch.cli; launch.cli.group(standalone_mode=False)"
    code += "; print(sorted({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)))"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 5
