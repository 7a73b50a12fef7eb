"""One config from a file and flags: precedence, every mistake at once, and the nearest valid choice."""

from pathlib import Path

import pytest
import torch

from moco_dist.cli.configured import config_or_help
from moco_dist.cli.main import main
from moco_dist.config import packaged
from moco_dist.config.evaluate import DetectConfig, FinetuneConfig, KnnConfig, LinearConfig
from moco_dist.config.loading import worker_count
from moco_dist.config.pretrain import AugmentConfig, ModelConfig, PretrainConfig, size_problems
from moco_dist.config.source import flatten, help_text, leaf_fields, read_config, to_yaml
from moco_dist.errors import EXIT_MISTAKE, UserError
from moco_dist.method.encoder import Encoder

SMALL = Path("configs/reproduce_small.yaml")  # over every row of the paper's tables
OVERLAYS = sorted([*Path("configs").glob("*_dali.yaml"), *Path("configs").glob("*_ffcv.yaml")])
NEEDED = ["--run.dir", "r", "--data.root", "d"]


def read(*flags, file=None):
    return read_config(PretrainConfig, file, [*NEEDED, *flags])


def problems(*flags, file=None, schema=PretrainConfig, needed=NEEDED):
    with pytest.raises(UserError) as caught:
        read_config(schema, file, [*needed, *flags])
    return str(caught.value).splitlines()


def test_flags_go_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {base_lr: 3e-2, epochs: 7}\nmoco: {momentum: 0.5}\n")
    config = read("--optim.base-lr", "0.06", "--optim.global_batch_size=512", file=file)
    assert (config.optim.base_lr, config.optim.epochs, config.moco.momentum) == (0.06, 7, 0.5)
    assert config.optim.global_batch_size == 512
    assert config.moco.temperature == 0.2
    assert read(file=file).optim.base_lr == 0.03  # YAML reads 3e-2 as text


def test_lists_and_null_are_written_as_yaml():
    config = read("--model.head-hidden-dims", "[100, 50, 25]", "--data.max-samples", "null")
    assert config.model.head_hidden_dims == (100, 50, 25)
    assert read("--model.head-hidden-dims", "[]").model.head_hidden_dims == ()
    assert read("--model.head-hidden-dims", "512").model.head_hidden_dims == (512,)
    assert config.data.max_samples is None


WORDS = ["2024-11-25", "12:30", "x #y", "20241125", "007", "yes", "null", "[a", "1e3", "{a: b}"]


@pytest.mark.parametrize("word", WORDS)
def test_text_and_paths_are_taken_as_they_are(word, tmp_path):
    config = read("--run.dir", word, "--tracking.experiment", word, "--tracking.uri", f"sqlite:///{word}")
    assert (config.run.dir, config.tracking.experiment) == (Path(word), word)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert read_config(PretrainConfig, file, []) == config
    sets = read_config(DetectConfig, None, ["--run-dir", "r", "--data.root", "d", "--data.train-sets", "[2007, 'a b']",
                                            "--data.test-sets", word]).data  # fmt: skip
    assert (sets.train_sets, sets.test_sets) == (("2007", "a b"), (word,))
    assert read("--tracking.uri", "null").tracking.uri is None


def test_text_in_files(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run: {dir: 2024-11-25}\ntracking: {experiment: 12:30}\ndata: {root: 20241125}\n")
    (line,) = problems(file=file, needed=[])
    assert line == "data.root: 20241125 is a number where text is expected; in quotes it is text"
    config = read(file=file)
    assert (config.tracking.experiment, config.run.dir) == ("12:30", Path("r"))
    assert read_config(PretrainConfig, file, ["--data.root", "d"]).run.dir == Path("2024-11-25")


def test_the_home_folder_and_variables(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("run: {dir: ~/runs/a}\ndata: {root: $HOME/images}\n")
    assert problems(file=file, needed=[]) == [
        "data.root: $HOME/images has $HOME, which only a shell replaces; write the path, or ~ for the home folder"
    ]
    config = read_config(PretrainConfig, file, ["--data.root=~"])
    assert (config.run.dir, config.data.root) == (tmp_path / "runs" / "a", tmp_path)
    assert config_or_help("pretrain", PretrainConfig, ["~/c.yaml", "--data.root", "a$b/$/c$HOME"]) is not None
    for text in ("~nobody-of-this-name/a", "a/${USER}/b"):
        assert text in problems("--data.root", text)[0]
    assert main(["report", "~/nothing"]) == main(["report", "$HOME/nothing"]) == EXIT_MISTAKE
    first, second = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/nothing" in first
    assert "only a shell replaces" in second


def test_a_path_is_not_empty(tmp_path, capsys):
    """A shell makes an empty word of "$RUN" where RUN is not set; it is not the folder that one is in."""
    (tmp_path / "c.yaml").write_text("run: {dir: ''}\n")
    in_file = problems("--data.root", "d", file=tmp_path / "c.yaml", needed=[])
    for found in (problems("--data.root", ""), problems("--data.cache-dir="), in_file):
        assert "'' is no path" in found[0]
    assert main(["report", ""]) == EXIT_MISTAKE
    assert "'' is no path" in capsys.readouterr().err
    assert problems("--optim.precision", "")[0].endswith("'fp16' or 'fp64'")


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


MERGES = "a0: &a0 {name: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MERGES, "unknown setting a11"),
        ("a: " + "[" * 100_000, "nested more than 20 deep"),
        ("{a: " * 5_000, "nested more than 20 deep"),
        ("optim: &a {epochs: *a}", "*a is inside of &a"),
        (LAUGHS + "optim: {epochs: *a8}", "optim.epochs: [[["),
        ("optim: {epochs: " + "1" * 5_000 + "}", "is not YAML"),
        ("optim: {epochs: !!int one}", "is not YAML"),
        (f"? {'x' * 10_000}\n: 1", "xxx ..."),
        ("".join(f"name{i}: 1\n" for i in range(1_000)), "and 950 more"),
        (f"model: {{head_hidden_dims: {'x' * 10_000}}}", "head_hidden_dims: 'xxx"),
    ],
    ids=["merges", "lists", "mappings", "itself", "aliases", "digits", "tag", "long key", "many keys", "long value"],
)  # fmt: skip
def test_messages_about_crafted_files_have_a_length(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    lines = problems(file=file)
    assert any(expected in line for line in lines)
    assert len(lines) <= 51 and max(map(len, lines)) < 600


def test_flags_that_are_nested_deeply_or_have_many_digits():
    for word in ("[" * 100_000, "1" * 5_000):
        (line,) = problems("--optim.epochs", word)
        assert line.startswith("optim.epochs: ") and len(line) < 600


def test_recipes_fill_what_is_not_given():
    assert AugmentConfig(recipe="v1").jitter == (0.4, 0.4, 0.4, 0.4)
    assert AugmentConfig(recipe="v1").blur_probability == 0.0
    assert AugmentConfig().jitter_probability == 0.8
    assert AugmentConfig(recipe="v1", blur_probability=0.3).blur_probability == 0.3


def test_the_resolved_config_reads_back_equal(tmp_path):
    config = read("--augment.recipe", "v1", "--model.head-hidden-dims", "[]")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert read_config(PretrainConfig, file, []) == config
    assert flatten(config)["augment.blur_probability"] == 0.0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--optim.base-lrr", "1"], "unknown flag --optim.base-lrr; did you mean --optim.base-lr?"),
        (["--optim.precision", "bf1"], "did you mean bf16?"),
        (["--moco.temperature", "-1"], "moco.temperature: -1 is not greater than or equal to 0.01"),
        (["--moco.temperature", ".nan"], "moco.temperature: nan is not a finite number"),
        (["--data.image-size", "fast"], "data.image_size: 'fast' is not a valid integer"),
        (["--augment.crop-scale", "[1.0, 0.2]"], "crop_scale (1.0, 0.2) is not a range"),
        (["--augment.recipe", "v3"], "augment.recipe: 'v3' is not one of 'v1', 'v2' or 'simclr'"),
        (["--optim.global-batch-size", "100"], "96 and 128 are"),
        (["--optim.global-batch-size", "16"], "32 is the smallest that is"),
        (["--moco.queue-size", "64"], "256 is the smallest that works"),
        (["--model.bn-group-size", "1", "--data.image-size", "32"], "end as 1 x 1 with model.stem imagenet"),
        (["--model.bn-group-size", "1", "--data.image-size", "8", "--model.stem", "cifar"], "2 is the smallest that"),
        (["--optim.epochs", "true"], "optim.epochs: true is not a value for it"),
        (["stray"], "unexpected argument 'stray'"),
        (["--optim.base-lr"], "--optim.base-lr: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_clear_line(flags, expected):
    lines = problems(*flags)
    assert len(lines) == 1
    assert expected in lines[0]


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 33), ("cifar", 9)])
def test_a_bn_group_of_one_sample_works_where_pixels_are_left(stem, side):
    """One pixel more than what is refused, through the real network in training."""
    flags = ["--model.bn-group-size", "1", "--data.image-size", str(side), "--model.stem", stem]
    read(*flags)
    model = ModelConfig.model_validate({"arch": "resnet10", "stem": stem, "bn_group_size": 1})
    assert Encoder(model)(torch.zeros(2, 3, side, side)).isfinite().all()
    with pytest.raises(ValueError, match="end as 1 x 1 in BN groups of 1 sample"):
        Encoder(model)(torch.zeros(2, 3, side - 1, side - 1))


def test_all_mistakes_are_reported_at_once():
    lines = problems("--optim.base-lrr", "1", "--data.image-size", "x", "--moco.momentum", "2", needed=[])
    assert [line.split()[0] for line in lines] == [
        "unknown",
        "run.dir",
        "data.root",
        "data.image_size:",
        "moco.momentum:",
    ]


def test_files(tmp_path):
    good = tmp_path / "demo.yaml"
    good.write_text("optim: {epocs: 3}\n")
    assert problems(file=good) == ["unknown setting optim.epocs; did you mean optim.epochs?"]
    assert "did you mean demo.yaml?" in problems(file=tmp_path / "dmo.yaml")[0]
    for text, expected in (
        ("- 1", "a mapping of settings is expected"),
        ("a: [", "is not YAML"),
        ("optim: 3", "optim: 3 is given where a section"),
        ("optimm: {}", "did you mean optim?"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ):
        good.write_text(text)
        assert expected in problems(file=good)[0]
    good.write_bytes(b"\xff\xfe")
    assert "cannot be read" in problems(file=good)[0]


def test_sizes_on_many_ranks():
    config = read("--optim.global-batch-size", "256")
    assert size_problems(config, 8) == []
    assert "16 rank(s)" in size_problems(config, 16)[0]
    assert "512 is the smallest that is" in size_problems(config, 16)[0]


@pytest.mark.parametrize("schema", [PretrainConfig, KnnConfig, LinearConfig, FinetuneConfig, DetectConfig])
def test_help_shows_every_setting_with_its_default(schema):
    text = help_text(schema)
    for name, field in leaf_fields(schema).items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description
    assert "source:" in text


@pytest.mark.parametrize(
    "path", sorted({*Path("configs").glob("*.yaml")} - {SMALL, *OVERLAYS}), ids=lambda path: path.name
)
def test_configs_are_valid_and_say_what_they_are(path):
    header = path.read_text().split("\n\n")[0]
    for item in ("Command:", "Hardware:", "Hours:", "Expected:"):
        assert item in header
    for name, schema in {"linear": LinearConfig, "finetune": FinetuneConfig, "detection": DetectConfig}.items():
        if name in path.name:
            read_config(schema, path, ["--run-dir", "r"])
            break
    else:
        read_config(PretrainConfig, path, [])


def test_a_name_is_a_file_first_then_a_packaged_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("demo", "demo.yaml"):
        assert packaged.located(Path(word)) == packaged.FOLDER / "demo.yaml"
        assert read_config(PretrainConfig, Path(word), []).moco.queue_size == 1024
    (tmp_path / "demo").mkdir()  # a folder is no config
    (tmp_path / "demo.yaml").write_text("run: {dir: r}\ndata: {root: a}\nmoco: {queue_size: 512}\n")
    assert read_config(PretrainConfig, Path("demo.yaml"), []).moco.queue_size == 512
    assert read_config(PretrainConfig, Path("demo"), []).moco.queue_size == 1024
    with pytest.raises(UserError, match="config file elsewhere/demo does not exist"):
        read_config(PretrainConfig, Path("elsewhere/demo"), [])


def test_later_files_go_over_earlier_ones_and_flags_over_all(tmp_path):
    (tmp_path / "base.yaml").write_text("run: {dir: r}\ndata: {root: a, image_size: 64}\noptim: {epochs: 7}\n")
    (tmp_path / "over.yaml").write_text("data: {root: b, loader: ffcv}\n")
    words = [str(tmp_path / "base.yaml"), str(tmp_path / "over.yaml"), "--optim.epochs", "9"]
    config = config_or_help("pretrain", PretrainConfig, words)
    assert config is not None
    assert (str(config.data.root), config.data.loader, config.data.image_size) == ("b", "ffcv", 64)
    assert config.optim.epochs == 9


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlays_fit_their_configs(overlay):
    base, _, loader = overlay.stem.rpartition("_")
    config = config_or_help("pretrain", PretrainConfig, [f"configs/{base}.yaml", str(overlay)])
    assert config is not None and config.data.loader == loader


@pytest.mark.parametrize(
    ("given", "ranks", "cores", "count"),
    [(None, 1, 2, 1), (None, 1, 1, 1), (None, 8, 96, 8), (None, 8, 32, 3), (None, 8, 4, 1), (None, None, 1, 8),
     (0, 1, 16, 0), (64, 8, 4, 64)],
)  # fmt: skip
def test_workers_are_by_default_as_many_as_the_cores_allow(monkeypatch, given, ranks, cores, count):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert worker_count(given, ranks) == count
