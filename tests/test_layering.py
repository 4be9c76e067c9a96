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
# `dvd bench` is a subcommand like the others; its options are read at start, the benchmarks themselves when they run.
EXCEPTIONS = {("deploy/cli.py", "benchmarks")}
ONLY_DEPLOY = {"ray"}
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
HTTP_CLIENTS = {"aiohttp", "http.client", "httpcore", "httpx", "requests", "urllib.request", "urllib3"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "send_pyobj", "recv_pyobj"}
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
        for _, module in imported_modules(path)
        if module.split(".")[0] in HTTP_CLIENTS or module in HTTP_CLIENTS
    ]
    assert clients == [("router/fetch/fetcher.py", "httpcore")]


def test_nothing_unpickles_or_evaluates():
    """RELIABILITY.md section 5.9, on the syntax tree, without exceptions."""
    wrong = []
    for path in python_files(*MAY_IMPORT):
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {module}"
            for line, module in imported_modules(path)
            if module.split(".")[0] in BANNED_MODULES
        ]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and _called(node) in BANNED_CALLS:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {_called(node)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                wrong.append(f"{path.relative_to(ROOT)}:{node.value.lineno} mentions trust_remote_code")
    assert not wrong


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return name if name.endswith("_pyobj") else f"{owner}.{name}"
        case _:
            return ""
