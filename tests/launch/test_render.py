"""What `launch --dry-run` prints: compared with launchers/examples, and with what Slurm, bash and Kubernetes read."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from moco_dist.cli.launch import take_apart
from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.errors import UserError
from moco_dist.launchers.job import Hosts, Job, pretraining
from moco_dist.launchers.kubernetes import KubernetesOptions, how_to
from moco_dist.launchers.slurm import SlurmOptions, limit_hours, script
from moco_dist.launchers.slurm import how_to as slurm_how_to
from tests.launch.schemas import problems

EXAMPLES_FOLDER = Path("moco_dist/launchers/examples")
CONFIG = "configs/mocov2_r50_200ep.yaml"
SIZE = "--nodes 2 --gpus-per-node 4"
PODS = f"kubernetes {CONFIG} {SIZE} --image registry.example/moco-dist:0.1.0 --data.root /data/imagenet"
EXAMPLES = {  # the files in launchers/examples, and the command that each is made by
    "pretrain.sbatch": f"slurm {CONFIG} {SIZE} --hours 24 --partition gpu --python python",
    "five_seeds.sbatch": f"slurm {CONFIG} {SIZE} --hours 24 --python python --sweep run.seed=0,1,2,3,4",
    "trainjob.yaml": f"{PODS} --run.dir /runs/mocov2_r50_200ep --queue research --mlflow-secret mlflow",
    "indexed_job.yaml": f"{PODS} --run.dir /runs/mocov2_r50_200ep --mlflow-secret mlflow --form indexed-job",
}


def launch(capsys, *words):
    status = main(["launch", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_is_rendered(name, capsys):
    """MOCO_DIST_WRITE_EXAMPLES=1 writes them anew."""
    status, text, _ = launch(capsys, *EXAMPLES[name].split(), "--dry-run")
    assert status == 0
    path = EXAMPLES_FOLDER / name
    if "MOCO_DIST_WRITE_EXAMPLES" in os.environ:
        path.write_text(text)
    assert text == path.read_text()


COMMANDS = {  # of Slurm, for a script alone: a host is lost once the run has got as far as $REACHES
    "scontrol": """case $1$2 in showjob) echo JobState=RUNNING;; requeue*) touch "$PWD/requeued"; exit 1;; esac""",
    "srun": """[ -z "$REACHES" ] || mkdir -p "runs/mine/checkpoints/$REACHES"
        for word in "$@"; do case $word in --status-folder=*) folder=${word#*=};; esac; done
        for status in $STATUSES; do echo "$status" > "$folder/host$((count += 1))"; done
        [ "$ASKED_IN" != srun ] || kill -USR1 "$PPID"
        [ -z "$ASKED_IN" ] || { sleep 0.5; touch "$folder"/host{1,2}.started; }
        until [ -z "$ASKED_IN" ] || [ -e told ]; do sleep 0.1; done
        exit "$SRUN" """,
    "rm": """[ "$ASKED_IN" != rm ] || kill -USR1 "$PPID"; exec /bin/rm "$@" """,  # before srun
    "scancel": """echo "$@" $(cd runs/.statuses-1-0; echo *) >> told""",
}


@pytest.fixture
def ran(tmp_path, capsys):
    """A function that runs the script where Slurm's commands are those above; returns status, output, if queued."""
    _, text, _ = launch(capsys, "slurm", CONFIG, "--run.dir", "runs/mine", "--dry-run")
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "runs" / "mine" / "checkpoints" / "step_00000100").mkdir(parents=True)

    def run(srun, statuses="", restarts=0, reaches="", asked_in=""):
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_JOB_NUM_NODES": "2", "ASKED_IN": asked_in, "REACHES": reaches, "STATUSES": statuses,
            "SRUN": str(srun),
        }  # fmt: skip
        done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
        return done.returncode, done.stdout, (tmp_path / "requeued").exists()

    return run


@pytest.mark.parametrize("status", [69, 74])
@pytest.mark.parametrize(
    ("restarts", "reaches", "is_queued"),
    [(3, "", True), (12, "", False), (12, "step_00000100", False), (12, "step_00000200", True)],
)
def test_a_run_that_lost_a_host_is_queued_again_as_long_as_it_gets_on(ran, restarts, reaches, is_queued, status):
    """Time limits and preemptions count as restarts too, and a long run has many of them."""
    ended, said, was_queued = ran(status, restarts=restarts, reaches=reaches)
    assert ended == status
    assert was_queued is is_queued
    why = {69: "a rank or a host was lost", 74: "a file could not be read or written"}[status]
    assert (f"{why}: queued again" in said) is is_queued


@pytest.mark.parametrize(
    ("srun", "statuses", "status", "is_queued"),
    [
        (69, "2 69", 2, False),  # an image that one host cannot read
        (73, "73 69", 73, False),  # another job writes into the folder, and its checkpoints are not this one's progress
        (73, "69 73", 73, False),
        (137, "69", 69, True),  # the launcher itself was killed on the other host
        (137, "", 69, True),
        (134, "", 69, True),
        (143, "143 69", 143, False),
        (1, "1 69", 1, False),
        (74, "69 74", 74, True),
        (0, "0 0", 0, False),
        (75, "75 75", 75, True),
        (127, "", 127, False),  # nothing was started
    ],
)
def test_the_cause_decides_whether_a_job_is_queued_again(ran, srun, statuses, status, is_queued):
    ended, _, was_queued = ran(srun, statuses, reaches="step_00000200")
    assert (ended, was_queued) == (status, is_queued)


@pytest.mark.parametrize("asked_in", ["rm", "srun"])
def test_a_signal_before_all_hosts_have_started_is_kept_until_they_have(ran, tmp_path, asked_in):
    ended, said, was_queued = ran(143, asked_in=asked_in)
    assert (tmp_path / "told").read_text() == "--signal=TERM 1.0 host1.started host2.started\n"
    assert (ended, was_queued) == (75, True), said


def test_the_docs_name_every_example_and_its_command():
    page = " ".join(Path("docs/launch.md").read_text().replace("\\\n", " ").split())
    for name, command in EXAMPLES.items():
        assert f"{EXAMPLES_FOLDER}/{name}" in page
        assert f"moco-dist launch {command} --dry-run" in page, name


def test_the_docs_show_what_slurm_users_are_told():
    job, _ = pretraining([Path(CONFIG)], [], Hosts(nodes=2, gpus_per_node=4))
    assert "\n".join(slurm_how_to([job], "1")) in Path("docs/launch.md").read_text()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith("sbatch")])
def test_scripts_are_bash(name):
    done = subprocess.run(["bash", "-n", EXAMPLES_FOLDER / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith("yaml")])
def test_manifests_have_the_real_schema(name):
    documents = list(yaml.safe_load_all((EXAMPLES_FOLDER / name).read_text()))
    assert [problem for document in documents for problem in problems(document)] == []
    config = PretrainConfig.model_validate(yaml.safe_load(documents[0]["data"]["config.yaml"]))
    flags = ["--data.root", "/data/imagenet", "--run.dir", "/runs/mocov2_r50_200ep"]
    assert config == read_config(PretrainConfig, Path(CONFIG), flags)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("backoffLimitPerIndex: 20", "backoffLimitPerIdx: 20", "backoffLimitPerIdx"),
        ("numNodes: 2", "numNodes: two", "numNodes"),
        ("runtimeRef:", "runtimeReff:", "runtimeReff"),
        ("mountPath: /dev/shm", "mountpath: /dev/shm", "mountpath"),
        ("action: FailJobSet", "actionn: FailJobSet", "actionn"),
        ("clusterIP: None", "clusterIP: [None]", "clusterIP"),
        ("parallelism: 2", 'parallelism: "2"', "parallelism"),
    ],
)
def test_the_schemas_find_mistakes(old, new, where):
    """Or the test above would say nothing."""
    texts = [(EXAMPLES_FOLDER / name).read_text() for name in ("trainjob.yaml", "indexed_job.yaml")]
    text = next(text for text in texts if old in text)
    found = [p for document in yaml.safe_load_all(text.replace(old, new)) for p in problems(document)]
    assert any(where in problem for problem in found), found


NASTY = 'a b\';$(touch pwned) `x` "q" %j \\ é'


def test_no_value_of_a_user_is_read_by_the_shell(tmp_path):
    words = ("pretrain", f"{NASTY}.yaml", "--data.root", NASTY, "--run.dir", "$HOME/*")
    job = Job(words, tmp_path / NASTY, 0, Hosts(nodes=2, gpus_per_node=4))
    text = script([job], SlurmOptions(nodes=2, gpus_per_node=4, account="me; rm -rf /"))
    lines = [line for line in text.splitlines() if line.startswith(("run_dir=", "command="))]
    shown = 'printf \'%s\\n\' "$run_dir" "${command[@]}"'
    done = subprocess.run(["bash", "-c", "\n".join([*lines, shown])], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(tmp_path / NASTY), *words]
    assert list(tmp_path.iterdir()) == []
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert ["--account=me; rm -rf /"] in options
    with pytest.raises(UserError, match="line break"):
        script([job], SlurmOptions(account="me\n#SBATCH --uid=0"))


def test_a_manifest_keeps_values_in_their_place(capsys):
    status, text, _ = launch(
        capsys, "kubernetes", CONFIG, "--image", 'x"{{\\', "--gpus-per-node", "0", "--run.dir", "/runs/a: {b",
        "--data.root", "/data/x", "--data-claim", "c}}", "--dry-run",
    )  # fmt: skip
    assert status == 0
    config, *_, train_job = yaml.safe_load_all(text)
    assert train_job["spec"]["trainer"]["image"] == 'x"{{\\'
    assert yaml.safe_load(config["data"]["config.yaml"])["run"]["dir"] == "/runs/a: {b"
    assert "c}}" in text


SECRETS = [
    ("--tracking.uri", "http://me:hunter2@mlflow", "tracking.uri has a password or token, which would stand in a "),
    ("--tracking.uri", "postgresql://me:hunter/2@mlflow", "tracking.uri has a password"),
    ("--tracking.uri=https://mlflow/?token=hunter2", "tracking.uri has a password or token"),
    ("--tracking.uri", "https://hunter2@mlflow", "tracking.uri has a password or token"),
    ("--tracking.experiment", "see https://x/?sig=hunter2", "tracking.experiment has a password or token"),
]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["slrum", CONFIG], "local, torchrun, slurm, kubernetes are possible; did you mean slurm?"),
        (["slurm"], "launch needs a config file"),
        (["slurm", "configs/nothing.yaml"], "config file configs/nothing.yaml does not exist"),
        (["slurm", CONFIG, "--nodes", "3", "--gpus-per-node", "8"], "global_batch_size 256 is not a multiple of 768"),
        (["slurm", CONFIG, "--nodes", "0"], "nodes: 0"),
        (["slurm", CONFIG, "--dry-run", "--sbatch=--export=MLFLOW_TRACKING_URI=http://me:hunter2@mlflow"],
         "export has a password or token, which would stand in a job script that others can read"),
        (["slurm", CONFIG, "--partitoin", "gpu"], "unknown flag --partitoin; did you mean --partition?"),
        (["slurm", CONFIG, "--optim.epohcs", "3"], "unknown flag --optim.epohcs; did you mean --optim.epochs?"),
        (["slurm", CONFIG, "--data.root", "no/such"], "data.root no/such does not exist"),
        (["slurm", CONFIG, "--then", "knn", "x"], "--then is followed by `linear`"),
        (["slurm", CONFIG, "--sweep", "run.sed=1,2"], "--sweep run.sed is not a setting; did you mean run.seed?"),
        (["slurm", CONFIG, "--sweep", "run.seed=1,1"], "names a combination twice"),
        (["slurm", CONFIG, "--sweep", "optim.global_batch_size=256,100"], "global_batch_size 100 is not a multiple of"),
        (["local", CONFIG, "--sweep", "run.seed=1,2"], "--sweep and --then are Slurm's"),
        (["local", CONFIG, "--nodes", "2", "--data.root", "."], "launch local is one machine"),
        (["torchrun", CONFIG, "--nodes", "2", "--data.root", "."], "2 nodes need --head HOST[:PORT]"),
        (["kubernetes", CONFIG], "image is required"),
        (["kubernetes", CONFIG, "--image", "x"], "data.root data/imagenet is not in /data, where the claim is"),
        (["kubernetes", CONFIG, "--image", "x", "--data.root", "/data/a", "--run.dir", "/runs/../b"], "not in /runs"),
        *(
            (["kubernetes", CONFIG, "--image", "x", "--data.root", "/data/a", "--run.dir", "/runs/a", *secret], line)
            for *secret, line in SECRETS
        ),
        *((["slurm", CONFIG, "--data.root", ".", "--dry-run", *secret], line) for *secret, line in SECRETS),
        (["torchrun", CONFIG, "--data.root", ".", "--dry-run", *SECRETS[0][:2]], "tracking.uri has a password"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_started(words, line, capsys):
    status, out, err = launch(capsys, *words)
    assert status == 2
    assert line in err
    assert "hunter2" not in err
    assert out == ""


def test_a_dry_run_takes_paths_that_are_not_here(capsys):
    status, out, err = launch(capsys, "slurm", CONFIG, "--data.root", "no/such", "--dry-run")
    assert status == 0
    assert "warning: data.root no/such does not exist" in err
    assert "--data.root no/such" in out


def test_every_combination_of_a_sweep_has_its_own_folder(capsys):
    axes = ["run.seed=0,1", "moco.temperature=0.1,0.2", "model.head_hidden_dims=[],[64,64]"]
    sweeps = [word for axis in axes for word in ("--sweep", axis)]
    status, out, _ = launch(capsys, "slurm", CONFIG, *sweeps, "--dry-run")
    assert status == 0
    assert "#SBATCH --array=0-7" in out
    folders = re.findall(r"run_dir=(\S+)", out)
    assert len(set(folders)) == 8
    assert "runs/mocov2_r50_200ep_seed0_temperature0.1_head_hidden_dims-64-64-" in folders
    for words in re.findall(r"command=\((.*)\)", out):
        _, config, *flags = shlex.split(words)
        assert str(read_config(PretrainConfig, Path(config), flags).run.dir) in folders


def test_words_go_to_whom_they_are_for():
    words = ["c.yaml", "over.yaml", "--nodes", "2", "--optim.epochs=3", "--dry-run", "--then", "linear", "l.yaml",
             "--run.dir", "x", "--sweep", "run.seed=0,1"]  # fmt: skip
    request = take_apart(words)
    assert request.config_files == [Path("c.yaml"), Path("over.yaml")]
    assert (request.then, request.dry_run) == (Path("l.yaml"), True)
    assert request.options == ["--nodes", "2"]
    assert request.settings == ["--optim.epochs=3", "--run.dir", "x"]
    assert request.axes == ["run.seed=0,1"]


def test_torchrun_on_hosts_is_one_command_for_all(capsys):
    words = [CONFIG, *SIZE.split(), "--head", "node1"]
    status, out, _ = launch(capsys, "torchrun", *words, "--dry-run")
    assert status == 0
    assert out == (
        "python -m moco_dist.launchers.torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d "
        f"--rdzv-endpoint node1:29500 --rdzv-id mocov2-r50-200ep -m moco_dist pretrain {CONFIG}\n"
    )


@pytest.mark.parametrize(("text", "hours"), [("infinite", None), ("2-00:00:00", 48), ("30:00", 0.5), ("01:30:00", 1.5)])
def test_time_limits_of_partitions(text, hours):
    assert limit_hours(text) == hours


@pytest.mark.parametrize("folder", ["runs/A_b.c", "/x/123", "runs/ÄÖ", "runs/" + "y" * 80])
def test_names_are_such_that_every_scheduler_takes_them(folder):
    job = Job(("pretrain",), Path(folder), 0, Hosts())
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,43}[a-z0-9])?", job.name), job.name
    assert any(job.name in line for line in how_to(job, KubernetesOptions(image="x")))


STORE = [*f"kubernetes {CONFIG} {SIZE} --image x --run.dir /runs/r --data.root s3://bucket/set".split()]


@pytest.mark.parametrize("form", ["trainjob", "indexed-job"])
def test_pods_of_a_data_set_in_a_store_need_no_claim_and_get_a_cache(capsys, form):
    words = [*STORE, "--form", form, "--data-secret", "store", "--dry-run"]
    status, text, _ = launch(capsys, *words, "--data.cache-dir", "/cache", "--data.cache-bytes", "200000000000")
    assert status == 0
    assert not [p for document in yaml.safe_load_all(text) for p in problems(document)]
    assert 'claimName: "data"' not in text
    assert text.count('secretRef: {name: "store"}') == 1
    assert '- {name: cache, mountPath: "/cache"}' in text
    assert "- {name: cache, emptyDir: {sizeLimit: 200335Mi}}" in text  # 5 % more, or the pod is ended for a few bytes
    assert "cache" not in launch(capsys, *words)[1].partition("volumeMounts:")[2]
    on_a_disk = launch(capsys, *words, "--data.root", "/data/set", "--data.cache-dir", "/cache")[1]
    assert "name: cache" not in on_a_disk and 'claimName: "data"' in on_a_disk


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data.cache-dir /cache", "--data.cache-bytes says how much it may take"),
        ("--data.cache-dir /runs/cache --data.cache-bytes 1", "is to be a disk of each pod's node"),
        ("--data.cache-dir cache --data.cache-bytes 1", "is to be a disk of each pod's node"),
        ("--data.cache-dir / --data.cache-bytes 1", "is to be a disk of each pod's node"),
    ],
)
def test_a_cache_that_pods_cannot_have(capsys, flags, says):
    status, out, err = launch(capsys, *STORE, *flags.split(), "--dry-run")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err
