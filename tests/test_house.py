"""The rules of the rooms: imports go down and in no circle, packages keep their insides, functions stay short."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
HEIGHTS = {  # of a module or package; it imports what is as high or lower
    "train": 4, "sample": 4, "evaluate": 4, "clips.encode": 4,  # a script: a room of its own, above its package
    "page": 5,  # starts sample.py
    "show": 3, "training": 3,
    "motion_dreamer": 2,
    "svd": 1, "clips": 1, "inputs": 1, "metrics": 1,
    "instance_flow": 0, "kernels": 0, "sources": 0, "splat": 0, "weights": 0,
}  # fmt: skip
CLOSED = {"clips", "inputs", "metrics"}  # of other packages, these import only what the package itself offers
MOST_AT_THE_TOP = 9  # files
LONGEST = 80  # lines of a function


def read(root, files):
    """Syntax tree of every module by its dotted name; a package goes by its own name."""
    names = [Path(file).with_suffix("").parts for file in files]
    names = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]
    return {name: ast.parse((root / file).read_text()) for name, file in zip(names, files, strict=True)}


def tracked(*outside):
    """Our Python files, but for those in some folders."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs git and a checkout")
    files = [file for file in listed.stdout.splitlines() if (ROOT / file).exists()]
    return [file for file in files if Path(file).parts[0] not in outside]


def room(name):
    return name if name in HEIGHTS else name.split(".")[0]


def imported(name, tree, modules):
    """Modules of ours that a file imports anywhere, in a function too; with one of another package, that package."""
    told = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            told |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import, whose target its line does not show"
            told |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for target in told:
        while target and target not in modules:  # a name in a module
            target = target.rpartition(".")[0]
        if target:
            found |= {target} if room(target) == room(name) else {target, room(target)}
    return found


def graph_of(modules):
    return {name: imported(name, tree, modules) for name, tree in modules.items()}


def circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]


def upward(graph):
    return sorted(f"{a} -> {b}" for a in graph for b in graph[a] if HEIGHTS[room(b)] > HEIGHTS[room(a)])


def inside(graph):
    arrows = [(a, b) for a in graph if room(a) in CLOSED for b in graph[a]]
    return sorted(f"{a} -> {b}" for a, b in arrows if room(a) != room(b) and "." in b)


def is_script(tree):
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def comes_first(tree):
    """The first import of a file that may load torch."""
    harmless = sys.stdlib_module_names | {"numpy", "PIL"}
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in [node.module] if isinstance(node, ast.ImportFrom) else names:
            if name.split(".")[0] not in harmless:
                return name


def nodes(modules, kind):
    return [(name, node) for name, tree in modules.items() for node in ast.walk(tree) if isinstance(node, kind)]


def too_long(modules):
    functions = nodes(modules, (ast.FunctionDef, ast.AsyncFunctionDef))
    return {f"{name}.{node.name}" for name, node in functions if node.end_lineno - node.lineno >= LONGEST}


def bare_excepts(modules):
    return [f"{name}:{node.lineno}" for name, node in nodes(modules, ast.ExceptHandler) if node.type is None]


def test_no_module_has_the_name_of_what_its_package_offers():
    """Importing a module puts it into its package under its name, in the place of what was there."""
    for name, tree in read(ROOT, tracked("tests", "demo", "docs")).items():
        offered = {
            alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        modules = {path.stem for path in (ROOT / name).glob("*.py")} if (ROOT / name).is_dir() else set()
        assert not offered & modules, name


def test_imports_go_down_in_no_circle_and_not_into_other_packages():
    graph = graph_of(read(ROOT, tracked("tests", "demo", "docs")))
    assert {room(name) for name in graph} == HEIGHTS.keys()  # every module has a height
    assert graph["evaluate"] >= {"metrics", "training.tables"}
    assert "clips.simulate" in graph["training.scenes"]  # in a function
    assert circle(graph) is None and upward(graph) == [] and inside(graph) == []


def test_every_script_says_how_threads_wait_before_it_imports_torch():
    modules = read(ROOT, tracked())
    scripts = {name for name, tree in modules.items() if is_script(tree)}
    assert {"sample", "train", "evaluate", "clips.simulate", "demo.make", "tests.bench", "tests.measure"} <= scripts
    scripts -= {"tests.forks", "tests.test_draw", "demo.make_pictures"}  # of pytest; a browser; starts sample.py
    scripts |= {"tests.conftest"}
    found = {name: comes_first(modules[name]) for name in scripts if name.split(".")[0] != "clips"}
    assert set(found.values()) == {"kernels.threads"}, found
    assert comes_first(modules["clips"]) == "kernels"  # `python -m clips.x` imports the package first
    assert comes_first(ast.parse("import os\nimport torch\nimport kernels.threads")) == "torch"


@pytest.mark.parametrize("told", [None, "active"])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(told):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": told} if told else {}
    lines = "import kernels.threads, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", lines], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == [told or "passive", "False"]


def needed():
    """Of requirements.txt: each line's requirement and its reason. Those of optional packages are comments."""
    packaging = pytest.importorskip("packaging.requirements")
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        text, _, reason = line.removeprefix("# optional: ").partition("#")
        if text.strip():
            yield packaging.Requirement(text.strip()), reason.strip(), line.startswith("# optional: ")


def test_what_is_installed_is_what_is_needed_and_every_bound_has_a_reason():
    found = list(needed())
    assert {requirement.name for requirement, *_ in found} >= {"torch", "mujoco", "numba", "transformers", "pytest"}
    for requirement, reason, optional in found:
        assert not requirement.specifier or len(reason) > 10, f"{requirement}: why?"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            assert optional, requirement
            continue
        assert requirement.specifier.contains(version.split("+")[0], prereleases=True), f"{requirement}: {version}"


def test_a_test_without_the_mark_sees_no_gpu():
    """Nor do the processes that it starts: see conftest.py."""
    seen = "import torch; print(torch.cuda.is_available(), torch.cuda.device_count())"
    told = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "0"] and not torch.cuda.is_available() and not torch.cuda.device_count()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_few_files_lie_at_the_top():
    assert sum("/" not in file for file in tracked()) <= MOST_AT_THE_TOP


def test_functions_are_short_and_every_except_names_what_it_expects():
    assert too_long(read(ROOT, tracked("tests"))) == set()
    assert bare_excepts(read(ROOT, tracked())) == []


@pytest.fixture
def made(tmp_path):
    """Writes files by name and reads them as a house."""

    def write(**texts):
        files = {name.replace("__", "/") + ".py": text for name, text in texts.items()}
        files |= {f"{Path(file).parent}/__init__.py": "" for file in files if "/" in file}
        for file, text in files.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(text)
        return read(tmp_path, list(files))

    return write


def test_a_circle_is_found(made):
    told = {"svd": "import splat", "splat": "def f():\n    from weights import w", "weights": "w = 1"}
    assert circle(graph_of(made(**told))) is None
    assert sorted(set(circle(graph_of(made(**told | {"weights": "from svd import *"}))))) == ["splat", "svd", "weights"]
    through = {"splat": "from clips.clip import Clip", "clips__clip": "", "clips__check": "import splat"}
    assert circle(graph_of(made(**through))) is None
    modules = made(**through)
    modules["clips"] = ast.parse("from clips.check import check")  # loaded with clips.clip
    assert set(circle(graph_of(modules))) == {"splat", "clips", "clips.check"}


def test_an_arrow_upwards_is_found(made):
    told = {"sample": "import show, os", "show": "from inputs.photo import fit", "inputs__photo": "import sample.x"}
    assert upward(graph_of(made(**told))) == ["inputs.photo -> sample"]
    assert upward(graph_of(made(**told | {"inputs__photo": "import svd", "svd": ""}))) == []


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("clips__encode", "from training.cache import x", []),  # a script above its package
        ("clips__check", "from training.cache import x", ["clips.check -> training", "clips.check -> training.cache"]),
        ("clips__check", "from clips.encode import x", ["clips.check -> clips.encode"]),
        ("training__cache", "import clips.encode", ["training.cache -> clips.encode"]),
        ("svd", "def f():\n    from clips import encode", ["svd -> clips.encode"]),
    ],
)
def test_a_script_in_a_package_may_look_down_on_it_and_nothing_of_it_up(made, name, line, found):
    told = {"clips__encode": "", "clips__check": "", "training__cache": "", name: line}
    assert upward(graph_of(made(**told))) == found
    modules = made(**told)
    modules["clips"] = ast.parse("from clips.encode import encode")
    assert "clips -> clips.encode" in upward(graph_of(modules))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from inputs import fit", []),
        ("import inputs", []),
        ("from clips.clip import Clip", []),
        ("from inputs.photo import fit", ["clips.check -> inputs.photo"]),
        ("import inputs.photo as p", ["clips.check -> inputs.photo"]),
        ("def f():\n    from inputs import photo", ["clips.check -> inputs.photo"]),
    ],
)
def test_a_hand_in_another_package_is_found(made, line, found):
    graph = graph_of(made(clips__check=line, clips__clip="", inputs__photo="", show="from inputs.photo import fit"))
    assert inside(graph) == found


def test_long_functions_and_bare_excepts_are_found(made):
    body = "    x = 1\n" * (LONGEST - 1)
    modules = made(splat=f"def f():\n{body}\n\nclass A:\n  def g(self):\n{body}    x = 2\n")
    assert too_long(modules) == {"splat.g"}
    tried = "try:\n    pass\nexcept{}:\n    pass\n"
    assert bare_excepts(made(svd=tried.format(" OSError") + tried.format(""))) == ["svd:7"]
