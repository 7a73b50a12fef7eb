"""What people get wrong: one clear line each that names the thing, what is allowed and the nearest; nothing is lost."""

# ruff: noqa: E501 (a case is a line)

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moco_dist.cli.main import main
from tests.faults.processes import TINY

pytestmark = pytest.mark.slow
PRETRAIN = ["pretrain", "--data.root", "DATA", "--run.dir", "RUN", *TINY, "--run.stop-at-step", "4"]
NEW = ["pretrain", "--data.root", "DATA", "--run.dir", "NEW", *TINY]  # a folder where nothing is yet
MANIFEST = "checkpoints/step_00000002/checkpoint.json"

# id: (words, what the one line says, as a regular expression)
COMMAND_LINE = {
    "no such command": (["pretrian"], r"unknown command 'pretrian'; .*did you mean pretrain\?"),
    "flag misspelt": ([*NEW, "--optim.base-lrr", "1"], r"unknown flag --optim\.base-lrr; did you mean --optim\.base-lr\?"),
    "section misspelt": ([*NEW, "--optm.base-lr", "1"], r"did you mean --optim\.base-lr\?"),
    "flag without section": ([*NEW, "--base-lr", "1"], r"did you mean --optim\.base-lr\?"),
    "stray word": ([*NEW, "fast"], "unexpected argument 'fast'; settings are given as --section.key VALUE"),
    "flag without value": ([*NEW, "--optim.base-lr"], r"--optim\.base-lr: expected one argument"),
    "text for a number": ([*NEW, "--optim.base-lr", "high"], r"optim\.base_lr: 'high' is not a valid number"),
    "negative rate": ([*NEW, "--optim.base-lr", "-1"], r"optim\.base_lr: -1 is not greater than 0"),
    "rate is no number": ([*NEW, "--optim.base-lr", ".nan"], r"optim\.base_lr: nan is not"),
    "fraction of an epoch": ([*NEW, "--optim.epochs", "1.5"], r"optim\.epochs: 1\.5 is not a valid integer"),
    "yes for a number": ([*NEW, "--optim.epochs", "yes"], r"optim\.epochs: true is not a value for it"),
    "no epochs": ([*NEW, "--optim.epochs", "0"], r"optim\.epochs: 0 is not greater than 0"),
    "wrong optimiser": ([*NEW, "--optim.optimizer", "larz"], r"'larz' is not one of 'sgd', 'lars' or 'adamw'; did you mean lars\?"),
    "wrong arch": ([*NEW, "--model.arch", "resnet5"], r"model\.arch: 'resnet5' is not one of .*did you mean resnet50\?"),
    "wrong precision": ([*NEW, "--optim.precision", "bf61"], r"'bf61' is not one of .*did you mean bf16\?"),
    "wrong schedule": ([*NEW, "--optim.schedule", "cosin"], r"did you mean cosine\?"),
    "wrong exchange": ([*NEW, "--shuffle.exchange", "all_to_al"], r"did you mean all_to_all\?"),
    "wrong loader": ([*NEW, "--data.loader", "torchvison"], r"did you mean torchvision\?"),
    "wrong policy": ([*NEW, "--data.on-error", "skip"], r"'skip' is not one of 'fail' or 'skip-and-report'"),
    "wrong device": ([*NEW, "--run.device", "gpu"], r"run\.device: 'gpu' is not one of 'auto', 'cpu' or 'cuda'"),
    "wrong recipe": ([*NEW, "--augment.recipe", "v3"], r"augment\.recipe: 'v3' is not one of 'v1', 'v2'.*did you mean v2"),
    "probability above 1": ([*NEW, "--augment.blur-probability", "2"], r"blur_probability: 2 is not less than or equal to 1"),
    "range upside down": ([*NEW, "--augment.crop-scale", "[1, 0.2]"], r"crop_scale \(1\.0, 0\.2\) is not a range"),
    "range of three": ([*NEW, "--augment.crop-scale", "[0.1, 0.2, 1]"], r"augment\.crop_scale"),
    "temperature 0": ([*NEW, "--moco.temperature", "0"], r"moco\.temperature: 0 is not greater than or equal to 0\.01"),
    "momentum 1": ([*NEW, "--moco.momentum", "1"], r"moco\.momentum: 1 is not less than 1"),
    "batch that does not divide": ([*NEW, "--optim.global-batch-size", "10"], r"10 is not a multiple of 4 .* 8 and 12 are"),
    "queue under a batch": ([*NEW, "--moco.queue-size", "4"], r"moco\.queue_size 4 holds less than the 8 keys .* 8 is the smallest"),
    "image of 4 pixels": ([*NEW, "--data.image-size", "4"], r"data\.image_size: 4 is not greater than or equal to 8"),
    "negative workers": ([*NEW, "--data.num-workers", "-1"], r"data\.num_workers: -1 is not"),
    "zero stage without deepspeed": ([*NEW, "--engine.zero-stage", "1"], r"engine\.zero_stage 1 needs engine\.kind deepspeed"),
    "graphs without compile": ([*NEW, "--engine.cuda-graphs", "true"], r"engine\.cuda_graphs needs engine\.compile"),
    "fp64 with deepspeed": ([*NEW, "--engine.kind", "deepspeed", "--optim.precision", "fp64"], "bf16 and fp32 do"),
    "keep no checkpoint": ([*NEW, "--checkpoint.keep-last", "0"], r"checkpoint\.keep_last: 0 is not greater than 0"),
    "tracking uri misspelt": ([*NEW, "--tracking.backend", "mlflow", "--tracking.uri", "htpp://x"], r"did you mean http\?"),
    "nothing required": (["pretrain"], r"run\.dir is required"),
    "no such config": (["pretrain", "CONFIGS/tyni.yaml"], r"tyni\.yaml does not exist; did you mean tiny\.yaml\?"),
    "knn without a run": (["knn"], "run_dir is required"),
    "knn of nothing": (["knn", "--run-dir", "NEW"], r"run_dir .*new is not the folder of a run: it has no config\.yaml"),
    "no neighbours": (["knn", "--run-dir", "RUN", "--neighbours", "[]"], "neighbours"),
    "wrong encoder": (["knn", "--run-dir", "RUN", "--encoders", "traind"], r"did you mean trained\?"),
    "label fraction 0": (["linear", "--run-dir", "RUN", "--data.label-fraction", "0"], r"label_fraction: 0 is not greater than 0"),
    "report of nothing": (["report", "NEW"], r"new is not the folder of a run: it has no config\.yaml"),
    "report without a run": (["report"], "moco-dist report: the following arguments are required: run"),
    "report misspelt flag": (["report", "RUN", "--hlep"], r"unrecognized arguments: --hlep; did you mean --help\?"),
    "sync of nothing": (["sync", "NEW"], r"run folder .*new does not exist"),
    "sync of an untracked run": (["sync", "RUN"], r"run is not tracked: it has no mlflow\.json"),
    "no such data set": (["data", "prepare", "fasion-mnist", "--out", "NEW"], r"did you mean fashion-mnist\?"),
    "no such data action": (["data", "prepar"], r"invalid choice: 'prepar' .*; did you mean prepare\?"),
    "data set of nothing": (["data", "prepare", "imagefolder", "--out", "NEW"], "needs --source"),
    "wrong format": (["export", "RUN", "--format", "timmm", "--out", "NEW"], r"did you mean timm\?"),
    "wrong place": (["launch", "slurn", "CONFIGS/tiny.yaml"], r"launch 'slurn': .* did you mean slurm\?"),
    "launch without a config": (["launch", "local"], "launch needs a config file"),
    "launch with no GPUs": (["launch", "local", "CONFIGS/tiny.yaml", "--gpus-per-node", "-1"], "gpus_per_node: -1 is not"),
    "launch misspelt option": (["launch", "local", "CONFIGS/tiny.yaml", "--gpu-per-node", "1"], r"did you mean --gpus-per-node\?"),
    "launch that does not divide": (["launch", "local", "CONFIGS/tiny.yaml", "--gpus-per-node", "3"], "8 is not a multiple of 12"),
    "launch of two hosts without a head": (["launch", "torchrun", "CONFIGS/tiny.yaml", "--nodes", "2"], "need --head"),
    "config after flags": ([*NEW, "CONFIGS/tiny.yaml"], r"unexpected argument '.*tiny\.yaml'; config files come first"),
    "list without brackets": ([*NEW, "--augment.blur-sigma", "[1, 2]", "3", "4"], r"unexpected argument '3' '4'; .*lists as '\[1, 2\]'"),
    "one dash": ([*NEW, "-optim.base-lr", "1"], r"unexpected argument '-optim\.base-lr' '1'; settings are given as"),
    "list too short": ([*NEW, "--augment.jitter", "[0.4, 0.4]"], r"augment\.jitter: \[FLOAT, FLOAT, FLOAT, FLOAT\] is expected"),
    "colours without spread": ([*NEW, "--augment.std", "[0, 1, 1]"], r"augment\.std\.0: 0 is not greater than 0"),
    "nothing for a number": ([*NEW, "--optim.base-lr", ""], r"optim\.base_lr: null is not a valid number"),
    "seed too large": ([*NEW, "--run.seed", "99999999999"], r"run\.seed: 99999999999 is not less than 2147483648"),
    "fewer images than a batch": ([*NEW, "--data.max-samples", "4"], r"has 4 images, less than one batch .*size 8\)"),
    "no config of that name": (["pretrain", "mocov2_r50_20ep"], r"mocov2_r50_20ep does not exist; moco-dist configs lists .*; did you mean mocov2_r50_200ep\?"),
    "no config to show": (["configs", "show", "dmeo"], r"^error: no config dmeo comes with moco_dist; .*; did you mean demo\?$"),
    "folder for a config": (["pretrain", "CONFIGS"], r"configs is a folder where a config file is expected"),
    "validation that is not there": ([*NEW, "--data.root", "DATA/train", "--log.knn-every-epochs", "50"], "has no validation set"),
    "other network": ([*PRETRAIN, "--model.embedding-dim", "64", "--run.resume", "changed"], r"give another --run\.dir or these settings again:\n.*model\.embedding_dim: 128 in step_00000004, now 64"),
    "other queue": ([*PRETRAIN, "--moco.queue-size", "32", "--run.resume", "changed"], r"moco\.queue_size: 64 in step_00000004, now 32"),
    "run flag misspelt": (["knn", "--rundir", "RUN"], r"^error: unknown flag --rundir; did you mean --run-dir\?$"),
    "config of another command": (["knn", "CONFIGS/tiny.yaml", "--run-dir", "RUN"], r"tiny\.yaml is one of moco-dist pretrain"),
    "evaluation's config": (["pretrain", "configs/demo_linear.yaml"], r"demo_linear\.yaml is one of moco-dist linear"),
    "doctor of a detection": (["doctor", "configs/detection_voc_r50.yaml"], "is one of moco-dist detect; doctor looks at those of"),
    "doctor misspelt option": (["doctor", "CONFIGS/tiny.yaml", "--node", "2"], r"did you mean --nodes\?"),
    "plan misspelt option": (["plan", "CONFIGS/tiny.yaml", "--gpu-per-node", "2"], r"did you mean --gpus-per-node\?"),
    "plan of another command": (["plan", "configs/linear_r50_100ep.yaml"], "is one of moco-dist linear"),
    "prepare misspelt option": (["data", "prepare", "imagenet", "--form", "folder", "--out", "NEW"], r"did you mean --from\?"),
    "source of what is generated": (["data", "prepare", "shapes", "--source", "DATA", "--out", "NEW"], "--source is not for shapes"),
    "kind of what has one kind": (["data", "prepare", "shapes", "--from", "folder", "--out", "NEW"], "--from is for imagenet, not for shapes"),
    "another set is there": (["data", "prepare", "cifar10", "--out", "DATA"], "was prepared as shapes; remove it or choose another folder"),
    "more neighbours than images": (["knn", "--run-dir", "RUN", "--neighbours", "500"], "k = 500 is more than there are .*80 is the most"),
    "more head than there is": (["linear", "--run-dir", "RUN", "--transfer.keep-head-layers", "9"], "0 to 2 can be kept"),
    "reproduce elsewhere": (["reproduce", "table1", "--configs", "NEW"], r"--configs .*new is not a folder; without it, moco_dist's own"),
    "reproduce misspelt": (["reproduce", "tabel1"], r"did you mean table1\?"),
    "reproduce seeds": (["reproduce", "table1", "--seeds", "a"], "is not a list of whole numbers such as 0,1,2"),
    "import of nothing": (["import", "NEW", "--out", "NEW"], "new"),
    "import of another network": (["import", "RUN/backbone.safetensors", "--arch", "resnet18", "--out", "NEW"], "resnet18"),
    "features of nothing": (["features", "NEW", "DATA", "--out", "NEW/f.npz"], r"new does not exist; the folder of a run, or a file of weights, is expected"),
    "features of no run": (["features", "CONFIGS", "DATA", "--out", "NEW/f.npz"], r"configs is not the folder of a run"),
    "features of another network": (["features", "RUN/backbone.safetensors", "DATA", "--out", "NEW/f.npz"], r"holds no resnet50: .*; with --arch resnet10 it fits"),
    "features of no network": (["features", "RUN/backbone.safetensors", "DATA", "--arch", "resnet5", "--out", "NEW/f.npz"], r"'resnet5' is not one of .*did you mean resnet50"),
    "features into what is no table": (["features", "RUN", "DATA", "--out", "NEW/f.parqet"], r"f\.parqet ends in none of \.parquet, \.npz; did you mean \.parquet\?"),
    "features of no image": (["features", "RUN", "CONFIGS", "--out", "NEW/f.npz"], r"no image found in .*configs"),
    "features in no batches": (["features", "RUN", "DATA", "--out", "NEW/f.npz", "--batch-size", "0"], r"data\.batch_size: 0 is not greater than 0"),
    "start from nothing": ([*NEW, "--model.init", "NEW/w.pth"], r"model\.init .*w\.pth does not exist; a file of weights, the folder of a run and timm:NAME can"),
    "start from another network": ([*NEW, "--model.arch", "resnet18", "--model.init", "RUN/backbone.safetensors"], r"model\.init .*holds no resnet18: layer1\.1.* is missing; with --model\.arch resnet10 it fits"),
    "start from a run of another network": ([*NEW, "--model.stem", "cifar", "--model.init", "RUN"], r"model\.init .*holds no resnet10: conv1\.weight has the shape .*; with --model\.stem imagenet it fits"),
    "start from a pickle": ([*NEW, "--model.init", "CONFIGS/pickle.pth"], r"model\.init .*cannot be read as weights alone, without running code of it: it holds print, which"),
    "start from what is no number": ([*NEW, "--model.init", "CONFIGS/nan.safetensors"], r"model\.init .*cannot be used: conv1\.weight has values that are not finite"),
    "start from a folder that is no run": ([*NEW, "--model.init", "CONFIGS"], r"model\.init .*configs is not the folder of a run"),
    "start from no network of timm": ([*NEW, "--model.init", "timm:resnet81"], r"model\.init timm:resnet81: timm .* has no such network; did you mean resnet18"),
    "start from what timm has no weights of": ([*NEW, "--model.arch", "resnet18", "--model.init", "timm:seresnet18"], r"model\.init timm:seresnet18 cannot be had: No pretrained weights exist"),
    "experiment of no server": (["compare", "--experiment", "x", "--uri", "htpp://host"], r"did you mean http\?"),
    "experiment of a silent server": (["compare", "--experiment", "x", "--uri", "http://127.0.0.1:9"], r"MLflow at http://127\.0\.0\.1:9: it does not answer"),
    "compare with nothing": (["compare", "RUN", "NEW"], r"new is not the folder of a run"),
    "sweep without slurm": (["launch", "local", "CONFIGS/tiny.yaml", "--sweep", "run.seed=1,2"], "are Slurm's"),
}  # fmt: skip

# id: (text of a config file, what the one line says)
YAML = {
    "tab": ("optim:\n\tbase_lr: 1", r"bad\.yaml is not YAML: .*line 2"),
    "list": ("- 1\n- 2", "holds a list; a mapping of settings is expected"),
    "unknown key": ("optim: {base_rate: 1}", r"unknown setting optim\.base_rate"),
    "key twice": (
        "optim:\n  base_lr: 1\n  base_lr: 2",
        r"bad\.yaml is not YAML: the key base_lr is there twice in .* line 3",
    ),
    "dotted key": ("optim.base_lr: 1", r"optim\.base_lr: a file has it in its section: optim: \{base_lr: 1\}"),
    "number for a key": ("1: 2", "1 is not the name of a setting"),
    "empty section": ("optim:", "optim: null is given where a section of settings is expected"),
    "two documents": ("optim: {}\n---\nmoco: {}", r"bad\.yaml is not YAML: expected a single document"),
    "unknown section": ("optimizer: {base_lr: 1}", "unknown setting optimizer; did you mean optim"),
    "value for a section": ("optim: 3", "optim"),
    "exponent without a point": ("optim: {base_lr: fast}", r"optim\.base_lr: 'fast' is not a valid number"),
    "code": ("run: !!python/object/apply:os.system ['touch pwned']", "is not YAML: could not determine a constructor"),
    "bytes": (b"\xff\xfe\x00", r"bad\.yaml (cannot be read|is not YAML)"),
}

# id: (environment, what the one line says)
ENVIRONMENT = {
    "rank is text": ({"RANK": "first"}, "environment variable RANK is 'first'; a number is expected"),
    "rank beyond the world": ({"RANK": "2", "WORLD_SIZE": "2"}, r"rank 2 of 2 .* is not a place in a world"),
    "negative local rank": ({"LOCAL_RANK": "-1"}, "environment variable LOCAL_RANK is '-1'"),
    "world without a meeting place": (
        {"RANK": "0", "WORLD_SIZE": "2"},
        r"rank 0 cannot meet the others: .*MASTER_ADDR",
    ),
    "world that does not divide": ({"RANK": "0", "WORLD_SIZE": "3"}, r"8 is not a multiple of 12 = 3 rank\(s\)"),
    "tracking uri": ({"MLFLOW_TRACKING_URI": "sqllite:///x.db"}, r"did you mean sqlite\?"),
}


class Hostile:
    """Runs code when a careless program loads it."""

    def __reduce__(self):
        return (print, ("code of the file was run",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_data):
    """The places that the words above stand for; RUN is a real run of two steps."""
    top = tmp_path_factory.mktemp("bad_input")
    places = {"DATA": tiny_data, "RUN": top / "run", "NEW": top / "new", "CONFIGS": top / "configs"}
    places["CONFIGS"].mkdir()
    tiny = "".join(
        f"{name[2:].replace('-', '_')}: {value}\n" for name, value in zip(TINY[::2], TINY[1::2], strict=True)
    )
    sections: dict[str, list[str]] = {"run": [f"dir: {places['NEW']}"], "data": [f"root: {tiny_data}"]}
    for line in tiny.splitlines():
        section, _, rest = line.partition(".")
        sections.setdefault(section, []).append(rest)
    text = "".join(f"{name}:\n" + "".join(f"  {line}\n" for line in lines) for name, lines in sections.items())
    (places["CONFIGS"] / "tiny.yaml").write_text(text)
    assert main(_filled([*PRETRAIN, "--checkpoint.every-steps", "2"], places)) == 0
    weights = safetensors.torch.load_file(places["RUN"] / "backbone.safetensors")
    weights["conv1.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(weights, places["CONFIGS"] / "nan.safetensors")
    torch.save({"state_dict": Hostile()}, places["CONFIGS"] / "pickle.pth")
    return places


def _filled(words, folders):
    for name, path in folders.items():
        words = [re.sub(rf"^{name}(?=/|$)", str(path), word) for word in words]
    return words


def _content(folder: Path):
    """Every file's bytes; the lock says only who was here last."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def _fails(words, folders, says, capsys):
    before = _content(folders["RUN"])
    capsys.readouterr()
    status = main(_filled(words, folders))
    error = capsys.readouterr().err
    assert status == (69 if "not answer" in says else 2)
    # Each thing that is required has a line, and each setting that a run was made with otherwise.
    assert len(error.splitlines()) == 1 or says.endswith("is required") or "step_" in says, error
    assert re.search(says, error), error
    assert re.match(r"(\[rank \d+\] )?error: ", error)
    assert "Traceback" not in error
    assert _content(folders["RUN"]) == before
    assert not _content(folders["NEW"])  # a mistake that only the run's start finds leaves its empty folder
    shutil.rmtree(folders["NEW"], ignore_errors=True)


@pytest.mark.parametrize("case", COMMAND_LINE)
def test_command_line(folders, capsys, case):
    words, says = COMMAND_LINE[case]
    _fails(words, folders, says, capsys)


@pytest.mark.parametrize("case", YAML)
def test_config_file(folders, capsys, case, tmp_path, monkeypatch):
    text, says = YAML[case]
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    _fails(["pretrain", str(file), *NEW[1:]], folders, says, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_environment(folders, capsys, case, monkeypatch):
    environment, says = ENVIRONMENT[case]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [*NEW, "--tracking.backend", "mlflow"] if "MLFLOW_TRACKING_URI" in environment else NEW
    _fails(words, folders, says, capsys)


def test_head_of_the_output():
    """`| head` ends the command without a word."""
    words = [sys.executable, "-m", "moco_dist", "pretrain", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def empty(data):
    shutil.rmtree(data / "train")
    (data / "train").mkdir()


def misspelt(data):
    (data / "train").rename(data / "trian")


def damaged(data):
    for file in (data / "train").rglob("*.*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:40])


def too_few(data):
    for file in sorted(path for path in (data / "train").rglob("*.*") if path.is_file())[3:]:
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [(empty, "no image found in"), (misspelt, r"none called train; did you mean trian\?"),
     (damaged, "cannot read image"), (too_few, r"3 (images|samples)"),
     (shutil.rmtree, r"data root .*data is not a folder")],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_data(folders, capsys, tmp_path, harm, says):
    data = shutil.copytree(folders["DATA"], tmp_path / "data")
    harm(data)
    words = [word if word != "NEW" else str(tmp_path / "run") for word in NEW]
    _fails(words, {**folders, "DATA": data}, says, capsys)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def cut_off(run):
    for file in run.glob("checkpoints/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])


def flipped(run):
    for file in run.glob("checkpoints/*/*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


def no_json(run):
    for file in run.glob("checkpoints/*/checkpoint.json"):
        file.write_text("{")


def another_seed(run):
    for file in run.glob("checkpoints/*/checkpoint.json"):
        manifest = json.loads(file.read_text())
        manifest["config"]["run"]["seed"] = 5
        file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "says"),
    [(cut_off, "is damaged: .* has 100 bytes instead of"), (flipped, "has another content than was"),
     (no_json, r"checkpoint\.json is damaged"), (another_seed, r"run\.seed: 5 in step_0000000\d, now 0")],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_checkpoints(folders, capsys, tmp_path, harm, says):
    run = shutil.copytree(folders["RUN"], tmp_path / "run")
    harm(run)
    before = _content(run)
    capsys.readouterr()
    assert main(_filled(PRETRAIN, {**folders, "RUN": run})) == 2
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert all(line.startswith("error: ") or ": " in line for line in error.splitlines())
    assert "Traceback" not in error
    assert _content(run) == before


def test_debug_shows_where_it_came_from(folders, capsys):
    assert main(_filled(["--debug", "report", "NEW"], folders)) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "moco_dist/cli/report.py" in error


def test_a_folder_that_cannot_be_written(folders, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = [word if word != "NEW" else str(tmp_path / "file" / "run") for word in NEW]
    assert main(_filled(words, folders)) == 2
    assert f"run.dir {tmp_path / 'file' / 'run'} cannot be written: not a directory" in capsys.readouterr().err.lower()
