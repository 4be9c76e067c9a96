"""House rules that nobody should have to remember: which folder may import which, and what nobody may call."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "protos": {"protos"},
    "common": {"common", "protos"},
    "vision_server": {"vision_server", "common", "protos"},
    "language_server": {"language_server", "common", "protos"},
    "router": {"router", "common", "protos"},
    "deploy": {"deploy", "vision_server", "language_server", "router", "common", "protos"},
    "dvd": {"dvd", "deploy", "common"},
    "benchmarks": {"benchmarks", "deploy", "vision_server", "language_server", "router", "common", "protos"},
}
# `dvd bench` and `dvd plan` are subcommands like the others: options are read at start, the rest when they run.
EXCEPTIONS = {("deploy/cli.py", "benchmarks")}
ONLY_DEPLOY = {"ray"}
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
HTTP_CLIENTS = {
    *("aiohttp", "http.client", "httpcore", "httpcore2", "httplib2", "httpx", "niquests", "pycurl", "requests"),
    *("urllib.request", "urllib3", "websockets"),
}
BANNED_CALLS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "__import__", "send_pyobj", "recv_pyobj", "torch.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load"),
}
BANNED_NAMES = BANNED_CALLS - {"eval", "exec", "__import__"}
TORCH_FREE = (
    "router",
    "protos",
    "common/service",
    "common/model/config.py",
    "common/model/geometry.py",
    "common/transport/base.py",
    "deploy/cli.py",
    "deploy/chat.py",
    "deploy/images.py",
    "deploy/offline",
    "dvd",
)


def python_files(*folders: str) -> list[Path]:
    files: list[Path] = []
    for folder in folders:
        path = ROOT / folder
        files.extend([path] if path.is_file() else path.rglob("*.py"))
    return [path for path in files if "_pb2" not in path.name]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Modules, and what is imported from them."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
    yield from imported_modules(path)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in python_files(folder)
        for line, module in imported_modules(path)
        if (top := module.split(".")[0]) in MAY_IMPORT and top not in MAY_IMPORT[folder]
        if (str(path.relative_to(ROOT)), top) not in EXCEPTIONS
    ]
    assert not wrong


def test_only_deploy_imports_ray():
    folders = [folder for folder in MAY_IMPORT if folder != "deploy"]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files(*folders)
        for line, module in imported_modules(path)
        if module.split(".")[0] in ONLY_DEPLOY
    ]
    assert not wrong


def test_modules_of_the_router_process_never_import_torch():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in python_files(*TORCH_FREE)
        for line, module in imported_modules(path)
        if module.split(".")[0] in {"torch", "transformers"}
    ]
    assert not wrong


def test_one_file_asks_strangers():
    """RELIABILITY.md section 5.2: a second fetcher would have its own idea of what is allowed."""
    clients = [
        (str(path.relative_to(ROOT)), module)
        for path in python_files("router", "common", "vision_server", "language_server")
        for _, module in sorted(imported_names(path))
        if module.split(".")[0] in HTTP_CLIENTS or module in HTTP_CLIENTS
    ]
    assert clients == [("router/fetch/fetcher.py", "httpcore")]


def test_nothing_unpickles_or_evaluates():
    """RELIABILITY.md section 5.9, on the syntax tree, without exceptions."""
    wrong = [f"{path.relative_to(ROOT)}:{fault}" for path in python_files(*MAY_IMPORT) for fault in faults(path)]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import dill, json", "from marshal import loads"),
        *(
            "torch.load(path)",
            "from torch import load",
            "np.load(path, allow_pickle=True)",
            "np.load(path, None, flag)",
        ),
        *("yaml.load(text, yaml.SafeLoader)", "from yaml import unsafe_load", "self.socket.recv_pyobj()"),
        *("socket.send_pyobj(x)", "eval(text)", "exec(text)", "builtins.eval(text)", '__import__("os")'),
        *("AutoModel.from_pretrained(path, trust_remote_code=flag)",),
    ],
)
def test_a_fault_is_seen(tmp_path, line):
    (tmp_path / "bad.py").write_text(f"x = 1\n{line}\n")
    assert list(faults(tmp_path / "bad.py"))


def test_what_is_no_fault(tmp_path):
    lines = ["model.eval()", "yaml.safe_load(text)", "json.load(file)", "numpy.load(path, allow_pickle=False)"]
    (tmp_path / "good.py").write_text("\n".join(lines))
    assert not list(faults(tmp_path / "good.py"))


def faults(path: Path) -> Iterator[str]:
    for line, name in imported_names(path):
        if name.split(".")[0] in BANNED_MODULES or name in BANNED_NAMES:
            yield f"{line} imports {name}"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and (_called(node) in BANNED_CALLS or _loads_any_array(node)):
            yield f"{node.lineno} calls {_called(node)}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            yield f"{node.value.lineno} mentions trust_remote_code"


def _loads_any_array(call: ast.Call) -> bool:
    """``np.load`` with ``allow_pickle``, by name or as its third argument, unless it says False."""
    flags = [keyword.value for keyword in call.keywords if keyword.arg == "allow_pickle"]
    if _called(call) in ("np.load", "numpy.load"):
        flags += call.args[2:3]
    return any(not (isinstance(flag, ast.Constant) and flag.value is False) for flag in flags)


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return name if name.endswith("_pyobj") else f"{owner}.{name}"
        case ast.Attribute(attr=("recv_pyobj" | "send_pyobj") as name):
            return name
        case _:
            return ""
