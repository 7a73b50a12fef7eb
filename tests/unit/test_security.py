"""No file can run code, no value can become a shell command, nothing listens for the world."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("moco_dist", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# A rank and the workers that it forked talk over a socket that nobody else has, as multiprocessing does: no file, and
# nothing from outside.
BETWEEN_OWN_PROCESSES = {
    "moco_dist/data/processes.py",
    "moco_dist/data/shared_memory.py",
    "benchmarks/checkpoint_planning.py",
}
# Others' JSON is read by files.parsed_json: nested deeply enough it ends json.loads by an error of its own.
JSON_OF_OWN_RANKS = {"moco_dist/files.py", "moco_dist/distributed/agreement.py", "moco_dist/doctor/hosts.py"}
FORBIDDEN_CALLS = {
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval", "exec", "np.fromfile",
    "subprocess.getoutput", "subprocess.getstatusoutput", "torch.jit.load", "marshal.loads",
}  # fmt: skip


def offences(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {alias.name}" for alias in node.names if alias.name in FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_IMPORTS:
            yield f"imports {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in FORBIDDEN_CALLS:
                yield f"calls {name}"
            if name == "torch.load" and keywords.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if name == "np.load" and keywords.get("allow_pickle", "False") != "False":
                yield "np.load of pickles"
            if keywords.get("shell", "False") != "False":
                yield f"{name} by a shell"
        elif isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield "listens on every address"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_has_nothing_dangerous(path):
    found = list(offences(ast.parse(path.read_text())))
    assert found == (["imports pickle"] if str(path.relative_to(ROOT)) in BETWEEN_OWN_PROCESSES else [])


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "moco_dist")], ids=str)
def test_json_of_others_may_be_nested_deeply(path):
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not calls & {"json.load", "json.loads"} or str(path.relative_to(ROOT)) in JSON_OF_OWN_RANKS


@pytest.mark.parametrize(
    "text",
    ["import pickle", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)", "os.system(x)",
     "subprocess.run(x, shell=True)", "bind('0.0.0.0')", "np.load(f, allow_pickle=True)"],
)  # fmt: skip
def test_it_would_be_found(text):
    assert list(offences(ast.parse(text)))
